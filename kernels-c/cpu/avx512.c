/* AVX-512 with VNNI: F, BW, VL, DQ.
 *
 * Products of blocks are held to the rounding that v4.h lays down, so their bits are those of
 * portable.c. vpdpbusd multiplies unsigned bytes by signed ones: weights are made unsigned by
 * adding the format's offset, and offset x (sum of the activations) is taken off again as an
 * integer. */
#include <math.h>
#include <string.h>

#include "../include/v4.h"
#include "avx512_formats.h"

#define ROLLED _Pragma("GCC unroll 1")

/* The first `n` of sixteen elements. */
ALWAYS_INLINE __mmask16 first_lanes(size_t n)
{
    return (__mmask16)(n < LANES ? (1u << n) - 1 : 0xffff);
}

/* 1.5 x 2^23: beside it, in single precision, neighbours differ by 1. So an integer below 2^22 in
 * magnitude, added to its bits, makes the float MAGIC plus that integer. Sums of products start
 * there and need no conversion: fma(MAGIC + dot, scale, -MAGIC x scale) is dot x scale, rounded
 * once. */
#define MAGIC 12582912.0f
/* From this scale on the product with MAGIC may be infinite. Only MXFP4 has such scales. */
#define WIDE_SCALE 0x1p104f

ALWAYS_INLINE __m512i magic_bits(void)
{
    return _mm512_castps_si512(_mm512_set1_ps(MAGIC));
}

/* What takes MAGIC times a scale off again. */
ALWAYS_INLINE __m512 magic_back(__m512 scale)
{
    return _mm512_mul_ps(_mm512_set1_ps(-MAGIC), scale);
}

/* Which scales are beyond WIDE_SCALE, in formats that may have such. */
ALWAYS_INLINE __mmask16 find_wide(__m512 scale, int wide)
{
    return wide ? _mm512_cmp_ps_mask(scale, _mm512_set1_ps(WIDE_SCALE), _CMP_GE_OQ) : 0;
}

/* dot x scale of a sum of products that started at MAGIC. */
ALWAYS_INLINE __m512 scaled(__m512i dot, __m512 scale, __m512 back, __mmask16 wide)
{
    const __m512 real = _mm512_castsi512_ps(dot);
    const __m512 v = _mm512_fmadd_ps(real, scale, back);
    if (__builtin_expect(wide, 0)) {
        return _mm512_mask_mul_ps(v, wide, _mm512_sub_ps(real, _mm512_set1_ps(MAGIC)), scale);
    }
    return v;
}

/* ---- blocks, sixteen rows at a time ---------------------------------------------------------- */

/* Sixteen rows of a matrix, of which the last ones may not exist. */
struct rows {
    const uint8_t *start;
    size_t stride; /* bytes from a row to the next */
    size_t n;      /* how many there are */
};

/* The bytes of a chunk: at most eight blocks of Q8_0. */
enum { CHUNK_BYTES = 8 * 34 };

/* What is needed to walk through the chunks of sixteen rows. */
struct walk {
    struct scattered scattered[2];
    struct room room;
    uint8_t padded[LANES][CHUNK_BYTES];
};

/* A chunk: where its first row is, how far apart rows are, its groups; and those of the chunk after
 * it whose scattered numbers are still to be copied. */
struct chunk {
    const uint8_t *at;
    size_t stride;
    int groups;
    size_t groups_later;
    const struct scattered *scattered;
    struct scattered *later;
};

ALWAYS_INLINE int chunk_groups(size_t groups, size_t first)
{
    return groups - first < CHUNK_GROUPS ? (int)(groups - first) : CHUNK_GROUPS;
}

/* Rows that do not exist are read as the last one. */
static __attribute__((noinline)) void pad_rows(const struct rows *rows, size_t at, size_t bytes,
                                               uint8_t padded[LANES][CHUNK_BYTES])
{
    for (size_t r = 0; r < LANES; r++) {
        const size_t from = r < rows->n ? r : rows->n - 1;
        memcpy(padded[r], rows->start + from * rows->stride + at, bytes);
    }
}

/* Copies what lies scattered in a chunk of n groups. */
ALWAYS_INLINE void scatter_all(const uint8_t *at, size_t stride, int n, struct format f,
                               struct scattered *to)
{
    for (int b = 0; b < n / f.block_groups; b++) {
        f.scatter(at, stride, b, to);
    }
}

/* Before the first chunk of sixteen rows is opened. */
ALWAYS_INLINE void start_walk(const struct rows *rows, size_t groups, struct format f,
                              struct walk *walk)
{
    if (rows->n == LANES) {
        scatter_all(rows->start, rows->stride, chunk_groups(groups, 0), f, &walk->scattered[0]);
    }
}

/* Opens the chunk of the groups from `first`, of all `groups`. */
ALWAYS_INLINE struct chunk open_chunk(const struct rows *rows, size_t groups, size_t first,
                                      struct format f, struct walk *walk)
{
    const size_t block_groups = (size_t)f.block_groups, block_bytes = (size_t)f.block_bytes;
    const size_t index = first / CHUNK_GROUPS % 2;
    struct scattered *const now = &walk->scattered[index];
    const int n = chunk_groups(groups, first);
    struct chunk c = {rows->start + first / block_groups * block_bytes,
                      rows->stride, n, 0, now, &walk->scattered[1 - index]};
    if (rows->n < LANES) {
        const size_t bytes = (size_t)n / block_groups * block_bytes;
        pad_rows(rows, first / block_groups * block_bytes, bytes, walk->padded);
        c.at = walk->padded[0];
        c.stride = CHUNK_BYTES;
        scatter_all(c.at, c.stride, n, f, now);
    } else if (groups - first > CHUNK_GROUPS) {
        c.groups_later = (size_t)chunk_groups(groups, first + CHUNK_GROUPS);
    }
    f.scales(c.at, c.stride, n, now, &walk->room);
    return c;
}

/* Copies what lies scattered in a unit of the chunk after c. A chunk ahead, since a vector that is
 * loaded right after its elements were stored waits; a unit at a time, so that loads and stores go
 * beside the arithmetic. */
ALWAYS_INLINE void scatter_later(const struct chunk *c, int unit, struct format f)
{
    const int g = f.unit * unit;
    if (g % f.block_groups == 0 && (size_t)g < c->groups_later) {
        const size_t bytes = (size_t)(CHUNK_GROUPS / f.block_groups * f.block_bytes);
        f.scatter(c->at + bytes, c->stride, g / f.block_groups, c->later);
    }
}

/* ---- products straight from blocks ----------------------------------------------------------- */

/* Where the sums of a token's products with a chunk start, MAGIC's bits minus offset x (the sum
 * of the activations), and those sums as floats: [group][pair], without gaps. */
struct sums {
    _Alignas(64) int32_t start[2 * CHUNK_GROUPS];
    _Alignas(64) float real[2 * CHUNK_GROUPS];
};

