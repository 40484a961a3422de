/* TQ1_0: 256 weights of -1, 0 or 1, times d. A byte is five base-3 digits as a fraction of 256:
 * multiplied by 3^n (and wrapped), its upper digit is digit n. 32 bytes give weights 0..159, digit
 * by digit, 16 bytes 160..239, 4 bytes with four digits the rest. */
#ifndef V4_QUANT_TQ1_0_H
#define V4_QUANT_TQ1_0_H

#include "scalar.h"

struct v4_block_tq1_0 {
    uint8_t qs[48];
    uint8_t qh[4];
    uint8_t d[2];
};

V4_INLINE int8_t v4_tq1_0_digit(uint8_t digits, int power)
{
    return (int8_t)(((digits * power & 255) * 3 >> 8) - 1);
}

V4_INLINE void v4_tq1_0_decode_i8(const struct v4_block_tq1_0 *b, int8_t *q, float *scale,
                                  float *min)
{
    (void)min;
    for (int n = 0, power = 1; n < 5; n++, power *= 3) {
        for (int j = 0; j < 32; j++) {
            q[32 * n + j] = v4_tq1_0_digit(b->qs[j], power);
        }
        for (int j = 0; j < 16; j++) {
            q[160 + 16 * n + j] = v4_tq1_0_digit(b->qs[32 + j], power);
        }
        for (int j = 0; j < 4 && n < 4; j++) {
            q[240 + 4 * n + j] = v4_tq1_0_digit(b->qh[j], power);
        }
    }
    for (int g = 0; g < 8; g++) {
        scale[g] = v4_load_f16(b->d);
    }
}

#endif
