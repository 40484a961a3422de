/* Q4_0: 32 weights, d (q - 8). Byte j holds weight j low and weight j + 16 high. */
#ifndef V4_QUANT_Q4_0_H
#define V4_QUANT_Q4_0_H

#include "scalar.h"

struct v4_block_q4_0 {
    uint8_t d[2];
    uint8_t qs[16];
};

V4_INLINE void v4_q4_0_decode_i8(const struct v4_block_q4_0 *b, int8_t *q, float *scale, float *min)
{
    (void)min;
    for (int j = 0; j < 16; j++) {
        q[j] = (int8_t)((b->qs[j] & 15) - 8);
    }
    for (int j = 0; j < 16; j++) {
        q[j + 16] = (int8_t)((b->qs[j] >> 4) - 8);
    }
    *scale = v4_load_f16(b->d);
}

#endif
