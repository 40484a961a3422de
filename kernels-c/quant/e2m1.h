/* E2M1, the four-bit float of MXFP4 and NVFP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. The
 * table has the doubled values, which are integers; the scales below are halved to match. */
#ifndef V4_QUANT_E2M1_H
#define V4_QUANT_E2M1_H

#include "scalar.h"

V4_TABLE int8_t v4_e2m1_doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* E8M0, 2^(e - 127), halved. The two smallest are subnormal. 255 is no NaN in GGUF: it is 2^128,
 * which only its half can say. */
V4_INLINE float v4_half_of_e8m0(uint8_t e)
{
    return v4_float_of_bits(e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23);
}

/* E4M3 (4 exponent bits of bias 7, subnormal step 2^-9), halved; GGUF ignores the sign and reads
 * the NaN 0x7f as 0. */
V4_INLINE float v4_half_of_ue4m3(uint8_t b)
{
    const int exponent = b >> 3 & 15, mantissa = b & 7;
    if (b == 0x7f) {
        return 0;
    }
    if (exponent == 0) {
        return (float)mantissa * 0x1p-10f;
    }
    return v4_float_of_bits((uint32_t)(exponent - 7 - 1 + 127) << 23 | (uint32_t)mantissa << 20);
}

#endif
