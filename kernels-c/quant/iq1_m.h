/* IQ1_M: 256 weights in groups of 16, d (2 s + 1) (grid + or - 1/8) as in IQ1_S. A nibble of qh for
 * eight weights: three bits of the grid number and the sign of the eighth. Four 16-bit words each
 * have four 3-bit scales and, on top, four bits of d. */
#ifndef V4_QUANT_IQ1_M_H
#define V4_QUANT_IQ1_M_H

#include "iq_grids.h"
#include "scalar.h"

struct v4_block_iq1_m {
    uint8_t qs[32];
    uint8_t qh[16];
    uint8_t scales[8];
};

V4_INLINE void v4_iq1_m_decode_i8(const struct v4_block_iq1_m *b, int8_t *q, float *scale,
                                  float *min)
{
    (void)min;
    unsigned bits = 0;
    for (int k = 0; k < 4; k++) {
        bits |= (unsigned)(b->scales[2 * k + 1] >> 4) << (4 * k);
    }
    const float d = v4_f32_of_f16((uint16_t)bits);
    for (int g = 0; g < 16; g++) {
        const unsigned s = v4_load_u16(b->scales + g / 4 * 2) >> (g % 4 * 3) & 7;
        scale[g] = d * (float)(2 * s + 1) * 0.125f;
    }
    for (int e = 0; e < 32; e++) {
        const unsigned high = b->qh[e / 2] >> (e % 2 * 4);
        v4_iq1_eighths(v4_iq1_grid[b->qs[e] | (high & 7) << 8], high >> 3 & 1, q + 8 * e);
    }
}

#endif
