/* IQ2_XS: 256 weights in groups of 16, d (1/2 + s) / 4 times grid values with signs. 16 bits for
 * eight weights: nine of the grid number, seven signs. */
#ifndef V4_QUANT_IQ2_XS_H
#define V4_QUANT_IQ2_XS_H

#include "iq_grids.h"
#include "scalar.h"

struct v4_block_iq2_xs {
    uint8_t d[2];
    uint8_t qs[64];
    uint8_t scales[8];
};

V4_INLINE void v4_iq2_xs_decode_i8(const struct v4_block_iq2_xs *b, int8_t *q, float *scale,
                                   float *min)
{
    (void)min;
    const float d = v4_load_f16(b->d);
    for (int g = 0; g < 16; g++) {
        scale[g] = d * (0.5f + (float)(b->scales[g / 2] >> (g % 2 * 4) & 15)) * 0.25f;
    }
    for (int e = 0; e < 32; e++) {
        const unsigned code = v4_load_u16(b->qs + 2 * e);
        v4_iq2_values(v4_iq2_xs_grid[code & 511], v4_iq_signs(code >> 9), q + 8 * e);
    }
}

#endif
