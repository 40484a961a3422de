/* IQ1_S: 256 weights in groups of 32, d (2 s + 1) (grid + or - 1/8), the grid's values -1, 0 and 1.
 * Here as integers: eighths. Eleven bits of grid number for eight weights; 16 bits of qh a group
 * have three of each of its four numbers, then s, then the sign of the eighth. */
#ifndef V4_QUANT_IQ1_S_H
#define V4_QUANT_IQ1_S_H

#include "iq_grids.h"
#include "scalar.h"

struct v4_block_iq1_s {
    uint8_t d[2];
    uint8_t qs[32];
    uint8_t qh[16];
};

V4_INLINE void v4_iq1_s_decode_i8(const struct v4_block_iq1_s *b, int8_t *q, float *scale,
                                  float *min)
{
    (void)min;
    const float d = v4_load_f16(b->d);
    for (int g = 0; g < 8; g++) {
        const unsigned qh = v4_load_u16(b->qh + 2 * g);
        scale[g] = d * (float)(2 * (qh >> 12 & 7) + 1) * 0.125f;
        for (int l = 0; l < 4; l++) {
            const unsigned high = qh >> (3 * l) & 7;
            v4_iq1_eighths(v4_iq1_grid[b->qs[4 * g + l] | high << 8], qh >> 15,
                           q + 32 * g + 8 * l);
        }
    }
}

#endif
