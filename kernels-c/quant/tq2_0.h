/* TQ2_0: 256 weights of -1, 0 or 1 (or 2), times d. Bits 2k and 2k + 1 of byte j of each half, less
 * one, are weight 32 k + j of that half. */
#ifndef V4_QUANT_TQ2_0_H
#define V4_QUANT_TQ2_0_H

#include "scalar.h"

struct v4_block_tq2_0 {
    uint8_t qs[64];
    uint8_t d[2];
};

V4_INLINE void v4_tq2_0_decode_i8(const struct v4_block_tq2_0 *b, int8_t *q, float *scale,
                                  float *min)
{
    (void)min;
    for (int k = 0; k < 8; k++) {
        for (int j = 0; j < 32; j++) {
            q[32 * k + j] = (int8_t)((b->qs[k / 4 * 32 + j] >> (k % 4 * 2) & 3) - 1);
        }
    }
    for (int g = 0; g < 8; g++) {
        scale[g] = v4_load_f16(b->d);
    }
}

#endif