ALWAYS_INLINE void find_sums(const int16_t *sum, int groups, struct format f, struct sums *to)
{
    const __mmask16 mask = first_lanes(2 * (size_t)groups);
    const __m256i sixteen = _mm256_maskz_loadu_epi16(mask, sum);
    __m512i v = _mm512_cvtepi16_epi32(sixteen);
    if (!f.pairs) {
        v = _mm512_castsi256_si512(_mm256_madd_epi16(sixteen, _mm256_set1_epi16(1)));
    }
    if (f.mins) {
        _mm512_store_ps(to->real, _mm512_cvtepi32_ps(v));
    } else {
        const __m512i less = _mm512_mullo_epi32(v, _mm512_set1_epi32(f.offset));
        _mm512_store_si512(to->start, _mm512_sub_epi32(magic_bits(), less));
    }
}

/* The tokens of a tile: activations and scales of each. */
struct token {
    const int8_t *q;
    const float *d;
    const int16_t *sum;
};

/* dot plus the products of each element's four codes with the four activations. Where `fused`, the
 * multiplication fetches those itself; the compiler always has an instruction of its own for it. */
ALWAYS_INLINE __m512i multiply_four(__m512i dot, __m512i codes, const int8_t *four, int fused)
{
    if (!fused) {
        int32_t word;
        memcpy(&word, four, sizeof word);
        return _mm512_dpbusd_epi32(dot, codes, _mm512_set1_epi32(word));
    }
    __asm__("vpdpbusd %2%{1to16%}, %1, %0"
            : "+v"(dot)
            : "v"(codes), "m"(*(const int8_t(*)[4])(const void *)four));
    return dot;
}

/* Adds the products of a scale group, pair p of group k of the unit, with n tokens. Of few tokens a
 * second sum takes half, since each product waits for the one before it. */
ALWAYS_INLINE void multiply_codes(const __m512i raw[RAW_VECTORS], int k, int p,
                                  const struct token *tokens, size_t group, int n, struct format f,
                                  __m512i *dot)
{
    const int halves = n <= 2 && !f.pairs, fused = n > 1 && !f.pairs;
    const int n_codes = f.pairs ? CODE_VECTORS / 2 : CODE_VECTORS;
    __m512i second[V4_GEMV_TOKENS];
    UNROLL
    for (int i = 0; i < n_codes; i++) {
        const int j = i + 4 * p;
        const __m512i codes = f.code(raw, k, j);
        UNROLL
        for (int t = 0; t < n; t++) {
            const int8_t *four = tokens[t].q + V4_ACT_GROUP * group + 4 * (size_t)j;
            if (halves && i >= CODE_VECTORS / 2) {
                const __m512i sum = i > CODE_VECTORS / 2 ? second[t] : _mm512_setzero_si512();
                second[t] = multiply_four(sum, codes, four, fused);
            } else {
                dot[t] = multiply_four(dot[t], codes, four, fused);
            }
        }
    }
    UNROLL
    for (int t = 0; halves && t < n; t++) {
        dot[t] = _mm512_add_epi32(dot[t], second[t]);
    }
}

/* Group g of a chunk, which is group k of a unit, with n tokens. */
ALWAYS_INLINE void multiply_group(const __m512i raw[RAW_VECTORS], const struct scales *scales,
                                  const struct token *tokens, const struct sums *sums, size_t first,
                                  int g, int k, int n, struct format f, __m512 *acc)
{
    const size_t group = first + (size_t)g;
    UNROLL
    for (int p = 0; p <= f.pairs; p++) {
        const int at = g * (1 + f.pairs) + p;
        __m512i dot[V4_GEMV_TOKENS];
        UNROLL
        for (int t = 0; t < n; t++) {
            dot[t] = f.mins ? magic_bits() : _mm512_set1_epi32(sums[t].start[at]);
        }
        multiply_codes(raw, k, p, tokens, group, n, f, dot);
        const __m512 scale = _mm512_load_ps(scales->scale[g][p]), back = magic_back(scale);
        const __mmask16 wide = find_wide(scale, f.wide);
        UNROLL
        for (int t = 0; t < n; t++) {
            __m512 v = scaled(dot[t], scale, back, wide);
            if (f.mins) {
                const __m512 sum = _mm512_set1_ps(sums[t].real[at]);
                v = _mm512_fnmadd_ps(_mm512_load_ps(scales->min[g][p]), sum, v);
            }
            acc[t] = _mm512_fmadd_ps(v, _mm512_set1_ps(tokens[t].d[group]), acc[t]);
        }
    }
}

/* How far ahead of its use a chunk is fetched, in chunks: far enough for memory, near enough that
 * it is still in the second cache. */
enum { FETCH_AHEAD = 3, LINE = 64 };

/* Sixteen rows that are read side by side are more streams than the processor foresees well. So the
 * chunk that comes FETCH_AHEAD after the one of the groups from `first` is fetched, where a row
 * ends in the next sixteen rows; beyond the matrix lies what is likely used next, and to fetch what
 * does not exist does no harm. Gives where its first row is. */
ALWAYS_INLINE const uint8_t *find_ahead(const struct rows *rows, size_t groups, size_t first,
                                        struct format f)
{
    const size_t chunks = (groups + CHUNK_GROUPS - 1) / CHUNK_GROUPS;
    const size_t chunk_bytes = (size_t)(CHUNK_GROUPS / f.block_groups * f.block_bytes);
    const uint8_t *start = rows->start;
    size_t chunk = first / CHUNK_GROUPS + FETCH_AHEAD;
    for (; chunk >= chunks; chunk -= chunks) {
        start += LANES * rows->stride;
    }
    return start + chunk * chunk_bytes;
}

/* Fetches `bytes` bytes of n rows; gives the row after them. */
ALWAYS_INLINE const uint8_t *fetch(const uint8_t *from, size_t stride, int n, size_t bytes)
{
    for (int r = 0; r < n; r++, from += stride) {
        for (size_t i = 0; i < bytes; i += LINE) {
            _mm_prefetch((const char *)from + i, _MM_HINT_T1);
        }
    }
    return from;
}

/* Sixteen rows with the tokens of x, as if they were n. */
ALWAYS_INLINE void gemv_tile(const struct rows *rows, const struct v4_act *x, int n,
                             struct format f, float *out, size_t out_stride)
{
    const size_t groups = x->cols / V4_ACT_GROUP;
    struct walk walk;
    struct token tokens[V4_GEMV_TOKENS];
    __m512 acc[V4_GEMV_TOKENS];
    UNROLL
    for (int t = 0; t < n; t++) {
        const size_t token = (size_t)t < x->n_tokens ? (size_t)t : x->n_tokens - 1;
        tokens[t] = (struct token){x->q + token * x->cols, x->d + token * groups,
                                   x->sum + token * (x->cols / V4_SUM_GROUP)};
        acc[t] = _mm512_setzero_ps();
    }
    start_walk(rows, groups, f, &walk);
    ROLLED
    for (size_t first = 0; first < groups; first += CHUNK_GROUPS) {
        struct sums sums[V4_GEMV_TOKENS];
        const struct chunk c = open_chunk(rows, groups, first, f, &walk);
        const uint8_t *ahead = find_ahead(rows, groups, first, f);
        UNROLL
        for (int t = 0; t < n; t++) {
            find_sums(tokens[t].sum + 2 * first, c.groups, f, &sums[t]);
        }
        ROLLED
        for (int unit = 0; unit < c.groups / f.unit; unit++) {
            __m512i raw[RAW_VECTORS];
            ahead = fetch(ahead, rows->stride, LANES * f.unit / CHUNK_GROUPS,
                          (size_t)(CHUNK_GROUPS / f.block_groups * f.block_bytes));
            f.raw(c.at, c.stride, unit, c.scattered, &walk.room, raw);
            scatter_later(&c, unit, f);
            UNROLL
            for (int k = 0; k < f.unit; k++) {
                multiply_group(raw, &walk.room.scales, tokens, sums, first, f.unit * unit + k, k, n,
                               f, acc);
            }
        }
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        if ((size_t)t < x->n_tokens) {
            _mm512_mask_storeu_ps(out + (size_t)t * out_stride, first_lanes(rows->n), acc[t]);
        }
    }
}

