/* The numbers that blocks are made of. Blocks are read where the file has them, at any address, so
 * everything wider than a byte is loaded from bytes. */
#ifndef V4_QUANT_SCALAR_H
#define V4_QUANT_SCALAR_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define V4_INLINE static __host__ __device__ __forceinline__
#define V4_TABLE static __device__ const
#else
#define V4_INLINE static inline __attribute__((unused))
#define V4_TABLE static const __attribute__((unused))
#endif

V4_INLINE uint16_t v4_load_u16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

V4_INLINE uint32_t v4_load_u32(const uint8_t *p)
{
    return (uint32_t)v4_load_u16(p) | (uint32_t)v4_load_u16(p + 2) << 16;
}

V4_INLINE float v4_float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

V4_INLINE uint32_t v4_bits_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* IEEE half precision: 1 sign, 5 exponent, 10 mantissa bits. Exact. */
V4_INLINE float v4_f32_of_f16(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t rest = h & 0x7fff;
    if (rest >= 0x7c00) { /* infinity, NaN */
        return v4_float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    }
    if (rest < 0x400) { /* zero, subnormal: a multiple of 2^-24 */
        const float x = (float)rest * 0x1p-24f;
        return v4_float_of_bits(sign | v4_bits_of_float(x));
    }
    return v4_float_of_bits(sign | ((rest << 13) + ((127 - 15) << 23)));
}

/* To half precision, to nearest, ties to even. */
V4_INLINE uint16_t v4_f16_of_f32(float x)
{
    const uint32_t bits = v4_bits_of_float(x);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) { /* NaN, kept quiet */
        return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    }
    if (rest >= 0x477ff000) { /* from 65520 on: infinity */
        return (uint16_t)(sign | 0x7c00);
    }
    if (rest < 0x38800000) { /* below 2^-14: the addition rounds to a multiple of 2^-24 */
        const float shifted = v4_float_of_bits(rest) + 0x1p-1f;
        return (uint16_t)(sign | (v4_bits_of_float(shifted) - 0x3f000000));
    }
    const uint32_t even = rest >> 13 & 1;
    return (uint16_t)(sign | (rest - ((127 - 15) << 23) + 0xfff + even) >> 13);
}

/* The upper half of a single. Exact. */
V4_INLINE float v4_f32_of_bf16(uint16_t b)
{
    return v4_float_of_bits((uint32_t)b << 16);
}

/* 1 sign, 4 exponent, 3 mantissa bits; no infinity, one NaN a sign (OCP 8-bit floating point, 2023,
 * table 1). Exact: the bits are a half's but for an exponent that is less by 8. */
V4_INLINE float v4_f32_of_e4m3(uint8_t b)
{
    const uint16_t sign = (uint16_t)((b & 0x80) << 8);
    const uint16_t rest = b & 0x7f;
    return rest == 0x7f ? v4_f32_of_f16(sign | 0x7e00)
                        : v4_f32_of_f16((uint16_t)(sign | rest << 7)) * 0x1p8f;
}

V4_INLINE float v4_load_f16(const uint8_t *p)
{
    return v4_f32_of_f16(v4_load_u16(p));
}

/* |x| as bits, which as whole numbers have the order of what they stand for: then infinity, then
 * NaN. So the largest tells of either at no cost. */
V4_INLINE int32_t v4_magnitude_bits(float x)
{
    return (int32_t)(v4_bits_of_float(x) & INT32_MAX);
}

/* The scale of a group of activations whose largest has these v4_magnitude_bits, and what to
 * multiply them with: 0 if all their q are 0. See `quantize` in v4.h. */
V4_INLINE float v4_act_scale(int32_t largest, float *d)
{
    const int32_t infinity = 0x7f800000;
    const float max = v4_float_of_bits((uint32_t)largest);
    const float inverse = 127 / max;
    *d = largest < infinity ? max / 127 : v4_float_of_bits(0x7fc00000);
    return largest < infinity && v4_magnitude_bits(inverse) < infinity ? inverse : 0;
}

#endif
