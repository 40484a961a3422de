/* IQ4_NL: 32 weights, d times a table's value. Byte j holds weight j low and weight j + 16 high. */
#ifndef V4_QUANT_IQ4_NL_H
#define V4_QUANT_IQ4_NL_H

#include "scalar.h"

struct v4_block_iq4_nl {
    uint8_t d[2];
    uint8_t qs[16];
};

V4_TABLE int8_t v4_iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                     1,    13,   25,  38,  53,  69,  89,  113};

V4_INLINE void v4_iq4_nl_decode_i8(const struct v4_block_iq4_nl *b, int8_t *q, float *scale,
                                   float *min)
{
    (void)min;
    for (int j = 0; j < 16; j++) {
        q[j] = v4_iq4_values[b->qs[j] & 15];
        q[j + 16] = v4_iq4_values[b->qs[j] >> 4];
    }
    *scale = v4_load_f16(b->d);
}

#endif