ALWAYS_INLINE void gemv_blocks(const void *w, size_t row_bytes, size_t n_rows,
                               const struct v4_act *x, float *out, size_t out_stride,
                               struct format f)
{
    for (size_t r = 0; r < n_rows; r += LANES) {
        const size_t left = n_rows - r;
        const uint8_t *from = (const uint8_t *)w + r * row_bytes;
        const struct rows rows = {from, row_bytes, left < LANES ? left : LANES};
        if (x->n_tokens > 4) {
            gemv_tile(&rows, x, 8, f, out + r, out_stride);
        } else if (x->n_tokens > 2) {
            gemv_tile(&rows, x, 4, f, out + r, out_stride);
        } else if (x->n_tokens == 2) {
            gemv_tile(&rows, x, 2, f, out + r, out_stride);
        } else {
            gemv_tile(&rows, x, 1, f, out + r, out_stride);
        }
    }
}

/* ---- panels ---------------------------------------------------------------------------------- */

/* A panel is 32 rows, a group of 32 weights after another: eight times (for four weights each) 16
 * rows and 16 rows of four bytes, then scales, what takes MAGIC off again, and minima, each
 * [pair][32 rows]. Four bytes are what vpdpbusd adds up; a row is an element of the vector. */
enum { PANEL_HALVES = V4_PANEL_ROWS / LANES };

struct panel_group {
    uint8_t *codes; /* [8][PANEL_HALVES][64] */
    float *scale;   /* [pairs + 1][V4_PANEL_ROWS] */
    float *back;    /* the same: -MAGIC x scale */
    float *min;     /* the same */
};

ALWAYS_INLINE size_t panel_group_bytes(int pairs, int mins)
{
    return V4_PANEL_ROWS *
           (V4_ACT_GROUP + sizeof(float) * (size_t)((1 + pairs) * (2 + mins)));
}

ALWAYS_INLINE struct panel_group panel_group(const void *panel, size_t g, int pairs, int mins)
{
    uint8_t *codes = (uint8_t *)(uintptr_t)panel + g * panel_group_bytes(pairs, mins);
    float *scale = (float *)(void *)(codes + V4_PANEL_ROWS * V4_ACT_GROUP);
    float *back = scale + (1 + pairs) * V4_PANEL_ROWS;
    return (struct panel_group){codes, scale, back, back + (1 + pairs) * V4_PANEL_ROWS};
}

/* Group k of a unit to half `h` of a panel's group. */
ALWAYS_INLINE void pack_group(const __m512i raw[RAW_VECTORS], const struct scales *scales, int g,
                              int k, size_t h, struct format f, struct panel_group to)
{
    UNROLL
    for (int j = 0; j < CODE_VECTORS; j++) {
        _mm512_store_si512(to.codes + 64 * ((size_t)j * PANEL_HALVES + h), f.code(raw, k, j));
    }
    UNROLL
    for (int p = 0; p <= f.pairs; p++) {
        const size_t at = (size_t)p * V4_PANEL_ROWS + h * LANES;
        const __m512 scale = _mm512_load_ps(scales->scale[g][p]);
        _mm512_store_ps(to.scale + at, scale);
        _mm512_store_ps(to.back + at, magic_back(scale));
        if (f.mins) {
            _mm512_store_ps(to.min + at, _mm512_load_ps(scales->min[g][p]));
        }
    }
}

ALWAYS_INLINE void panel_blocks(const void *w, size_t row_bytes, size_t n_rows, size_t cols,
                                void *panel, struct format f)
{
    const size_t groups = cols / V4_ACT_GROUP;
    struct walk walk;
    ROLLED
    for (size_t h = 0; h < PANEL_HALVES; h++) {
        /* A half without rows repeats the last one; gemm_i8 does not write what it gives. */
        const size_t first_row = h * LANES < n_rows ? h * LANES : n_rows - 1;
        const size_t left = n_rows - first_row;
        const struct rows rows = {(const uint8_t *)w + first_row * row_bytes, row_bytes,
                                  left < LANES ? left : LANES};
        start_walk(&rows, groups, f, &walk);
        ROLLED
        for (size_t first = 0; first < groups; first += CHUNK_GROUPS) {
            const struct chunk c = open_chunk(&rows, groups, first, f, &walk);
            ROLLED
            for (int unit = 0; unit < c.groups / f.unit; unit++) {
                __m512i raw[RAW_VECTORS];
                f.raw(c.at, c.stride, unit, c.scattered, &walk.room, raw);
                scatter_later(&c, unit, f);
                UNROLL
                for (int k = 0; k < f.unit; k++) {
                    const int g = f.unit * unit + k;
                    pack_group(raw, &walk.room.scales, g, k, h, f,
                               panel_group(panel, first + (size_t)g, f.pairs, f.mins));
                }
            }
        }
    }
}

/* ---- the formats ----------------------------------------------------------------------------- */

/* Formats with a way of their own: groups of a unit, offset. */
#define FAST_FORMATS(FORMAT)    \
    FORMAT(Q4_0, q4_0, 1, 8)    \
    FORMAT(Q4_1, q4_1, 1, 0)    \
    FORMAT(Q5_0, q5_0, 1, 16)   \
    FORMAT(Q5_1, q5_1, 1, 0)    \
    FORMAT(Q8_0, q8_0, 1, 128)  \
    FORMAT(IQ4_NL, iq4_nl, 1, 128) \
    FORMAT(MXFP4, mxfp4, 1, 12) \
    FORMAT(NVFP4, nvfp4, 1, 12) \
    FORMAT(Q2_K, q2_k, 4, 0)    \
    FORMAT(Q3_K, q3_k, 4, 4)    \
    FORMAT(Q4_K, q4_k, 2, 0)    \
    FORMAT(Q5_K, q5_k, 2, 0)    \
    FORMAT(Q6_K, q6_k, 4, 32)   \
    FORMAT(IQ4_XS, iq4_xs, 1, 128)

/* The rest goes through decode_i8. All have blocks of 256. */
#define SLOW_FORMATS(FORMAT) \
    FORMAT(IQ2_XXS, iq2_xxs) \
    FORMAT(IQ2_XS, iq2_xs)   \
    FORMAT(IQ2_S, iq2_s)     \
    FORMAT(IQ3_XXS, iq3_xxs) \
    FORMAT(IQ3_S, iq3_s)     \
    FORMAT(IQ1_S, iq1_s)     \
    FORMAT(IQ1_M, iq1_m)     \
    FORMAT(TQ1_0, tq1_0)     \
    FORMAT(TQ2_0, tq2_0)

