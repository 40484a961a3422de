/* AVX2 with vpdpbusd, for processors that have it without AVX-512. */
#include <immintrin.h>

#define HAS_DPBUSD 1
#define WIDE_OFFSET 128
#include "ymm_products.h"

const struct v4_isa v4_isa_avxvnni = {
    .name = "avxvnni",
#define V4_QUANT(NAME, name, number, ...) [number] = gemv_##name,
    .gemv = {V4_BLOCKS(V4_QUANT)},
#undef V4_QUANT
#define V4_QUANT(NAME, name, number, ...) [number] = panel_##name,
    .panel = {V4_BLOCKS(V4_QUANT)},
#undef V4_QUANT
    .panel_bytes = panel_bytes,
    .gemm_i8 = gemm_i8,
};
