/* IQ2_XXS: 256 weights in groups of 32, d (1/2 + s) / 4 times grid values with signs. A group is
 * four grid numbers, then 32 bits: four times seven signs, and s on top. */
#ifndef V4_QUANT_IQ2_XXS_H
#define V4_QUANT_IQ2_XXS_H

#include "iq_grids.h"
#include "scalar.h"

struct v4_block_iq2_xxs {
    uint8_t d[2];
    uint8_t qs[64];
};

V4_INLINE void v4_iq2_xxs_decode_i8(const struct v4_block_iq2_xxs *b, int8_t *q, float *scale,
                                    float *min)
{
    (void)min;
    const float d = v4_load_f16(b->d);
    for (int g = 0; g < 8; g++) {
        const uint32_t rest = v4_load_u32(b->qs + 8 * g + 4);
        scale[g] = d * (0.5f + (float)(rest >> 28)) * 0.25f;
        for (int l = 0; l < 4; l++) {
            v4_iq2_values(v4_iq2_xxs_grid[b->qs[8 * g + l]], v4_iq_signs(rest >> (7 * l) & 127),
                          q + 32 * g + 8 * l);
        }
    }
}

#endif
