/* Q3_K: 256 weights in groups of 16, d (s - 32) q. Low bits as in Q2_K; bit k of hmask[j] belongs
 * to weight 32 k + j, and where it is clear 4 is subtracted. Of the 6-bit scales byte g mod 8 has
 * the lower four bits, byte 8 + g mod 4 the upper two. */
#ifndef V4_QUANT_Q3_K_H
#define V4_QUANT_Q3_K_H

#include "scalar.h"

struct v4_block_q3_k {
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];
    uint8_t d[2];
};

V4_INLINE void v4_q3_k_decode_i8(const struct v4_block_q3_k *b, int8_t *q, float *scale, float *min)
{
    (void)min;
    const float d = v4_load_f16(b->d);
    for (int k = 0; k < 8; k++) {
        for (int j = 0; j < 32; j++) {
            const int low = b->qs[k / 4 * 32 + j] >> (k % 4 * 2) & 3;
            const int high = b->hmask[j] >> k & 1;
            q[32 * k + j] = (int8_t)(low + 4 * high - 4);
        }
    }
    for (int g = 0; g < 16; g++) {
        const int low = b->scales[g % 8] >> (g / 8 * 4) & 15;
        const int high = b->scales[8 + g % 4] >> (g / 4 * 2) & 3;
        scale[g] = d * (float)((low | high << 4) - 32);
    }
}

#endif