enum { SLOW_OFFSET = 128 };

/* Sizes, groups of 16, and minima, by quant/all.h. */
#define V4_QUANT(NAME, name, number, len, bytes, group, has_min) \
    enum {                                                       \
        NAME##_PAIRS = (group) == 16,                            \
        NAME##_MINS = has_min,                                   \
        NAME##_BYTES = bytes,                                    \
        NAME##_GROUPS = (len) / V4_ACT_GROUP                     \
    };
V4_BLOCKS(V4_QUANT)
#undef V4_QUANT

#define SLOW_SCALES(NAME, name) DECODED(name, NAME##_PAIRS ? 16 : 32)
SLOW_FORMATS(SLOW_SCALES)

/* All of them share one copy of the loops for groups of 16 and one for groups of 32. */
#define SLOW_LOOPS(name, pairs)                                                                   \
    static __attribute__((noinline)) void gemv_##name(scales_fn *scales, int bytes,               \
                                                      const void *w, size_t row_bytes,            \
                                                      size_t rows, const struct v4_act *x,        \
                                                      float *out, size_t out_stride)              \
    {                                                                                             \
        const struct format f = {no_scatter,  scales, decoded_raw, q8_0_code,   CHUNK_GROUPS,     \
                                 bytes,       1,      SLOW_OFFSET, pairs,       0,                \
                                 0};                                                              \
        gemv_blocks(w, row_bytes, rows, x, out, out_stride, f);                                   \
    }                                                                                             \
    static __attribute__((noinline)) void panel_##name(scales_fn *scales, int bytes,              \
                                                       const void *w, size_t row_bytes,           \
                                                       size_t rows, size_t cols, void *panel)     \
    {                                                                                             \
        const struct format f = {no_scatter,  scales, decoded_raw, q8_0_code,   CHUNK_GROUPS,     \
                                 bytes,       1,      SLOW_OFFSET, pairs,       0,                \
                                 0};                                                              \
        panel_blocks(w, row_bytes, rows, cols, panel, f);                                         \
    }
SLOW_LOOPS(slow16, 1)
SLOW_LOOPS(slow32, 0)

#define SLOTS(NAME, name, unit, offset)                                                           \
    static const struct format format_##name = {                                                  \
        name##_scatter, name##_scales, name##_raw, name##_code,  NAME##_GROUPS,                   \
        NAME##_BYTES,   unit,          offset,     NAME##_PAIRS, NAME##_MINS,                     \
        V4_##NAME == V4_MXFP4};                                                                   \
    static void gemv_##name(const void *w, size_t row_bytes, size_t rows, const struct v4_act *x, \
                            float *out, size_t out_stride)                                        \
    {                                                                                             \
        gemv_blocks(w, row_bytes, rows, x, out, out_stride, format_##name);                       \
    }                                                                                             \
    static void panel_##name(const void *w, size_t row_bytes, size_t rows, size_t cols,           \
                             void *panel)                                                         \
    {                                                                                             \
        panel_blocks(w, row_bytes, rows, cols, panel, format_##name);                             \
    }
#define SLOW_SLOTS(NAME, name)                                                                    \
    static void gemv_##name(const void *w, size_t row_bytes, size_t rows, const struct v4_act *x, \
                            float *out, size_t out_stride)                                        \
    {                                                                                             \
        (NAME##_PAIRS ? gemv_slow16 : gemv_slow32)(name##_scales, NAME##_BYTES, w, row_bytes,     \
                                                   rows, x, out, out_stride);                     \
    }                                                                                             \
    static void panel_##name(const void *w, size_t row_bytes, size_t rows, size_t cols,           \
                             void *panel)                                                         \
    {                                                                                             \
        (NAME##_PAIRS ? panel_slow16 : panel_slow32)(name##_scales, NAME##_BYTES, w, row_bytes,   \
                                                     rows, cols, panel);                          \
    }
FAST_FORMATS(SLOTS)
SLOW_FORMATS(SLOW_SLOTS)

static size_t panel_bytes(uint32_t quant, size_t cols)
{
    const struct v4_quant_info *info = v4_quant_describe(quant);
    return cols / V4_ACT_GROUP * panel_group_bytes(info->group == 16, (int)info->has_min);
}

static int offset_of(uint32_t quant)
{
    switch (quant) {
#define OFFSET(NAME, name, unit, offset) \
    case V4_##NAME:                              \
        return offset;
        FAST_FORMATS(OFFSET)
#undef OFFSET
    default:
        return SLOW_OFFSET;
    }
}

/* ---- products with a panel ------------------------------------------------------------------- */

/* Tokens of a tile: two vectors of rows and this many tokens keep all sums in registers. */
enum { TILE_TOKENS = 6, BLOCK_GROUPS = 64 };

/* Where the sums of a tile's tokens start, or for formats with minima the sums of the activations
 * as floats: [token][group][pair]. */
typedef int32_t corrections[TILE_TOKENS][BLOCK_GROUPS * 2] __attribute__((aligned(V4_ALIGN)));

/* Sixteen of them, of the sums from `sum`, of which only those of `mask` exist. */
ALWAYS_INLINE __m512i sixteen_corrections(const int16_t *sum, __mmask16 mask, int offset, int pairs,
                                          int mins)
{
    const int factor = mins ? 1 : -offset;
    __m512i v;
    if (pairs) {
        v = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(mask, sum));
        v = _mm512_madd_epi16(v, _mm512_set1_epi32(factor & 0xffff));
    } else {
        v = _mm512_madd_epi16(_mm512_maskz_loadu_epi32(mask, sum),
                              _mm512_set1_epi16((short)factor));
    }
    return mins ? _mm512_castps_si512(_mm512_cvtepi32_ps(v)) : _mm512_add_epi32(v, magic_bits());
}

ALWAYS_INLINE void find_corrections(const struct v4_act *x, size_t first, int n, size_t g0,
                                    size_t groups, int offset, int pairs, int mins, corrections out)
{
    const size_t sums = x->cols / V4_SUM_GROUP, count = groups * (size_t)(1 + pairs);
    ROLLED
    for (size_t i = 0; i < count; i += LANES) {
        const int16_t *sum = x->sum + first * sums + 2 * g0 + (pairs ? i : 2 * i);
        const __mmask16 mask = first_lanes(count - i);
        UNROLL
        for (int t = 0; t < n; t++) {
            const __m512i v =
                sixteen_corrections(sum + (size_t)t * sums, mask, offset, pairs, mins);
            _mm512_store_si512(out[t] + i, v);
        }
    }
}

/* Four vectors of bytes from j of a group with n tokens: the dot products of a scale group. */
ALWAYS_INLINE void panel_dots(const uint8_t *codes, const int8_t *q, size_t stride, int n, int from,
                              int to, __m512i dot[PANEL_HALVES][TILE_TOKENS])
{
    UNROLL
    for (int j = from; j < to; j++) {
        const __m512i w0 = _mm512_load_si512(codes + 64 * (PANEL_HALVES * j));
        const __m512i w1 = _mm512_load_si512(codes + 64 * (PANEL_HALVES * j + 1));
        UNROLL
        for (int t = 0; t < n; t++) {
            int32_t four;
            memcpy(&four, q + (size_t)t * stride + 4 * j, sizeof four);
            const __m512i a = _mm512_set1_epi32(four);
            dot[0][t] = _mm512_dpbusd_epi32(dot[0][t], w0, a);
            dot[1][t] = _mm512_dpbusd_epi32(dot[1][t], w1, a);
        }
    }
}

