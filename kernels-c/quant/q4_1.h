/* Q4_1: 32 weights, d q + m. Byte j holds weight j low and weight j + 16 high. */
#ifndef V4_QUANT_Q4_1_H
#define V4_QUANT_Q4_1_H

#include "scalar.h"

struct v4_block_q4_1 {
    uint8_t d[2];
    uint8_t m[2];
    uint8_t qs[16];
};

V4_INLINE void v4_q4_1_decode_i8(const struct v4_block_q4_1 *b, int8_t *q, float *scale, float *min)
{
    for (int j = 0; j < 16; j++) {
        q[j] = (int8_t)(b->qs[j] & 15);
    }
    for (int j = 0; j < 16; j++) {
        q[j + 16] = (int8_t)(b->qs[j] >> 4);
    }
    *scale = v4_load_f16(b->d);
    *min = -v4_load_f16(b->m);
}

#endif
