/* AVX-512 with VNNI: F, BW, VL, DQ.
 *
 * Products of blocks are held to the rounding that v4.h lays down, so their bits are those of
 * portable.c. vpdpbusd multiplies unsigned bytes by signed ones: weights are made unsigned by
 * adding the format's offset, and offset x (sum of the activations) is taken off again as an
 * integer. */
#include <math.h>

#include "../include/v4.h"
#include "avx512_formats.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))
/* For loops over registers. */
#define UNROLL _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1")

enum { LANES = 16, QUAD = 4, GEMV_ROWS = 16, CHUNK = 128, CHUNK_GROUPS = CHUNK / V4_ACT_GROUP };

/* The first `n` of sixteen elements. */
ALWAYS_INLINE __mmask16 first_lanes(size_t n)
{
    return (__mmask16)(n < LANES ? (1u << n) - 1 : 0xffff);
}

/* ---- products straight from blocks ----------------------------------------------------------- */

/* 128 activations of a token as they meet a chunk: bytes as in it, the rest a group a lane, the
 * same in all four elements. */
struct act_chunk {
    __m512i lo, hi;
    __m512 d;
    /* For lo and hi: minus offset x sum as an integer, or the sum as a float for formats with
     * minima. */
    __m512i correction[2];
};

/* Element g of v in all elements of lane g. */
ALWAYS_INLINE __m512i across_lanes(__m128i v)
{
    const __m512i index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_epi32(index, _mm512_castsi128_si512(v));
}

/* Four groups from group g of token t. The first `done` of them were used before: their scale is
 * 0. */
ALWAYS_INLINE void load_act(const struct v4_act *x, size_t t, size_t g, int done, struct format f,
                            struct act_chunk *a)
{
    const int8_t *q = x->q + t * x->cols + g * V4_ACT_GROUP;
    const float *d = x->d + t * (x->cols / V4_ACT_GROUP) + g;
    const int16_t *sum = x->sum + t * (x->cols / V4_SUM_GROUP) + 2 * g;
    const __m512i q0 = _mm512_loadu_si512(q), q1 = _mm512_loadu_si512(q + 64);
    a->lo = even_lanes(q0, q1);
    a->hi = odd_lanes(q0, q1);
    const __m128i d4 = _mm_maskz_loadu_epi32((__mmask8)(0xf << done), d);
    a->d = _mm512_castsi512_ps(across_lanes(d4));
    const __m128i sums = _mm_loadu_si128((const __m128i *)(const void *)sum);
    if (f.pairs) {
        const __m128i even = _mm_srai_epi32(_mm_slli_epi32(sums, 16), 16);
        const __m128i odd = _mm_srai_epi32(sums, 16);
        a->correction[0] = across_lanes(even);
        a->correction[1] = across_lanes(odd);
        if (!f.mins) {
            const __m512i offset = _mm512_set1_epi32(-f.offset);
            a->correction[0] = _mm512_mullo_epi32(a->correction[0], offset);
            a->correction[1] = _mm512_mullo_epi32(a->correction[1], offset);
        }
    } else {
        const __m128i factor = _mm_set1_epi16((short)(f.mins ? 1 : -f.offset));
        a->correction[0] = across_lanes(_mm_madd_epi16(sums, factor));
        a->correction[1] = _mm512_setzero_si512();
    }
    if (f.mins) {
        a->correction[0] = _mm512_castps_si512(_mm512_cvtepi32_ps(a->correction[0]));
        a->correction[1] = _mm512_castps_si512(_mm512_cvtepi32_ps(a->correction[1]));
    }
}

/* Sums the four elements of each lane of four vectors: element r of lane g is the sum of v[r]'s. */
ALWAYS_INLINE __m512i sum_in_lanes(const __m512i v[QUAD])
{
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]),
                                       _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]),
                                       _mm512_unpackhi_epi32(v[2], v[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

/* Element g of v[r] as element r of lane g. */
ALWAYS_INLINE __m512 gather_scales(__m128 v0, __m128 v1, __m128 v2, __m128 v3)
{
    __m512 rows = _mm512_castps128_ps512(v0);
    rows = _mm512_insertf32x4(rows, v1, 1);
    rows = _mm512_insertf32x4(rows, v2, 2);
    rows = _mm512_insertf32x4(rows, v3, 3);
    const __m512i transpose =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(transpose, rows);
}

/* Four rows' chunks, with scales and minima as the products want them. */
struct quad {
    __m512i lo[QUAD], hi[QUAD];
    __m512 scale[2], min[2];
};

ALWAYS_INLINE void load_quad(const uint8_t *const rows[QUAD], size_t at, int half, struct format f,
                             struct quad *q)
{
    struct chunk c[QUAD];
    UNROLL
    for (int r = 0; r < QUAD; r++) {
        f.load(rows[r] + at, half, &c[r]);
        q->lo[r] = c[r].lo;
        q->hi[r] = c[r].hi;
    }
    UNROLL
    for (int p = 0; p <= f.pairs; p++) {
        q->scale[p] = gather_scales(c[0].scale[p], c[1].scale[p], c[2].scale[p], c[3].scale[p]);
        if (f.mins) {
            q->min[p] = gather_scales(c[0].min[p], c[1].min[p], c[2].min[p], c[3].min[p]);
        }
    }
}

/* One scale group's part of a product, before the activations' scale. */
ALWAYS_INLINE __m512 scaled(__m512i dot, __m512 scale, __m512 min, __m512i correction, int mins)
{
    if (mins) {
        const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale);
        return _mm512_sub_ps(product, _mm512_mul_ps(min, _mm512_castsi512_ps(correction)));
    }
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(dot, correction)), scale);
}