/* A group of 32 rows with n tokens. */
ALWAYS_INLINE void panel_group_product(struct panel_group w, const int8_t *q, size_t stride,
                                       const float *d, size_t d_stride, int n, int pairs, int mins,
                                       int wide, corrections correction, size_t g,
                                       __m512 acc[PANEL_HALVES][TILE_TOKENS])
{
    UNROLL
    for (int p = 0; p <= pairs; p++) {
        const size_t at = g * (size_t)(1 + pairs) + (size_t)p;
        __m512i dot[PANEL_HALVES][TILE_TOKENS];
        UNROLL
        for (int t = 0; t < n; t++) {
            dot[0][t] = mins ? magic_bits() : _mm512_set1_epi32(correction[t][at]);
            dot[1][t] = dot[0][t];
        }
        panel_dots(w.codes, q, stride, n, pairs ? 4 * p : 0, pairs ? 4 * p + 4 : 8, dot);
        UNROLL
        for (int h = 0; h < PANEL_HALVES; h++) {
            const int row = p * V4_PANEL_ROWS + h * LANES;
            const __m512 scale = _mm512_load_ps(w.scale + row);
            const __m512 back = _mm512_load_ps(w.back + row);
            const __mmask16 is_wide = find_wide(scale, wide);
            UNROLL
            for (int t = 0; t < n; t++) {
                __m512 v = scaled(dot[h][t], scale, back, is_wide);
                if (mins) {
                    float sum;
                    memcpy(&sum, &correction[t][at], sizeof sum);
                    v = _mm512_fnmadd_ps(_mm512_load_ps(w.min + row), _mm512_set1_ps(sum), v);
                }
                acc[h][t] = _mm512_fmadd_ps(v, _mm512_set1_ps(d[(size_t)t * d_stride]), acc[h][t]);
            }
        }
    }
}

/* 32 rows with n tokens. */
ALWAYS_INLINE void panel_tile(const void *panel, size_t rows, const struct v4_act *x, size_t first,
                              int n, int offset, int pairs, int mins, int wide, float *out,
                              size_t out_stride)
{
    const size_t groups = x->cols / V4_ACT_GROUP;
    __m512 acc[PANEL_HALVES][TILE_TOKENS];
    UNROLL
    for (int t = 0; t < n; t++) {
        acc[0][t] = _mm512_setzero_ps();
        acc[1][t] = _mm512_setzero_ps();
    }
    for (size_t block = 0; block < groups; block += BLOCK_GROUPS) {
        const size_t in_block = groups - block < BLOCK_GROUPS ? groups - block : BLOCK_GROUPS;
        corrections correction;
        find_corrections(x, first, n, block, in_block, offset, pairs, mins, correction);
        for (size_t g = 0; g < in_block; g++) {
            const int8_t *q = x->q + first * x->cols + (block + g) * V4_ACT_GROUP;
            if (g % 2 == 0) {
                /* What the next tile reads: a panel has too few rows to hide a third cache. */
                UNROLL
                for (int t = 0; t < n; t++) {
                    _mm_prefetch((const char *)(q + (size_t)(n + t) * x->cols), _MM_HINT_T1);
                }
            }
            const float *d = x->d + first * groups + block + g;
            panel_group_product(panel_group(panel, block + g, pairs, mins), q, x->cols, d, groups,
                                n, pairs, mins, wide, correction, g, acc);
        }
    }
    UNROLL
    for (int h = 0; h < PANEL_HALVES; h++) {
        const size_t done = (size_t)(h * LANES);
        const size_t left = rows > done ? rows - done : 0;
        const __mmask16 mask = (__mmask16)(left < LANES ? (1u << left) - 1 : 0xffff);
        UNROLL
        for (int t = 0; t < n; t++) {
            float *to = out + (first + (size_t)t) * out_stride + done;
            _mm512_mask_storeu_ps(to, mask, acc[h][t]);
        }
    }
}

/* All tokens, by tiles. */
#define GEMM(name, pairs, mins, wide)                                                             \
    static void gemm_##name(const void *panel, size_t rows, const struct v4_act *x, int offset,   \
                            float *out, size_t out_stride)                                        \
    {                                                                                             \
        size_t t = 0;                                                                             \
        for (; t + TILE_TOKENS <= x->n_tokens; t += TILE_TOKENS) {                                \
            panel_tile(panel, rows, x, t, TILE_TOKENS, offset, pairs, mins, wide, out,            \
                       out_stride);                                                               \
        }                                                                                         \
        for (; t + 2 <= x->n_tokens; t += 2) {                                                    \
            panel_tile(panel, rows, x, t, 2, offset, pairs, mins, wide, out, out_stride);         \
        }                                                                                         \
        if (t < x->n_tokens) {                                                                    \
            panel_tile(panel, rows, x, t, 1, offset, pairs, mins, wide, out, out_stride);         \
        }                                                                                         \
    }
GEMM(plain, 0, 0, 0)
GEMM(wide, 0, 0, 1)
GEMM(mins, 0, 1, 0)
GEMM(pairs, 1, 0, 0)
GEMM(pairs_mins, 1, 1, 0)

static void gemm_i8(uint32_t quant, const void *panel, size_t rows, const struct v4_act *x,
                    float *out, size_t out_stride)
{
    const struct v4_quant_info *info = v4_quant_describe(quant);
    const int offset = offset_of(quant);
    if (info->group == 16) {
        (info->has_min ? gemm_pairs_mins : gemm_pairs)(panel, rows, x, offset, out, out_stride);
    } else if (quant == V4_MXFP4) {
        gemm_wide(panel, rows, x, offset, out, out_stride);
    } else {
        (info->has_min ? gemm_mins : gemm_plain)(panel, rows, x, offset, out, out_stride);
    }
}

/* ---- float weights --------------------------------------------------------------------------- */

ALWAYS_INLINE __m512 load_f32(const void *w, size_t i, __mmask16 mask)
{
    return _mm512_maskz_loadu_ps(mask, (const float *)w + i);
}

ALWAYS_INLINE __m512 load_f16(const void *w, size_t i, __mmask16 mask)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)w + i));
}

ALWAYS_INLINE __m512 load_bf16(const void *w, size_t i, __mmask16 mask)
{
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)w + i);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* As v4_f32_of_e4m3, sixteen at a time. */
ALWAYS_INLINE __m512 load_f8_e4m3(const void *w, size_t i, __mmask16 mask)
{
    const __m128i codes = _mm_maskz_loadu_epi8(mask, (const uint8_t *)w + i);
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 7);
    const __m256i sign = _mm256_and_si256(shifted, _mm256_set1_epi16(0x4000));
    const __m512 halves = _mm512_cvtph_ps(_mm256_add_epi16(shifted, sign));
    const __m128i largest = _mm_set1_epi8(0x7f);
    const __mmask16 is_nan = _mm_cmpeq_epi8_mask(_mm_and_si128(codes, largest), largest);
    const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
    return _mm512_mask_or_ps(_mm512_mul_ps(halves, _mm512_set1_ps(0x1p8f)), is_nan, halves, nan);
}

