/* The weight formats, one line each. Everything else derives from this list: the enum and
 * the tables of function pointers in v4.h, the plain kernels in portable.c, `Quant` in Rust.
 *
 * To add a format: write <name>.h beside this file, include it in blocks.h, add its line here.
 *
 *   NAME, name   as in V4_Q4_0 and v4_q4_0_decode_f32
 *   number       ggml's type number in a GGUF file; from V4_OWN_QUANTS on, ours for a format that
 *                GGUF does not have
 *   len, bytes   weights and bytes of a block
 *   group        weights that share a scale in decode_i8: 16 or 32; 0 for plain floats, which have
 *                no decode_i8
 *   min          1 when decode_i8 gives a minimum to subtract from each group
 */
#ifndef V4_QUANT_ALL_H
#define V4_QUANT_ALL_H

/*      NAME,    name,    number, len, bytes, group, min */
#define V4_FLOATS(V4_QUANT)                              \
    V4_QUANT(F32,     f32,      0,   1,   4,  0, 0)      \
    V4_QUANT(F16,     f16,      1,   1,   2,  0, 0)      \
    V4_QUANT(BF16,    bf16,    30,   1,   2,  0, 0)      \
    V4_QUANT(F8_E4M3, f8_e4m3, 60,   1,   1,  0, 0)

#define V4_BLOCKS(V4_QUANT)                              \
    V4_QUANT(Q4_0,    q4_0,     2,  32,  18, 32, 0)      \
    V4_QUANT(Q4_1,    q4_1,     3,  32,  20, 32, 1)      \
    V4_QUANT(Q5_0,    q5_0,     6,  32,  22, 32, 0)      \
    V4_QUANT(Q5_1,    q5_1,     7,  32,  24, 32, 1)      \
    V4_QUANT(Q8_0,    q8_0,     8,  32,  34, 32, 0)      \
    V4_QUANT(Q2_K,    q2_k,    10, 256,  84, 16, 1)      \
    V4_QUANT(Q3_K,    q3_k,    11, 256, 110, 16, 0)      \
    V4_QUANT(Q4_K,    q4_k,    12, 256, 144, 32, 1)      \
    V4_QUANT(Q5_K,    q5_k,    13, 256, 176, 32, 1)      \
    V4_QUANT(Q6_K,    q6_k,    14, 256, 210, 16, 0)      \
    V4_QUANT(IQ2_XXS, iq2_xxs, 16, 256,  66, 32, 0)      \
    V4_QUANT(IQ2_XS,  iq2_xs,  17, 256,  74, 16, 0)      \
    V4_QUANT(IQ3_XXS, iq3_xxs, 18, 256,  98, 32, 0)      \
    V4_QUANT(IQ1_S,   iq1_s,   19, 256,  50, 32, 0)      \
    V4_QUANT(IQ4_NL,  iq4_nl,  20,  32,  18, 32, 0)      \
    V4_QUANT(IQ3_S,   iq3_s,   21, 256, 110, 32, 0)      \
    V4_QUANT(IQ2_S,   iq2_s,   22, 256,  82, 16, 0)      \
    V4_QUANT(IQ4_XS,  iq4_xs,  23, 256, 136, 32, 0)      \
    V4_QUANT(IQ1_M,   iq1_m,   29, 256,  56, 16, 0)      \
    V4_QUANT(TQ1_0,   tq1_0,   34, 256,  54, 32, 0)      \
    V4_QUANT(TQ2_0,   tq2_0,   35, 256,  66, 32, 0)      \
    V4_QUANT(MXFP4,   mxfp4,   39,  32,  17, 32, 0)      \
    V4_QUANT(NVFP4,   nvfp4,   40,  64,  36, 16, 0)

#define V4_QUANTS(V4_QUANT) V4_FLOATS(V4_QUANT) V4_BLOCKS(V4_QUANT)

/* Numbers that no GGUF file may use. */
#define V4_OWN_QUANTS 60
/* One past the largest number of the list: the length of a table indexed by format. */
#define V4_N_QUANTS 61

#endif
