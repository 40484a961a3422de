/* NVFP4: 64 weights in groups of 16, e2m1 x e4m3. Byte j of a group's eight holds weight j low and
 * weight j + 8 high. The scale of the tensor is a tensor of its own, applied to the product. */
#ifndef V4_QUANT_NVFP4_H
#define V4_QUANT_NVFP4_H

#include "e2m1.h"

struct v4_block_nvfp4 {
    uint8_t d[4];
    uint8_t qs[32];
};

V4_INLINE void v4_nvfp4_decode_i8(const struct v4_block_nvfp4 *b, int8_t *q, float *scale,
                                  float *min)
{
    (void)min;
    for (int g = 0; g < 4; g++) {
        for (int j = 0; j < 8; j++) {
            q[16 * g + j] = v4_e2m1_doubled[b->qs[8 * g + j] & 15];
            q[16 * g + j + 8] = v4_e2m1_doubled[b->qs[8 * g + j] >> 4];
        }
        scale[g] = v4_half_of_ue4m3(b->d[g]);
    }
}

#endif
