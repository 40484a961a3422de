/* F32, F16, BF16 and F8_E4M3: a block is one number. */
#ifndef V4_QUANT_FLOATS_H
#define V4_QUANT_FLOATS_H

#include "scalar.h"

struct v4_block_f32 {
    uint8_t bits[4];
};

struct v4_block_f16 {
    uint8_t bits[2];
};

struct v4_block_bf16 {
    uint8_t bits[2];
};

struct v4_block_f8_e4m3 {
    uint8_t bits;
};

V4_INLINE void v4_f32_decode_f32(const struct v4_block_f32 *b, float *out)
{
    *out = v4_float_of_bits(v4_load_u32(b->bits));
}

V4_INLINE void v4_f16_decode_f32(const struct v4_block_f16 *b, float *out)
{
    *out = v4_load_f16(b->bits);
}

V4_INLINE void v4_bf16_decode_f32(const struct v4_block_bf16 *b, float *out)
{
    *out = v4_f32_of_bf16(v4_load_u16(b->bits));
}

V4_INLINE void v4_f8_e4m3_decode_f32(const struct v4_block_f8_e4m3 *b, float *out)
{
    *out = v4_f32_of_e4m3(b->bits);
}

#endif