typedef __m512 load_floats_fn(const void *w, size_t i, __mmask16 mask);

/* FLOAT_COLS columns of FLOAT_TOKENS tokens lie in the first cache beside their sums. */
enum { FLOAT_ROWS = 4, FLOAT_TOKENS = 6, FLOAT_COLS = 512 };

/* Sixteen columns from i of a few rows with the n tokens at x. */
ALWAYS_INLINE void float_step(load_floats_fn *load, const char *const rows[FLOAT_ROWS],
                              const float *x, size_t x_stride, int n, size_t i, __mmask16 mask,
                              __m512 acc[FLOAT_ROWS][FLOAT_TOKENS])
{
    __m512 a[FLOAT_TOKENS];
    UNROLL
    for (int t = 0; t < n; t++) {
        a[t] = _mm512_maskz_loadu_ps(mask, x + (size_t)t * x_stride + i);
    }
    UNROLL
    for (int r = 0; r < FLOAT_ROWS; r++) {
        const __m512 weights = load(rows[r], i, mask);
        UNROLL
        for (int t = 0; t < n; t++) {
            acc[r][t] = _mm512_fmadd_ps(weights, a[t], acc[r][t]);
        }
    }
}

/* The first n_cols columns of n_rows rows with the n tokens at x: sixteen sums a pair, each over
 * every sixteenth column, added up last. So whatever the tile, a pair's sum is the same. A load
 * under a mask takes a turn of the ports that multiply, so that only the last has one. */
ALWAYS_INLINE void float_span(load_floats_fn *load, const char *w, size_t row_bytes, size_t n_rows,
                              const float *x, size_t x_stride, int n, size_t n_cols,
                              __m512 sums[FLOAT_ROWS][FLOAT_TOKENS])
{
    const char *rows[FLOAT_ROWS];
    __m512 acc[FLOAT_ROWS][FLOAT_TOKENS];
    UNROLL
    for (size_t r = 0; r < FLOAT_ROWS; r++) {
        rows[r] = w + (r < n_rows ? r : n_rows - 1) * row_bytes;
        UNROLL
        for (int t = 0; t < n; t++) {
            acc[r][t] = sums[r][t];
        }
    }
    size_t i = 0;
    for (; i + LANES <= n_cols; i += LANES) {
        float_step(load, rows, x, x_stride, n, i, 0xffff, acc);
    }
    if (i < n_cols) {
        float_step(load, rows, x, x_stride, n, i, first_lanes(n_cols - i), acc);
    }
    UNROLL
    for (size_t r = 0; r < FLOAT_ROWS; r++) {
        UNROLL
        for (int t = 0; t < n; t++) {
            sums[r][t] = acc[r][t];
        }
    }
}

/* The sums over the lanes of four vectors. */
ALWAYS_INLINE __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d)
{
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

/* The sums of a tile, added up: out[t][r]. */
ALWAYS_INLINE void float_store(__m512 sums[FLOAT_ROWS][FLOAT_TOKENS], size_t n_rows, int n,
                               float *out, size_t out_stride)
{
    const __mmask8 rows = (__mmask8)(n_rows < FLOAT_ROWS ? (1 << n_rows) - 1 : 15);
    UNROLL
    for (int t = 0; t < n; t++) {
        const __m128 all = sum_lanes(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
        _mm_mask_storeu_ps(out + (size_t)t * out_stride, rows, all);
    }
}

/* A few rows with a few tokens, whole. */
ALWAYS_INLINE void float_tile(load_floats_fn *load, const char *w, size_t row_bytes, size_t n_rows,
                              const struct v4_act *x, size_t first, int n, float *out,
                              size_t out_stride)
{
    __m512 sums[FLOAT_ROWS][FLOAT_TOKENS];
    memset(sums, 0, sizeof sums);
    const float *from = x->x + first * x->cols;
    float_span(load, w, row_bytes, n_rows, from, x->cols, n, x->cols, sums);
    float_store(sums, n_rows, n, out + first * out_stride, out_stride);
}

ALWAYS_INLINE void float_product(load_floats_fn *load, const void *w, size_t row_bytes, size_t rows,
                                 const struct v4_act *x, float *out, size_t out_stride)
{
    for (size_t r = 0; r < rows; r += FLOAT_ROWS) {
        const char *from = (const char *)w + r * row_bytes;
        const size_t left = rows - r;
        size_t t = 0;
        for (; t + FLOAT_TOKENS <= x->n_tokens; t += FLOAT_TOKENS) {
            float_tile(load, from, row_bytes, left, x, t, FLOAT_TOKENS, out + r, out_stride);
        }
        for (; t + 2 <= x->n_tokens; t += 2) {
            float_tile(load, from, row_bytes, left, x, t, 2, out + r, out_stride);
        }
        if (t < x->n_tokens) {
            float_tile(load, from, row_bytes, left, x, t, 1, out + r, out_stride);
        }
    }
}

#define FLOAT_SLOTS(name)                                                                         \
    static void gemv_##name(const void *w, size_t row_bytes, size_t rows, const struct v4_act *x, \
                            float *out, size_t out_stride)                                        \
    {                                                                                             \
        float_product(load_##name, w, row_bytes, rows, x, out, out_stride);                       \
    }                                                                                             \
    static void dequant_row_##name(const void *w, size_t cols, float *out)                        \
    {                                                                                             \
        for (size_t i = 0; i < cols; i += LANES) {                                                \
            const __mmask16 mask = first_lanes(cols - i);                                         \
            _mm512_mask_storeu_ps(out + i, mask, load_##name(w, i, mask));                        \
        }                                                                                         \
    }
FLOAT_SLOTS(f32)
FLOAT_SLOTS(f16)
FLOAT_SLOTS(bf16)
FLOAT_SLOTS(f8_e4m3)

/* A few tokens with up to V4_PANEL_ROWS rows, some columns at a time, so that the tokens lie in
 * the first cache. The `ahead` tokens that follow are brought nearer meanwhile: a panel has too
 * few rows to hide a third cache. */
ALWAYS_INLINE void float_panel(const float *w, size_t rows, const float *x, size_t ahead,
                               size_t cols, int n, float *out, size_t out_stride)
{
    enum { LINE = V4_ALIGN / sizeof(float) };
    __m512 sums[V4_PANEL_ROWS / FLOAT_ROWS][FLOAT_ROWS][FLOAT_TOKENS];
    _Alignas(V4_ALIGN) float part[FLOAT_TOKENS * FLOAT_COLS];
    memset(sums, 0, sizeof sums);
    for (size_t from = 0; from < cols; from += FLOAT_COLS) {
        const size_t n_cols = cols - from < FLOAT_COLS ? cols - from : FLOAT_COLS;
        for (int t = 0; t < n; t++) {
            memcpy(part + t * FLOAT_COLS, x + (size_t)t * cols + from, n_cols * sizeof *part);
        }
        for (size_t r = 0; r < rows; r += FLOAT_ROWS) {
            const size_t share = FLOAT_COLS * FLOAT_ROWS / V4_PANEL_ROWS;
            for (size_t t = 0; t < ahead; t++) {
                const float *next = x + ((size_t)n + t) * cols + from + r / FLOAT_ROWS * share;
                for (size_t i = 0; i < share; i += LINE) {
                    _mm_prefetch((const char *)(next + i), _MM_HINT_T1);
                }
            }
            const char *weights = (const char *)(w + r * cols + from);
            float_span(load_f32, weights, cols * sizeof *w, rows - r, part, FLOAT_COLS, n, n_cols,
                       sums[r / FLOAT_ROWS]);
        }
    }
    for (size_t r = 0; r < rows; r += FLOAT_ROWS) {
        float_store(sums[r / FLOAT_ROWS], rows - r, n, out + r, out_stride);
    }
}

static void gemm_f32(const float *w, size_t rows, const struct v4_act *x, float *out,
                     size_t out_stride)
{
    for (size_t r = 0; r < rows; r += V4_PANEL_ROWS) {
        const size_t n_rows = rows - r < V4_PANEL_ROWS ? rows - r : V4_PANEL_ROWS;
        const float *from = w + r * x->cols;
        size_t t = 0;
        for (; t + FLOAT_TOKENS <= x->n_tokens; t += FLOAT_TOKENS) {
            const size_t left = x->n_tokens - t - FLOAT_TOKENS;
            float_panel(from, n_rows, x->x + t * x->cols, left < FLOAT_TOKENS ? left : FLOAT_TOKENS,
                        x->cols, FLOAT_TOKENS, out + t * out_stride + r, out_stride);
        }
        for (; t < x->n_tokens; t++) {
            float_panel(from, n_rows, x->x + t * x->cols, 0, x->cols, 1, out + t * out_stride + r,
                        out_stride);
        }
    }
}

/* ---- activations ----------------------------------------------------------------------------- */

/* The largest of the lanes of each of four vectors. */
ALWAYS_INLINE __m128i max_lanes(__m512i a, __m512i b, __m512i c, __m512i d)
{
    const __m512i ab = _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_max_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i low = _mm512_unpacklo_epi64(ab, cd), high = _mm512_unpackhi_epi64(ab, cd);
    const __m512i four = _mm512_max_epi32(low, high);
    const __m256i two = _mm256_max_epi32(_mm512_castsi512_si256(four),
                                         _mm512_extracti64x4_epi64(four, 1));
    return _mm_max_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
}

/* As v4_act_scale, of four groups. */
ALWAYS_INLINE __m128 four_scales(__m128i largest, __m128 *d)
{
    const __m128i infinity = _mm_set1_epi32(0x7f800000);
    const __m128 top = _mm_set1_ps(127), max = _mm_castsi128_ps(largest);
    const __m128 inverse = _mm_div_ps(top, max);
    const __mmask8 is_finite = _mm_cmplt_epi32_mask(largest, infinity);
    const __m128i magnitude = _mm_and_si128(_mm_castps_si128(inverse), _mm_set1_epi32(INT32_MAX));
    const __m128 nan = _mm_castsi128_ps(_mm_set1_epi32(0x7fc00000));
    *d = _mm_mask_div_ps(nan, is_finite, max, top);
    return _mm_maskz_mov_ps(_mm_mask_cmplt_epi32_mask(is_finite, magnitude, infinity), inverse);
}

/* Sixteen values to bytes. Of a factor of 0 all are 0: NaN becomes INT32_MIN, whose last byte is
 * 0. */
ALWAYS_INLINE __m128i sixteen_bytes(const float *x, float factor)
{
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(factor));
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled));
}

