/* Q6_K: 256 weights in groups of 16, d s (q - 32). In each half of the block nibble k of ql[j] is
 * the low part of weight 64 k + j, bits 2k and 2k + 1 of qh[j] the high part of weight 32 k + j. */
#ifndef V4_QUANT_Q6_K_H
#define V4_QUANT_Q6_K_H

#include "scalar.h"

struct v4_block_q6_k {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint8_t d[2];
};

V4_INLINE void v4_q6_k_decode_i8(const struct v4_block_q6_k *b, int8_t *q, float *scale, float *min)
{
    (void)min;
    const float d = v4_load_f16(b->d);
    for (int k = 0; k < 8; k++) {
        for (int j = 0; j < 32; j++) {
            const int low = b->ql[k / 4 * 64 + k % 2 * 32 + j] >> (k % 4 / 2 * 4) & 15;
            const int high = b->qh[k / 4 * 32 + j] >> (k % 4 * 2) & 3;
            q[32 * k + j] = (int8_t)((low | high << 4) - 32);
        }
    }
    for (int g = 0; g < 16; g++) {
        scale[g] = d * (float)b->scales[g];
    }
}

#endif
