/* Q4_K: 256 weights in groups of 32, d s q - dmin m. Groups 2k and 2k + 1 are the low and the high
 * halves of 32 bytes. Eight 6-bit s and m are packed in 12 bytes, see v4_k_scale_min. */
#ifndef V4_QUANT_Q4_K_H
#define V4_QUANT_Q4_K_H

#include "scalar.h"

struct v4_block_q4_k {
    uint8_t d[2];
    uint8_t dmin[2];
    uint8_t scales[12];
    uint8_t qs[128];
};

/* s and m of group g, also of Q5_K. Groups 0..3 lie in the lower six bits of bytes g and g + 4;
 * groups 4..7 have their lower four bits in byte g + 4 and the upper two atop of bytes g - 4, g. */
V4_INLINE void v4_k_scale_min(const uint8_t *scales, int g, int *s, int *m)
{
    if (g < 4) {
        *s = scales[g] & 63;
        *m = scales[g + 4] & 63;
    } else {
        *s = (scales[g + 4] & 15) | scales[g - 4] >> 6 << 4;
        *m = scales[g + 4] >> 4 | scales[g] >> 6 << 4;
    }
}

V4_INLINE void v4_q4_k_decode_i8(const struct v4_block_q4_k *b, int8_t *q, float *scale, float *min)
{
    const float d = v4_load_f16(b->d);
    const float dmin = v4_load_f16(b->dmin);
    for (int g = 0; g < 8; g++) {
        int s, m;
        v4_k_scale_min(b->scales, g, &s, &m);
        scale[g] = d * (float)s;
        min[g] = dmin * (float)m;
        for (int j = 0; j < 32; j++) {
            q[32 * g + j] = (int8_t)(b->qs[g / 2 * 32 + j] >> (g % 2 * 4) & 15);
        }
    }
}

#endif
