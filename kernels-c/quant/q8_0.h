/* Q8_0: 32 weights, d q. */
#ifndef V4_QUANT_Q8_0_H
#define V4_QUANT_Q8_0_H

#include "scalar.h"

struct v4_block_q8_0 {
    uint8_t d[2];
    int8_t qs[32];
};

V4_INLINE void v4_q8_0_decode_i8(const struct v4_block_q8_0 *b, int8_t *q, float *scale, float *min)
{
    (void)min;
    memcpy(q, b->qs, sizeof b->qs);
    *scale = v4_load_f16(b->d);
}

#endif