/* n groups, at most four. */
ALWAYS_INLINE void quantize_groups(const float *x, int n, int8_t *q, float *d, int16_t *sum)
{
    __m512i largest[4];
    UNROLL
    for (int g = 0; g < 4; g++) {
        const float *from = x + (g < n ? g : 0) * V4_ACT_GROUP;
        const __m512 a = _mm512_abs_ps(_mm512_loadu_ps(from));
        const __m512 b = _mm512_abs_ps(_mm512_loadu_ps(from + LANES));
        largest[g] = _mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b));
    }
    __m128 scale;
    float factors[4];
    _mm_storeu_ps(factors,
                  four_scales(max_lanes(largest[0], largest[1], largest[2], largest[3]), &scale));
    _mm_mask_storeu_ps(d, (__mmask8)((1 << n) - 1), scale);
    UNROLL
    for (int g = 0; g < n; g++) {
        const float *from = x + g * V4_ACT_GROUP;
        const __m128i low = sixteen_bytes(from, factors[g]);
        const __m128i high = sixteen_bytes(from + LANES, factors[g]);
        const __m256i both = _mm256_set_m128i(high, low);
        _mm256_storeu_si256((__m256i *)(void *)(q + g * V4_ACT_GROUP), both);
        /* Sums of four, then of sixteen. */
        const __m256i four = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), both);
        const __m256i eight = _mm256_hadd_epi32(four, four);
        const __m256i sixteen = _mm256_hadd_epi32(eight, eight);
        sum[2 * g] = (int16_t)_mm256_cvtsi256_si32(sixteen);
        sum[2 * g + 1] = (int16_t)_mm256_extract_epi32(sixteen, 4);
    }
}

static void quantize(const float *x, size_t cols, int8_t *q, float *d, int16_t *sum)
{
    const size_t groups = cols / V4_ACT_GROUP;
    size_t g = 0;
    for (; g + 4 <= groups; g += 4) {
        quantize_groups(x + g * V4_ACT_GROUP, 4, q + g * V4_ACT_GROUP, d + g, sum + 2 * g);
    }
    for (; g < groups; g++) {
        quantize_groups(x + g * V4_ACT_GROUP, 1, q + g * V4_ACT_GROUP, d + g, sum + 2 * g);
    }
}

static void rms_norm(const float *x, const float *weight, size_t n, float eps, float *out)
{
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (size_t i = 0; i < n; i += LANES) {
        const __m512 v = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);
        squares[i / LANES % 2] = _mm512_fmadd_ps(v, v, squares[i / LANES % 2]);
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])) / (float)n;
    const __m512 factor = _mm512_set1_ps(1 / sqrtf(mean + eps));
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 mask = first_lanes(n - i);
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor);
        const __m512 w = _mm512_maskz_loadu_ps(mask, weight + i);
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(v, w));
    }
}

static void rope_halves(float *head, const float *cos, const float *sin, size_t n_pairs)
{
    for (size_t p = 0; p < n_pairs; p += LANES) {
        const __mmask16 mask = first_lanes(n_pairs - p);
        const __m512 a = _mm512_maskz_loadu_ps(mask, head + p);
        const __m512 b = _mm512_maskz_loadu_ps(mask, head + n_pairs + p);
        const __m512 c = _mm512_maskz_loadu_ps(mask, cos + p);
        const __m512 s = _mm512_maskz_loadu_ps(mask, sin + p);
        const __m512 turned_a = _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s));
        const __m512 turned_b = _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c));
        _mm512_mask_storeu_ps(head + p, mask, turned_a);
        _mm512_mask_storeu_ps(head + n_pairs + p, mask, turned_b);
    }
}

