/* MXFP4: 32 weights, e2m1 x 2^(e - 127). Byte j holds weight j low and weight j + 16 high. */
#ifndef V4_QUANT_MXFP4_H
#define V4_QUANT_MXFP4_H

#include "e2m1.h"

struct v4_block_mxfp4 {
    uint8_t e;
    uint8_t qs[16];
};

V4_INLINE void v4_mxfp4_decode_i8(const struct v4_block_mxfp4 *b, int8_t *q, float *scale,
                                  float *min)
{
    (void)min;
    for (int j = 0; j < 16; j++) {
        q[j] = v4_e2m1_doubled[b->qs[j] & 15];
        q[j + 16] = v4_e2m1_doubled[b->qs[j] >> 4];
    }
    *scale = v4_half_of_e8m0(b->e);
}

#endif
