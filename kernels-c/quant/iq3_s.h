/* IQ3_S: 256 weights in groups of 32, d (1 + 2 s) times grid values with signs. Nine bits of grid
 * number for four weights, one of them in qh, and a bit of sign a weight. */
#ifndef V4_QUANT_IQ3_S_H
#define V4_QUANT_IQ3_S_H

#include "iq_grids.h"
#include "scalar.h"

struct v4_block_iq3_s {
    uint8_t d[2];
    uint8_t qs[64];
    uint8_t qh[8];
    uint8_t signs[32];
    uint8_t scales[4];
};

V4_INLINE void v4_iq3_s_decode_i8(const struct v4_block_iq3_s *b, int8_t *q, float *scale,
                                  float *min)
{
    (void)min;
    const float d = v4_load_f16(b->d);
    for (int g = 0; g < 8; g++) {
        scale[g] = d * (float)(1 + 2 * (b->scales[g / 2] >> (g % 2 * 4) & 15));
    }
    for (int e = 0; e < 32; e++) {
        const unsigned qh = b->qh[e / 4] >> (e % 4 * 2);
        v4_iq3_s_values(v4_iq3_s_grid[b->qs[2 * e] | (qh & 1) << 8],
                        v4_iq3_s_grid[b->qs[2 * e + 1] | (qh >> 1 & 1) << 8], b->signs[e],
                        q + 8 * e);
    }
}

#endif
