/* IQ4_XS: 256 weights in groups of 32, d (s - 32) times the table of IQ4_NL. Each group as a block
 * of IQ4_NL; of its 6-bit scale four bits lie in scales_l and two in scales_h. */
#ifndef V4_QUANT_IQ4_XS_H
#define V4_QUANT_IQ4_XS_H

#include "iq4_nl.h"
#include "scalar.h"

struct v4_block_iq4_xs {
    uint8_t d[2];
    uint8_t scales_h[2];
    uint8_t scales_l[4];
    uint8_t qs[128];
};

V4_INLINE void v4_iq4_xs_decode_i8(const struct v4_block_iq4_xs *b, int8_t *q, float *scale,
                                   float *min)
{
    (void)min;
    const float d = v4_load_f16(b->d);
    const int scales_h = v4_load_u16(b->scales_h);
    for (int g = 0; g < 8; g++) {
        const int low = b->scales_l[g / 2] >> (g % 2 * 4) & 15;
        const int high = scales_h >> (2 * g) & 3;
        scale[g] = d * (float)((low | high << 4) - 32);
        for (int j = 0; j < 16; j++) {
            q[32 * g + j] = v4_iq4_values[b->qs[16 * g + j] & 15];
            q[32 * g + j + 16] = v4_iq4_values[b->qs[16 * g + j] >> 4];
        }
    }
}

#endif
