/* Q2_K: 256 weights in groups of 16, d s q - dmin m. A byte of scales is s low, m high. Each half
 * of the block has 32 bytes: bits 2k and 2k + 1 of byte j are weight 32 k + j of that half. */
#ifndef V4_QUANT_Q2_K_H
#define V4_QUANT_Q2_K_H

#include "scalar.h"

struct v4_block_q2_k {
    uint8_t scales[16];
    uint8_t qs[64];
    uint8_t d[2];
    uint8_t dmin[2];
};

V4_INLINE void v4_q2_k_decode_i8(const struct v4_block_q2_k *b, int8_t *q, float *scale, float *min)
{
    const float d = v4_load_f16(b->d);
    const float dmin = v4_load_f16(b->dmin);
    for (int k = 0; k < 8; k++) {
        for (int j = 0; j < 32; j++) {
            q[32 * k + j] = (int8_t)(b->qs[k / 4 * 32 + j] >> (k % 4 * 2) & 3);
        }
    }
    for (int g = 0; g < 16; g++) {
        scale[g] = d * (float)(b->scales[g] & 15);
        min[g] = dmin * (float)(b->scales[g] >> 4);
    }
}

#endif
