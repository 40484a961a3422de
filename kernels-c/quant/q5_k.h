/* Q5_K: 256 weights in groups of 32, d s q - dmin m. As Q4_K; bit g of qh[j] is the fifth bit of
 * weight j of group g. */
#ifndef V4_QUANT_Q5_K_H
#define V4_QUANT_Q5_K_H

#include "q4_k.h"
#include "scalar.h"

struct v4_block_q5_k {
    uint8_t d[2];
    uint8_t dmin[2];
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
};

V4_INLINE void v4_q5_k_decode_i8(const struct v4_block_q5_k *b, int8_t *q, float *scale, float *min)
{
    const float d = v4_load_f16(b->d);
    const float dmin = v4_load_f16(b->dmin);
    for (int g = 0; g < 8; g++) {
        int s, m;
        v4_k_scale_min(b->scales, g, &s, &m);
        scale[g] = d * (float)s;
        min[g] = dmin * (float)m;
        for (int j = 0; j < 32; j++) {
            const int low = b->qs[g / 2 * 32 + j] >> (g % 2 * 4) & 15;
            q[32 * g + j] = (int8_t)(low | (b->qh[j] >> g & 1) << 4);
        }
    }
}

#endif