/* The products of four rows' chunks with a token's: element r of lane g is row r, group g. */
ALWAYS_INLINE __m512 multiply_quad(const struct quad *q, const struct act_chunk *a, struct format f)
{
    const __m512i zero = _mm512_setzero_si512();
    __m512i dot[QUAD];
    __m512 product;
    if (f.pairs) {
        UNROLL
        for (int r = 0; r < QUAD; r++) {
            dot[r] = _mm512_dpbusd_epi32(zero, q->lo[r], a->lo);
        }
        product = scaled(sum_in_lanes(dot), q->scale[0], q->min[0], a->correction[0], f.mins);
        UNROLL
        for (int r = 0; r < QUAD; r++) {
            dot[r] = _mm512_dpbusd_epi32(zero, q->hi[r], a->hi);
        }
        const __m512i sums = sum_in_lanes(dot);
        product = _mm512_add_ps(product, _mm512_mul_ps(_mm512_cvtepi32_ps(
            f.mins ? sums : _mm512_add_epi32(sums, a->correction[1])), q->scale[1]));
        if (f.mins) {
            const __m512 sum = _mm512_castsi512_ps(a->correction[1]);
            product = _mm512_sub_ps(product, _mm512_mul_ps(q->min[1], sum));
        }
    } else {
        UNROLL
        for (int r = 0; r < QUAD; r++) {
            dot[r] = _mm512_dpbusd_epi32(zero, q->lo[r], a->lo);
            dot[r] = _mm512_dpbusd_epi32(dot[r], q->hi[r], a->hi);
        }
        product = scaled(sum_in_lanes(dot), q->scale[0], q->min[0], a->correction[0], f.mins);
    }
    return _mm512_mul_ps(product, a->d);
}

/* Adds sixteen rows' products to acc, group after group. part[i] has rows 4 i .. 4 i + 3. */
ALWAYS_INLINE __m512 add_groups(__m512 acc, const __m512 part[QUAD])
{
    const __m512 a = _mm512_shuffle_f32x4(part[0], part[1], 0x44);
    const __m512 b = _mm512_shuffle_f32x4(part[0], part[1], 0xee);
    const __m512 c = _mm512_shuffle_f32x4(part[2], part[3], 0x44);
    const __m512 d = _mm512_shuffle_f32x4(part[2], part[3], 0xee);
    acc = _mm512_add_ps(acc, _mm512_shuffle_f32x4(a, c, 0x88));
    acc = _mm512_add_ps(acc, _mm512_shuffle_f32x4(a, c, 0xdd));
    acc = _mm512_add_ps(acc, _mm512_shuffle_f32x4(b, d, 0x88));
    return _mm512_add_ps(acc, _mm512_shuffle_f32x4(b, d, 0xdd));
}

/* One chunk of sixteen rows with n tokens from `first`. */
ALWAYS_INLINE void gemv_chunk(const uint8_t *const rows[GEMV_ROWS], size_t at, int half,
                              const struct v4_act *x, size_t first, int n, size_t g, int done,
                              struct format f, __m512 *acc)
{
    struct act_chunk a[V4_GEMV_TOKENS];
    __m512 part[V4_GEMV_TOKENS][QUAD];
    UNROLL
    for (int t = 0; t < n; t++) {
        load_act(x, first + (size_t)t, g, done, f, &a[t]);
    }
    ROLLED
    for (int i = 0; i < QUAD; i++) {
        struct quad q;
        load_quad(rows + QUAD * i, at, half, f, &q);
        UNROLL
        for (int t = 0; t < n; t++) {
            part[t][i] = multiply_quad(&q, &a[t], f);
        }
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        acc[t] = add_groups(acc[t], part[t]);
    }
}

/* Where the chunks of a row are. Groups that are no whole chunk at its end are read with those
 * before them, which are then done twice. */
struct place {
    size_t g, at; /* group, byte */
    int half, done;
};

ALWAYS_INLINE struct place next_place(struct place p, size_t n_groups, size_t row_bytes,
                                      struct format f)
{
    p.g += CHUNK_GROUPS;
    p.half = f.halves == 2 ? 1 - p.half : 0;
    p.at += p.half ? 0 : (size_t)f.unit;
    if (f.halves == 1 && p.g < n_groups && n_groups - p.g < CHUNK_GROUPS) {
        p.done = (int)(CHUNK_GROUPS - (n_groups - p.g));
        p.g = n_groups - CHUNK_GROUPS;
        p.at = row_bytes - (size_t)f.unit;
    }
    return p;
}

/* Rows of less than a chunk, made one with zeros. */
enum { UNIT_BYTES = CHUNK_GROUPS * 36 };

struct narrow {
    uint8_t rows[GEMV_ROWS][UNIT_BYTES];
    int8_t q[V4_GEMV_TOKENS][CHUNK];
    float d[V4_GEMV_TOKENS][CHUNK / V4_ACT_GROUP];
    int16_t sum[V4_GEMV_TOKENS][CHUNK / V4_SUM_GROUP];
    struct v4_act act;
};

