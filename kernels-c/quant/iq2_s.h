/* IQ2_S: 256 weights in groups of 16, d (1/2 + s) / 4 times grid values with signs. Ten bits of
 * grid number for eight weights, two of them in qh, and a byte of signs. */
#ifndef V4_QUANT_IQ2_S_H
#define V4_QUANT_IQ2_S_H

#include "iq_grids.h"
#include "scalar.h"

struct v4_block_iq2_s {
    uint8_t d[2];
    uint8_t qs[32];
    uint8_t signs[32];
    uint8_t qh[8];
    uint8_t scales[8];
};

V4_INLINE void v4_iq2_s_decode_i8(const struct v4_block_iq2_s *b, int8_t *q, float *scale,
                                  float *min)
{
    (void)min;
    const float d = v4_load_f16(b->d);
    for (int g = 0; g < 16; g++) {
        scale[g] = d * (0.5f + (float)(b->scales[g / 2] >> (g % 2 * 4) & 15)) * 0.25f;
    }
    for (int e = 0; e < 32; e++) {
        const unsigned high = b->qh[e / 4] >> (e % 4 * 2) & 3;
        v4_iq2_values(v4_iq2_s_grid[b->qs[e] | high << 8], b->signs[e], q + 8 * e);
    }
}

#endif
