/* Q5_1: 32 weights, d q + m. Bits as in Q5_0. */
#ifndef V4_QUANT_Q5_1_H
#define V4_QUANT_Q5_1_H

#include "scalar.h"

struct v4_block_q5_1 {
    uint8_t d[2];
    uint8_t m[2];
    uint8_t qh[4];
    uint8_t qs[16];
};

V4_INLINE void v4_q5_1_decode_i8(const struct v4_block_q5_1 *b, int8_t *q, float *scale, float *min)
{
    const uint32_t qh = v4_load_u32(b->qh);
    for (int j = 0; j < 16; j++) {
        q[j] = (int8_t)((b->qs[j] & 15) | (int)(qh >> j & 1) << 4);
    }
    for (int j = 0; j < 16; j++) {
        q[j + 16] = (int8_t)(b->qs[j] >> 4 | (int)(qh >> (j + 16) & 1) << 4);
    }
    *scale = v4_load_f16(b->d);
    *min = -v4_load_f16(b->m);
}

#endif