static void widen_act(const struct v4_act *x, struct narrow *to)
{
    memset(to, 0, sizeof *to);
    const size_t cols = x->cols, n_d = cols / V4_ACT_GROUP, n_sum = cols / V4_SUM_GROUP;
    for (size_t t = 0; t < x->n_tokens; t++) {
        memcpy(to->q[t], x->q + t * cols, cols);
        memcpy(to->d[t], x->d + t * n_d, n_d * sizeof *x->d);
        memcpy(to->sum[t], x->sum + t * n_sum, n_sum * sizeof *x->sum);
    }
    to->act = (struct v4_act){x->x, to->q[0], to->d[0], to->sum[0], x->n_tokens, CHUNK};
}

static void widen_rows(const uint8_t *rows[GEMV_ROWS], size_t row_bytes, struct narrow *to)
{
    for (size_t r = 0; r < GEMV_ROWS; r++) {
        memset(to->rows[r], 0, sizeof to->rows[r]);
        memcpy(to->rows[r], rows[r], row_bytes);
        rows[r] = to->rows[r];
    }
}

/* Sixteen rows from w; beyond the last the last again. */
ALWAYS_INLINE void find_rows(const uint8_t *w, size_t row_bytes, size_t left,
                             const uint8_t *rows[GEMV_ROWS])
{
    for (size_t i = 0; i < GEMV_ROWS; i++) {
        rows[i] = w + (i < left ? i : left - 1) * row_bytes;
    }
}

/* Sixteen rows that are read side by side are more streams than the processor foresees. So while
 * one tile of them is used the next one is fetched, in the order in which it lies in memory. */
ALWAYS_INLINE const uint8_t *fetch(const uint8_t *from, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64) {
        _mm_prefetch((const char *)from + i, _MM_HINT_T1);
    }
    return from + bytes;
}

/* Sixteen rows with n tokens; meanwhile fetches as many bytes from `next`, if it is not NULL. */
ALWAYS_INLINE void gemv_tile(const uint8_t *const *rows, size_t row_bytes, const uint8_t *next,
                             const struct v4_act *x, size_t first, int n, struct format f,
                             __mmask16 mask, float *out, size_t out_stride)
{
    __m512 acc[V4_GEMV_TOKENS];
    UNROLL
    for (int t = 0; t < n; t++) {
        acc[t] = _mm512_setzero_ps();
    }
    const size_t n_groups = x->cols / V4_ACT_GROUP;
    for (struct place p = {0}; p.g < n_groups; p = next_place(p, n_groups, row_bytes, f)) {
        if (next) {
            next = fetch(next, (size_t)(GEMV_ROWS * f.unit / f.halves));
        }
        gemv_chunk(rows, p.at, p.half, x, first, n, p.g, p.done, f, acc);
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        _mm512_mask_storeu_ps(out + (first + (size_t)t) * out_stride, mask, acc[t]);
    }
}

ALWAYS_INLINE void gemv_blocks(const void *w, size_t row_bytes, size_t n_rows,
                               const struct v4_act *x, float *out, size_t out_stride,
                               struct format f)
{
    struct narrow narrow;
    if (x->cols < CHUNK) {
        widen_act(x, &narrow);
    }
    const struct v4_act *const act = x->cols < CHUNK ? &narrow.act : x;
    for (size_t r = 0; r < n_rows; r += GEMV_ROWS) {
        const size_t left = n_rows - r;
        const uint8_t *rows[GEMV_ROWS];
        const uint8_t *from = (const uint8_t *)w + r * row_bytes;
        if (r == 0) {
            fetch(from, (left < GEMV_ROWS ? left : GEMV_ROWS) * row_bytes);
        }
        /* Rows beyond the last are read as the last and not written. */
        find_rows(from, row_bytes, left, rows);
        size_t bytes = row_bytes;
        if (x->cols < CHUNK) {
            widen_rows(rows, row_bytes, &narrow);
            bytes = (size_t)f.unit;
        }
        const uint8_t *next = left > GEMV_ROWS ? from + GEMV_ROWS * row_bytes : NULL;
        const __mmask16 mask = first_lanes(left);
        size_t t = 0;
        for (; t + 4 <= x->n_tokens; t += 4, next = NULL) {
            gemv_tile(rows, bytes, next, act, t, 4, f, mask, out + r, out_stride);
        }
        for (; t + 2 <= x->n_tokens; t += 2, next = NULL) {
            gemv_tile(rows, bytes, next, act, t, 2, f, mask, out + r, out_stride);
        }
        if (t < x->n_tokens) {
            gemv_tile(rows, bytes, next, act, t, 1, f, mask, out + r, out_stride);
        }
    }
}

/* ---- panels ---------------------------------------------------------------------------------- */

/* A panel is 32 rows, a group of 32 weights after another: eight times (for four weights each) 16
 * rows and 16 rows of four bytes, then scales, then minima, each [pair][32 rows]. Four bytes are
 * what vpdpbusd adds up; a row is an element of the vector. */
enum { PANEL_HALVES = V4_PANEL_ROWS / LANES };

struct panel_group {
    uint8_t *codes; /* [8][PANEL_HALVES][64] */
    float *scale;   /* [pairs + 1][V4_PANEL_ROWS] */
    float *min;     /* the same */
};