static void rope_adjacent(float *head, const float *cos, const float *sin, size_t n_pairs)
{
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    for (size_t p = 0; p < n_pairs; p += LANES / 2) {
        const __mmask16 mask = first_lanes(2 * (n_pairs - p));
        const __mmask16 half = first_lanes(n_pairs - p) & 0xff;
        const __m512 v = _mm512_maskz_loadu_ps(mask, head + 2 * p);
        const __m512 c = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(half, cos + p));
        const __m512 s = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(half, sin + p));
        const __m512 swapped = _mm512_permute_ps(v, 0xb1);
        const __m512 turned = _mm512_fmaddsub_ps(v, c, _mm512_mul_ps(swapped, s));
        _mm512_mask_storeu_ps(head + 2 * p, mask, turned);
    }
}

static void rope(enum v4_rope kind, float *x, size_t n_heads, size_t head_dim, const float *cos,
                 const float *sin, size_t n_pairs)
{
    for (size_t h = 0; h < n_heads; h++) {
        if (kind == V4_ROPE_HALVES) {
            rope_halves(x + h * head_dim, cos, sin, n_pairs);
        } else {
            rope_adjacent(x + h * head_dim, cos, sin, n_pairs);
        }
    }
}

/* e^x to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. The
 * coefficients are those of the Taylor series, the last ones moved to even out the error. */
ALWAYS_INLINE __m512 exponential(__m512 x)
{
    /* Of a NaN and a number, these take the second operand: NaN stays. */
    x = _mm512_min_ps(_mm512_set1_ps(89), _mm512_max_ps(_mm512_set1_ps(-106), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    return _mm512_scalef_ps(p, n);
}

/* x / (1 + e^-y) */
ALWAYS_INLINE __m512 gate_by(__m512 x, __m512 y)
{
    const __m512 one = _mm512_set1_ps(1);
    const __m512 minus_y = _mm512_sub_ps(_mm512_setzero_ps(), y);
    return _mm512_div_ps(x, _mm512_add_ps(one, exponential(minus_y)));
}

static void gated(enum v4_activation kind, float *gate, const float *up, size_t n)
{
    const __m512 cubic = _mm512_set1_ps(0.044715f);
    const __m512 twice_sqrt_2_over_pi = _mm512_set1_ps(1.5957691216f);
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 mask = first_lanes(n - i);
        const __m512 x = _mm512_maskz_loadu_ps(mask, gate + i);
        __m512 y = x;
        if (kind == V4_GELU_TANH) {
            /* 0.5 (1 + tanh y) is 1 / (1 + e^-2y). */
            const __m512 x2 = _mm512_mul_ps(x, x);
            y = _mm512_mul_ps(_mm512_fmadd_ps(_mm512_mul_ps(cubic, x2), x, x),
                              twice_sqrt_2_over_pi);
        }
        const __m512 z = _mm512_mul_ps(gate_by(x, y), _mm512_maskz_loadu_ps(mask, up + i));
        _mm512_mask_storeu_ps(gate + i, mask, z);
    }
}

static void soft_cap(float *x, size_t n, float cap)
{
    const __m512 one = _mm512_set1_ps(1), caps = _mm512_set1_ps(cap);
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 mask = first_lanes(n - i);
        const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
        /* tanh y = (1 - e) / (1 + e) with e = e^-2|y|, and y's sign. */
        const __m512 y = _mm512_div_ps(_mm512_abs_ps(v), caps);
        const __m512 e = exponential(_mm512_mul_ps(y, _mm512_set1_ps(-2)));
        const __m512 t = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
        const __m512 sign = _mm512_and_ps(v, _mm512_set1_ps(-0.0f));
        _mm512_mask_storeu_ps(x + i, mask, _mm512_or_ps(_mm512_mul_ps(t, caps), sign));
    }
}

static void add(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 mask = first_lanes(n - i);
        const __m512 a = _mm512_maskz_loadu_ps(mask, x + i);
        const __m512 b = _mm512_maskz_loadu_ps(mask, y + i);
        _mm512_mask_storeu_ps(x + i, mask, _mm512_add_ps(a, b));
    }
}

static void join(float *x, float a, const float *y, float b, size_t n)
{
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 mask = first_lanes(n - i);
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(a));
        const __m512 w = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, y + i), _mm512_set1_ps(b));
        _mm512_mask_storeu_ps(x + i, mask, _mm512_add_ps(v, w));
    }
}

static void f16_from_f32(const float *x, size_t n, uint16_t *out)
{
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 mask = first_lanes(n - i);
        const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
        const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_mask_storeu_epi16(out + i, mask, h);
    }
}

static void f32_from_f16(const uint16_t *x, size_t n, float *out)
{
    dequant_row_f16(x, n, out);
}

/* ---- attention ------------------------------------------------------------------------------- */

#include "avx512_attention.h"
#include "avx512_attention_q8.h"

static void softmax_tile(float *x, size_t n, float *max, float *sum)
{
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 mask = first_lanes(n - i);
        /* In this order a NaN in x is passed over. */
        largest = _mm512_mask_max_ps(largest, mask, _mm512_maskz_loadu_ps(mask, x + i), largest);
    }
    *max = _mm512_reduce_max_ps(largest);
    const __m512 shift = _mm512_set1_ps(*max == -INFINITY ? 0 : *max);
    __m512 total = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 mask = first_lanes(n - i);
        const __m512 v = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), shift);
        const __m512 e = _mm512_maskz_mov_ps(mask, exponential(v));
        total = _mm512_add_ps(total, e);
        _mm512_mask_storeu_ps(x + i, mask, e);
    }
    *sum = _mm512_reduce_add_ps(total);
}

const struct v4_isa v4_isa_avx512 = {
    .name = "avx512",
#define SLOT(NAME, name, ...) [V4_##NAME] = gemv_##name,
    .gemv = {FAST_FORMATS(SLOT) SLOW_FORMATS(SLOT)[V4_F32] = gemv_f32,
             [V4_F16] = gemv_f16,
             [V4_BF16] = gemv_bf16,
             [V4_F8_E4M3] = gemv_f8_e4m3},
#undef SLOT
#define SLOT(NAME, name, ...) [V4_##NAME] = panel_##name,
    .panel = {FAST_FORMATS(SLOT) SLOW_FORMATS(SLOT)},
#undef SLOT
    .dequant_row = {[V4_F32] = dequant_row_f32,
                    [V4_F16] = dequant_row_f16,
                    [V4_BF16] = dequant_row_bf16,
                    [V4_F8_E4M3] = dequant_row_f8_e4m3},
    .panel_bytes = panel_bytes,
    .gemm_i8 = gemm_i8,
    .gemm_f32 = gemm_f32,
    .quantize = quantize,
    .rms_norm = rms_norm,
    .rope = rope,
    .attn_query = attn_query,
    .attn_scores = {attn_scores_f16, attn_scores_bf16, attn_scores_q8_0},
    .attn_values = {attn_values_f16, attn_values_bf16, attn_values_q8_0},
    .softmax_tile = softmax_tile,
    .join = join,
    .gated = gated,
    .soft_cap = soft_cap,
    .add = add,
    .f16_from_f32 = f16_from_f32,
    .f32_from_f16 = f32_from_f16,
};