ALWAYS_INLINE size_t panel_group_bytes(int pairs, int mins)
{
    return V4_PANEL_ROWS *
           (V4_ACT_GROUP + sizeof(float) * (size_t)((1 + pairs) * (1 + mins)));
}

ALWAYS_INLINE struct panel_group panel_group(const void *panel, size_t g, int pairs, int mins)
{
    uint8_t *codes = (uint8_t *)(uintptr_t)panel + g * panel_group_bytes(pairs, mins);
    float *scale = (float *)(void *)(codes + V4_PANEL_ROWS * V4_ACT_GROUP);
    return (struct panel_group){codes, scale, scale + (1 + pairs) * V4_PANEL_ROWS};
}

/* v[i]'s element j as v[j]'s element i, elements being 32 bits. */
ALWAYS_INLINE void transpose16(__m512i v[LANES])
{
    __m512i a[LANES];
    UNROLL
    for (int i = 0; i < LANES; i += 4) {
        const __m512i x0 = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        const __m512i x1 = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        const __m512i x2 = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
        const __m512i x3 = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        a[i] = _mm512_unpacklo_epi64(x0, x2);
        a[i + 1] = _mm512_unpackhi_epi64(x0, x2);
        a[i + 2] = _mm512_unpacklo_epi64(x1, x3);
        a[i + 3] = _mm512_unpackhi_epi64(x1, x3);
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
        const __m512i x0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44);
        const __m512i x1 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
        const __m512i x2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
        const __m512i x3 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
        v[j] = _mm512_shuffle_i32x4(x0, x2, 0x88);
        v[4 + j] = _mm512_shuffle_i32x4(x0, x2, 0xdd);
        v[8 + j] = _mm512_shuffle_i32x4(x1, x3, 0x88);
        v[12 + j] = _mm512_shuffle_i32x4(x1, x3, 0xdd);
    }
}

/* Writes a chunk of sixteen rows to half `h` of a panel's groups from g. */
static __attribute__((noinline)) void pack_chunk(struct chunk c[LANES], void *panel, size_t g,
                                                 int groups, int h, int pairs, int mins)
{
    __m512i lo[LANES], hi[LANES];
    UNROLL
    for (int r = 0; r < LANES; r++) {
        lo[r] = c[r].lo;
        hi[r] = c[r].hi;
    }
    transpose16(lo);
    transpose16(hi);
    UNROLL
    for (int i = 0; i < CHUNK_GROUPS; i++) {
        if (i == groups) {
            break;
        }
        const struct panel_group to = panel_group(panel, g + (size_t)i, pairs, mins);
        UNROLL
        for (int j = 0; j < 4; j++) {
            _mm512_store_si512(to.codes + 64 * (j * PANEL_HALVES + h), lo[4 * i + j]);
            _mm512_store_si512(to.codes + 64 * ((4 + j) * PANEL_HALVES + h), hi[4 * i + j]);
        }
        for (int p = 0; p <= pairs; p++) {
            float *scale = to.scale + p * V4_PANEL_ROWS + h * LANES;
            float *min = to.min + p * V4_PANEL_ROWS + h * LANES;
            for (int r = 0; r < LANES; r++) {
                scale[r] = ((const float *)(const void *)&c[r].scale[p])[i];
                if (mins) {
                    min[r] = ((const float *)(const void *)&c[r].min[p])[i];
                }
            }
        }
    }
}

ALWAYS_INLINE void panel_blocks(const void *w, size_t row_bytes, size_t n_rows, size_t cols,
                                void *panel, struct format f)
{
    const size_t n_groups = cols / V4_ACT_GROUP;
    const int groups = n_groups < CHUNK_GROUPS ? (int)n_groups : CHUNK_GROUPS;
    ROLLED
    for (size_t h = 0; h < PANEL_HALVES; h++) {
        struct narrow narrow;
        const uint8_t *rows[LANES];
        /* A half without rows repeats the last one; gemm_i8 does not write what it gives. */
        const size_t first = h * LANES < n_rows ? h * LANES : n_rows - 1;
        find_rows((const uint8_t *)w + first * row_bytes, row_bytes, n_rows - first, rows);
        size_t bytes = row_bytes;
        if (cols < CHUNK) {
            widen_rows(rows, row_bytes, &narrow);
            bytes = (size_t)f.unit;
        }
        for (struct place p = {0}; p.g < n_groups; p = next_place(p, n_groups, bytes, f)) {
            struct chunk c[LANES];
            ROLLED
            for (int r = 0; r < LANES; r++) {
                f.load(rows[r] + p.at, p.half, &c[r]);
            }
            pack_chunk(c, panel, p.g, groups, (int)h, f.pairs, f.mins);
        }
    }
}

/* ---- the formats ----------------------------------------------------------------------------- */

/* Formats that are read by load_<name>: bytes of a unit, chunks in it, offset. */
#define FAST_FORMATS(FORMAT)      \
    FORMAT(Q4_0, q4_0, 72, 1, 8)  \
    FORMAT(Q4_1, q4_1, 80, 1, 0)  \
    FORMAT(Q5_0, q5_0, 88, 1, 16) \
    FORMAT(Q5_1, q5_1, 96, 1, 0)  \
    FORMAT(Q8_0, q8_0, 136, 1, 128) \
    FORMAT(IQ4_NL, iq4_nl, 72, 1, 128) \
    FORMAT(MXFP4, mxfp4, 68, 1, 12) \
    FORMAT(NVFP4, nvfp4, 72, 1, 12) \
    FORMAT(Q2_K, q2_k, 84, 2, 0) \
    FORMAT(Q3_K, q3_k, 110, 2, 4) \
    FORMAT(Q4_K, q4_k, 144, 2, 0) \
    FORMAT(Q5_K, q5_k, 176, 2, 0) \
    FORMAT(Q6_K, q6_k, 210, 2, 32) \
    FORMAT(IQ4_XS, iq4_xs, 136, 2, 128)

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

/* Groups of 16, and minima, by quant/all.h. */
#define V4_QUANT(NAME, name, number, len, bytes, group, has_min) \
    enum { NAME##_PAIRS = (group) == 16, NAME##_MINS = has_min, NAME##_BYTES = bytes };
V4_BLOCKS(V4_QUANT)
#undef V4_QUANT

#define SLOW_LOAD(NAME, name)                                                                     \
    static __attribute__((noinline)) void load_##name(const uint8_t *p, int half,                 \
                                                      struct chunk *c)                            \
    {                                                                                             \
        _Alignas(64) int8_t q[V4_MAX_BLOCK_LEN];                                                  \
        float scale[16], min[16];                                                                 \
        v4_##name##_decode_i8((const void *)p, q, scale, min);                                    \
        set_chunk(q + 128 * half, scale + (NAME##_PAIRS ? 8 : 4) * half, NAME##_PAIRS, c);        \
    }

/* A chunk of 128 weights that decode_i8 gave. */
static void set_chunk(const int8_t *q, const float *scale, int pairs, struct chunk *c)
{
    const __m512i offset = _mm512_set1_epi8((char)SLOW_OFFSET);
    const __m512i q0 = _mm512_xor_si512(_mm512_load_si512(q), offset);
    const __m512i q1 = _mm512_xor_si512(_mm512_load_si512(q + 64), offset);
    c->lo = even_lanes(q0, q1);
    c->hi = odd_lanes(q0, q1);
    c->scale[0] = _mm_loadu_ps(scale);
    if (pairs) {
        const __m128 more = _mm_loadu_ps(scale + 4);
        c->scale[1] = _mm_shuffle_ps(c->scale[0], more, 0xdd);
        c->scale[0] = _mm_shuffle_ps(c->scale[0], more, 0x88);
    }
}
SLOW_FORMATS(SLOW_LOAD)

/* All of them share one copy of the loops for groups of 16 and one for groups of 32. */
#define SLOW_LOOPS(name, pairs)                                                                   \
    static __attribute__((noinline)) void gemv_##name(load_chunk_fn *load, int bytes,             \
                                                      const void *w, size_t row_bytes,            \
                                                      size_t rows, const struct v4_act *x,        \
                                                      float *out, size_t out_stride)              \
    {                                                                                             \
        const struct format f = {load, bytes, 2, SLOW_OFFSET, pairs, 0};                          \
        gemv_blocks(w, row_bytes, rows, x, out, out_stride, f);                                   \
    }                                                                                             \
    static __attribute__((noinline)) void panel_##name(load_chunk_fn *load, int bytes,            \
                                                       const void *w, size_t row_bytes,           \
                                                       size_t rows, size_t cols, void *panel)     \
    {                                                                                             \
        const struct format f = {load, bytes, 2, SLOW_OFFSET, pairs, 0};                          \
        panel_blocks(w, row_bytes, rows, cols, panel, f);                                         \
    }
SLOW_LOOPS(slow16, 1)
SLOW_LOOPS(slow32, 0)

#define SLOTS(NAME, name, unit, halves, offset)                                                   \
    static const struct format format_##name = {load_##name, unit,         halves,                \
                                                offset,      NAME##_PAIRS, NAME##_MINS};          \
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
        (NAME##_PAIRS ? gemv_slow16 : gemv_slow32)(load_##name, NAME##_BYTES, w, row_bytes, rows, \
                                                   x, out, out_stride);                           \
    }                                                                                             \
    static void panel_##name(const void *w, size_t row_bytes, size_t rows, size_t cols,           \
                             void *panel)                                                         \
    {                                                                                             \
        (NAME##_PAIRS ? panel_slow16 : panel_slow32)(load_##name, NAME##_BYTES, w, row_bytes,     \
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
#define OFFSET(NAME, name, unit, halves, offset) \
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
enum { TILE_TOKENS = 6, PAIR_TILE_TOKENS = 4, BLOCK_GROUPS = 64 };

/* Corrections of a tile's tokens, as in struct act_chunk: [token][group][pair]. */
typedef int32_t corrections[TILE_TOKENS][BLOCK_GROUPS * 2];

ALWAYS_INLINE void find_corrections(const struct v4_act *x, size_t first, int n, size_t g0,
                                    size_t groups, int offset, int pairs, int mins, corrections out)
{
    const int factor = mins ? 1 : -offset;
    UNROLL
    for (int t = 0; t < n; t++) {
        const int16_t *sum = x->sum + (first + (size_t)t) * (x->cols / V4_SUM_GROUP) + 2 * g0;
        for (size_t g = 0; g < groups * (size_t)(1 + pairs); g++) {
            const int32_t value = factor * (pairs ? sum[g] : sum[2 * g] + sum[2 * g + 1]);
            if (mins) {
                const float real = (float)value;
                memcpy(&out[t][g], &real, sizeof real);
            } else {
                out[t][g] = value;
            }
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
                                       corrections correction, size_t g,
                                       __m512 acc[PANEL_HALVES][TILE_TOKENS])
{
    __m512 product[PANEL_HALVES][TILE_TOKENS];
    UNROLL
    for (int p = 0; p <= pairs; p++) {
        __m512i dot[PANEL_HALVES][TILE_TOKENS];
        UNROLL
        for (int t = 0; t < n; t++) {
            const int32_t start = mins ? 0 : correction[t][g * (size_t)(1 + pairs) + (size_t)p];
            dot[0][t] = _mm512_set1_epi32(start);
            dot[1][t] = _mm512_set1_epi32(start);
        }
        panel_dots(w.codes, q, stride, n, pairs ? 4 * p : 0, pairs ? 4 * p + 4 : 8, dot);
        UNROLL
        for (int h = 0; h < PANEL_HALVES; h++) {
            const __m512 scale = _mm512_load_ps(w.scale + p * V4_PANEL_ROWS + h * LANES);
            UNROLL
            for (int t = 0; t < n; t++) {
                const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[h][t]), scale);
                product[h][t] = p == 0 ? part : _mm512_add_ps(product[h][t], part);
                if (mins) {
                    const __m512 min = _mm512_load_ps(w.min + p * V4_PANEL_ROWS + h * LANES);
                    float sum;
                    memcpy(&sum, &correction[t][g * (size_t)(1 + pairs) + (size_t)p], sizeof sum);
                    const __m512 less = _mm512_mul_ps(min, _mm512_set1_ps(sum));
                    product[h][t] = _mm512_sub_ps(product[h][t], less);
                }
            }
        }
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        const __m512 scale = _mm512_set1_ps(d[(size_t)t * d_stride]);
        UNROLL
        for (int h = 0; h < PANEL_HALVES; h++) {
            acc[h][t] = _mm512_add_ps(acc[h][t], _mm512_mul_ps(product[h][t], scale));
        }
    }
}

/* 32 rows with n tokens. */
ALWAYS_INLINE void panel_tile(const void *panel, size_t rows, const struct v4_act *x, size_t first,
                              int n, int offset, int pairs, int mins, float *out, size_t out_stride)
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
            const float *d = x->d + first * groups + block + g;
            panel_group_product(panel_group(panel, block + g, pairs, mins), q, x->cols, d, groups,
                                n, pairs, mins, correction, g, acc);
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

/* All tokens, by tiles of at most `most`. */
#define GEMM(name, most, pairs, mins)                                                             \
    static void gemm_##name(const void *panel, size_t rows, const struct v4_act *x, int offset,   \
                            float *out, size_t out_stride)                                        \
    {                                                                                             \
        size_t t = 0;                                                                             \
        for (; t + (most) <= x->n_tokens; t += (most)) {                                          \
            panel_tile(panel, rows, x, t, most, offset, pairs, mins, out, out_stride);            \
        }                                                                                         \
        for (; t + 2 <= x->n_tokens; t += 2) {                                                    \
            panel_tile(panel, rows, x, t, 2, offset, pairs, mins, out, out_stride);               \
        }                                                                                         \
        if (t < x->n_tokens) {                                                                    \
            panel_tile(panel, rows, x, t, 1, offset, pairs, mins, out, out_stride);               \
        }                                                                                         \
    }
GEMM(plain, TILE_TOKENS, 0, 0)
GEMM(mins, TILE_TOKENS, 0, 1)
GEMM(pairs, PAIR_TILE_TOKENS, 1, 0)
GEMM(pairs_mins, PAIR_TILE_TOKENS, 1, 1)

static void gemm_i8(uint32_t quant, const void *panel, size_t rows, const struct v4_act *x,
                    float *out, size_t out_stride)
{
    const struct v4_quant_info *info = v4_quant_describe(quant);
    const int offset = offset_of(quant);
    if (info->group == 16) {
        (info->has_min ? gemm_pairs_mins : gemm_pairs)(panel, rows, x, offset, out, out_stride);
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

typedef __m512 load_floats_fn(const void *w, size_t i, __mmask16 mask);

enum { FLOAT_ROWS = 4, FLOAT_TOKENS = 6 };

/* A few rows with a few tokens: sixteen sums a pair, each over every sixteenth column, added up
 * last. So whatever the tile, a pair's sum is the same. */
ALWAYS_INLINE void float_tile(load_floats_fn *load, const char *w, size_t row_bytes, size_t n_rows,
                              const struct v4_act *x, size_t first, int n, float *out,
                              size_t out_stride)
{
    const char *rows[FLOAT_ROWS];
    __m512 acc[FLOAT_ROWS][FLOAT_TOKENS];
    UNROLL
    for (size_t r = 0; r < FLOAT_ROWS; r++) {
        rows[r] = w + (r < n_rows ? r : n_rows - 1) * row_bytes;
        UNROLL
        for (int t = 0; t < n; t++) {
            acc[r][t] = _mm512_setzero_ps();
        }
    }
    for (size_t i = 0; i < x->cols; i += LANES) {
        const __mmask16 mask = first_lanes(x->cols - i);
        __m512 a[FLOAT_TOKENS];
        UNROLL
        for (int t = 0; t < n; t++) {
            a[t] = _mm512_maskz_loadu_ps(mask, x->x + (first + (size_t)t) * x->cols + i);
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
    UNROLL
    for (size_t r = 0; r < FLOAT_ROWS && r < n_rows; r++) {
        UNROLL
        for (int t = 0; t < n; t++) {
            out[(first + (size_t)t) * out_stride + r] = _mm512_reduce_add_ps(acc[r][t]);
        }
    }
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

static void gemm_f32(const float *w, size_t rows, const struct v4_act *x, float *out,
                     size_t out_stride)
{
    float_product(load_f32, w, x->cols * sizeof *w, rows, x, out, out_stride);
}

/* ---- activations ----------------------------------------------------------------------------- */

static void quantize(const float *x, size_t cols, int8_t *q, float *d, int16_t *sum)
{
    for (size_t g = 0; g < cols / V4_ACT_GROUP; g++) {
        const __m512 a = _mm512_loadu_ps(x + g * V4_ACT_GROUP);
        const __m512 b = _mm512_loadu_ps(x + g * V4_ACT_GROUP + LANES);
        const __m512i largest = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(a)),
                                                 _mm512_castps_si512(_mm512_abs_ps(b)));
        const float factor = v4_act_scale(_mm512_reduce_max_epi32(largest), d + g);
        if (factor == 0) {
            memset(q + g * V4_ACT_GROUP, 0, V4_ACT_GROUP);
            sum[2 * g] = sum[2 * g + 1] = 0;
            continue;
        }
        const __m512 inverse = _mm512_set1_ps(factor);
        const __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
        const __m512i qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
        int8_t *to = q + g * V4_ACT_GROUP;
        _mm_storeu_si128((__m128i *)(void *)to, _mm512_cvtepi32_epi8(qa));
        _mm_storeu_si128((__m128i *)(void *)(to + LANES), _mm512_cvtepi32_epi8(qb));
        sum[2 * g] = (int16_t)_mm512_reduce_add_epi32(qa);
        sum[2 * g + 1] = (int16_t)_mm512_reduce_add_epi32(qb);
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

/* Keys are turned around, 64 of them and 64 of their values at a time, so that a vector has one
 * value of sixteen keys and no sum runs across a vector. */
enum { KEY_BLOCK = 64, KEY_VECTORS = KEY_BLOCK / LANES, ATTN_ROWS = 6 };

/* Columns c.. of n keys to turned[column][key]; what is missing is zero. */
static void turn_keys(const uint16_t *k, size_t n, size_t head_dim, size_t c, size_t width,
                      float turned[KEY_BLOCK][KEY_BLOCK])
{
    for (size_t j = 0; j < KEY_BLOCK; j += LANES) {
        for (size_t i = 0; i < width; i += LANES) {
            const __mmask16 mask = first_lanes(width - i);
            __m512i v[LANES];
            UNROLL
            for (size_t r = 0; r < LANES; r++) {
                v[r] = _mm512_setzero_si512();
                if (j + r < n) {
                    v[r] = _mm512_castps_si512(load_f16(k + (j + r) * head_dim, c + i, mask));
                }
            }
            transpose16(v);
            UNROLL
            for (size_t r = 0; r < LANES; r++) {
                _mm512_store_si512(&turned[i + r][j], v[r]);
            }
        }
    }
}

/* Adds `width` columns of n_q queries times the turned keys to the scores of n keys. */
ALWAYS_INLINE void score_tile(const float *q, int n_q, size_t q_stride,
                              float turned[KEY_BLOCK][KEY_BLOCK], size_t width, size_t n, int begin,
                              float scale, float *scores, size_t stride)
{
    __m512 acc[ATTN_ROWS][KEY_VECTORS];
    __mmask16 mask[KEY_VECTORS];
    UNROLL
    for (int v = 0; v < KEY_VECTORS; v++) {
        mask[v] = n > (size_t)(v * LANES) ? first_lanes(n - (size_t)(v * LANES)) : 0;
        UNROLL
        for (int i = 0; i < n_q; i++) {
            const float *from = scores + (size_t)i * stride + LANES * v;
            acc[i][v] = _mm512_maskz_loadu_ps(begin ? 0 : mask[v], from);
        }
    }
    for (size_t c = 0; c < width; c++) {
        __m512 keys[KEY_VECTORS];
        UNROLL
        for (int v = 0; v < KEY_VECTORS; v++) {
            keys[v] = _mm512_load_ps(&turned[c][LANES * v]);
        }
        UNROLL
        for (int i = 0; i < n_q; i++) {
            const __m512 value = _mm512_set1_ps(q[(size_t)i * q_stride + c]);
            UNROLL
            for (int v = 0; v < KEY_VECTORS; v++) {
                acc[i][v] = _mm512_fmadd_ps(value, keys[v], acc[i][v]);
            }
        }
    }
    UNROLL
    for (int i = 0; i < n_q; i++) {
        UNROLL
        for (int v = 0; v < KEY_VECTORS; v++) {
            _mm512_mask_storeu_ps(scores + (size_t)i * stride + LANES * v, mask[v],
                                  _mm512_mul_ps(acc[i][v], _mm512_set1_ps(scale)));
        }
    }
}

/* The same for any number of queries. */
static void score_block(const float *q, size_t n_q, size_t q_stride,
                        float turned[KEY_BLOCK][KEY_BLOCK], size_t width, size_t n, int begin,
                        float scale, float *scores, size_t stride)
{
    size_t i = 0;
#define SCORE_TILES(n_tile)                                                                       \
    for (; i + (n_tile) <= n_q; i += (n_tile)) {                                                  \
        score_tile(q + i * q_stride, n_tile, q_stride, turned, width, n, begin, scale,            \
                   scores + i * stride, stride);                                                  \
    }
    SCORE_TILES(ATTN_ROWS)
    SCORE_TILES(3)
    SCORE_TILES(1)
#undef SCORE_TILES
}

static void attn_scores(const float *q, size_t n_q, size_t q_stride, const uint16_t *k, size_t n_kv,
                        size_t head_dim, float scale, float *scores, size_t score_stride)
{
    _Alignas(64) float turned[KEY_BLOCK][KEY_BLOCK];
    for (size_t j = 0; j < n_kv; j += KEY_BLOCK) {
        const size_t n = n_kv - j < KEY_BLOCK ? n_kv - j : KEY_BLOCK;
        for (size_t c = 0; c < head_dim; c += KEY_BLOCK) {
            const size_t width = head_dim - c < KEY_BLOCK ? head_dim - c : KEY_BLOCK;
            const float factor = c + width == head_dim ? scale : 1;
            turn_keys(k + j * head_dim, n, head_dim, c, width, turned);
            score_block(q + c, n_q, q_stride, turned, width, n, c == 0, factor, scores + j,
                        score_stride);
        }
    }
}

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

enum { VALUE_VECTORS = 4 };

/* Up to 64 columns of the values for a few queries. */
ALWAYS_INLINE void value_tile(const float *p, int n_q, size_t p_stride, const uint16_t *v,
                              size_t n_kv, size_t head_dim, size_t width, float *out,
                              size_t out_stride)
{
    __m512 acc[ATTN_ROWS][VALUE_VECTORS];
    __mmask16 mask[VALUE_VECTORS];
    UNROLL
    for (size_t c = 0; c < VALUE_VECTORS; c++) {
        mask[c] = width > c * LANES ? first_lanes(width - c * LANES) : 0;
        UNROLL
        for (int i = 0; i < n_q; i++) {
            acc[i][c] = _mm512_maskz_loadu_ps(mask[c], out + (size_t)i * out_stride + c * LANES);
        }
    }
    for (size_t j = 0; j < n_kv; j++) {
        __m512 values[VALUE_VECTORS];
        UNROLL
        for (size_t c = 0; c < VALUE_VECTORS; c++) {
            values[c] = load_f16(v + j * head_dim, c * LANES, mask[c]);
        }
        UNROLL
        for (int i = 0; i < n_q; i++) {
            const __m512 factor = _mm512_set1_ps(p[(size_t)i * p_stride + j]);
            UNROLL
            for (size_t c = 0; c < VALUE_VECTORS; c++) {
                acc[i][c] = _mm512_fmadd_ps(factor, values[c], acc[i][c]);
            }
        }
    }
    UNROLL
    for (size_t c = 0; c < VALUE_VECTORS; c++) {
        UNROLL
        for (int i = 0; i < n_q; i++) {
            _mm512_mask_storeu_ps(out + (size_t)i * out_stride + c * LANES, mask[c], acc[i][c]);
        }
    }
}

static void attn_values(const float *p, size_t n_q, size_t p_stride, const uint16_t *v, size_t n_kv,
                        size_t head_dim, float *out, size_t out_stride)
{
    for (size_t c = 0; c < head_dim; c += LANES * VALUE_VECTORS) {
        const size_t left = head_dim - c;
        const size_t width = left < LANES * VALUE_VECTORS ? left : LANES * VALUE_VECTORS;
        size_t i = 0;
#define VALUE_TILES(n)                                                                            \
    for (; i + (n) <= n_q; i += (n)) {                                                            \
        value_tile(p + i * p_stride, n, p_stride, v + c, n_kv, head_dim, width,                   \
                   out + i * out_stride + c, out_stride);                                         \
    }
        VALUE_TILES(ATTN_ROWS)
        VALUE_TILES(3)
        VALUE_TILES(1)
#undef VALUE_TILES
    }
}

const struct v4_isa v4_isa_avx512 = {
    .name = "avx512",
#define SLOT(NAME, name, ...) [V4_##NAME] = gemv_##name,
    .gemv = {FAST_FORMATS(SLOT) SLOW_FORMATS(SLOT)[V4_F32] = gemv_f32,
             [V4_F16] = gemv_f16,
             [V4_BF16] = gemv_bf16},
#undef SLOT
#define SLOT(NAME, name, ...) [V4_##NAME] = panel_##name,
    .panel = {FAST_FORMATS(SLOT) SLOW_FORMATS(SLOT)},
#undef SLOT
    .dequant_row = {[V4_F32] = dequant_row_f32,
                    [V4_F16] = dequant_row_f16,
                    [V4_BF16] = dequant_row_bf16},
    .panel_bytes = panel_bytes,
    .gemm_i8 = gemm_i8,
    .gemm_f32 = gemm_f32,
    .quantize = quantize,
    .rms_norm = rms_norm,
    .rope = rope,
    .attn_scores = attn_scores,
    .softmax_tile = softmax_tile,
    .join = join,
    .attn_values = attn_values,
    .gated = gated,
    .soft_cap = soft_cap,
    .add = add,
    .f16_from_f32 = f16_from_f32,
    .f32_from_f16 = f32_from_f16,
};
