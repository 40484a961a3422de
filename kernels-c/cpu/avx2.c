/* AVX2 with FMA and F16C. Products of blocks are in ymm_products.h. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define HAS_DPBUSD 0
#define WIDE_OFFSET 0
#include "../include/v4.h"
#include "ymm_products.h"

enum { LANES = 8 };

/* ---- float weights --------------------------------------------------------------------------- */

/* Eight values from i, of which `n` exist; the rest are zero. */
ALWAYS_INLINE __m256 load_f32(const void *w, size_t i, size_t n)
{
    if (n >= LANES) {
        return _mm256_loadu_ps((const float *)w + i);
    }
    float part[LANES] = {0};
    memcpy(part, (const float *)w + i, n * sizeof *part);
    return _mm256_loadu_ps(part);
}

ALWAYS_INLINE __m128i load_16(const void *w, size_t i, size_t n)
{
    if (n >= LANES) {
        return _mm_loadu_si128((const __m128i *)(const void *)((const uint16_t *)w + i));
    }
    uint16_t part[LANES] = {0};
    memcpy(part, (const uint16_t *)w + i, n * sizeof *part);
    return _mm_loadu_si128((const __m128i *)(const void *)part);
}

ALWAYS_INLINE __m256 load_f16(const void *w, size_t i, size_t n)
{
    return _mm256_cvtph_ps(load_16(w, i, n));
}

ALWAYS_INLINE __m256 load_bf16(const void *w, size_t i, size_t n)
{
    const __m256i bits = _mm256_cvtepu16_epi32(load_16(w, i, n));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

/* The first n of eight values. */
ALWAYS_INLINE void store_f32(float *out, __m256 v, size_t n)
{
    if (n >= LANES) {
        _mm256_storeu_ps(out, v);
        return;
    }
    float part[LANES];
    _mm256_storeu_ps(part, v);
    memcpy(out, part, n * sizeof *part);
}

ALWAYS_INLINE float sum_lanes(__m256 v)
{
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* As v4_f32_of_e4m3, eight at a time. */
ALWAYS_INLINE __m256 load_f8_e4m3(const void *w, size_t i, size_t n)
{
    uint64_t part = 0;
    memcpy(&part, (const uint8_t *)w + i, n < LANES ? n : LANES);
    const __m128i shifted = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t)part)), 7);
    const __m128i largest = _mm_set1_epi16(0x3f80);
    const __m128i is_nan = _mm_cmpeq_epi16(_mm_and_si128(shifted, largest), largest);
    const __m128i sign = _mm_and_si128(shifted, _mm_set1_epi16(0x4000));
    const __m128i halves = _mm_add_epi16(shifted, sign);
    const __m128i nan = _mm_and_si128(is_nan, _mm_set1_epi16(0x7e00));
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(halves, nan)), _mm256_set1_ps(0x1p8f));
}

typedef __m256 load_floats_fn(const void *w, size_t i, size_t n);

/* FLOAT_COLS columns of FLOAT_TOKENS tokens lie in the first cache beside their sums. */
enum { FLOAT_TOKENS = 3, FLOAT_COLS = 512 };

/* The first n_cols columns of four rows with the n tokens at x: eight sums a pair, each over every
 * eighth column, added up last. So whatever the tile, a pair's sum is the same. */
ALWAYS_INLINE void float_span(load_floats_fn *load, const char *w, size_t row_bytes, size_t n_rows,
                              const float *x, size_t x_stride, int n, size_t n_cols,
                              __m256 sums[QUAD][FLOAT_TOKENS])
{
    const char *rows[QUAD];
    __m256 acc[QUAD][FLOAT_TOKENS];
    UNROLL
    for (size_t r = 0; r < QUAD; r++) {
        rows[r] = w + (r < n_rows ? r : n_rows - 1) * row_bytes;
        UNROLL
        for (int t = 0; t < n; t++) {
            acc[r][t] = sums[r][t];
        }
    }
    for (size_t i = 0; i < n_cols; i += LANES) {
        __m256 a[FLOAT_TOKENS];
        UNROLL
        for (int t = 0; t < n; t++) {
            a[t] = load_f32(x + (size_t)t * x_stride, i, n_cols - i);
        }
        UNROLL
        for (int r = 0; r < QUAD; r++) {
            const __m256 weights = load(rows[r], i, n_cols - i);
            UNROLL
            for (int t = 0; t < n; t++) {
                acc[r][t] = _mm256_fmadd_ps(weights, a[t], acc[r][t]);
            }
        }
    }
    UNROLL
    for (size_t r = 0; r < QUAD; r++) {
        UNROLL
        for (int t = 0; t < n; t++) {
            sums[r][t] = acc[r][t];
        }
    }
}

/* The sums of a tile, added up: out[t][r]. */
ALWAYS_INLINE void float_store(__m256 sums[QUAD][FLOAT_TOKENS], size_t n_rows, int n, float *out,
                               size_t out_stride)
{
    for (size_t r = 0; r < QUAD && r < n_rows; r++) {
        for (int t = 0; t < n; t++) {
            out[(size_t)t * out_stride + r] = sum_lanes(sums[r][t]);
        }
    }
}

/* Four rows with a few tokens, whole. */
ALWAYS_INLINE void float_tile(load_floats_fn *load, const char *w, size_t row_bytes, size_t n_rows,
                              const struct v4_act *x, size_t first, int n, float *out,
                              size_t out_stride)
{
    __m256 sums[QUAD][FLOAT_TOKENS];
    memset(sums, 0, sizeof sums);
    const float *from = x->x + first * x->cols;
    float_span(load, w, row_bytes, n_rows, from, x->cols, n, x->cols, sums);
    float_store(sums, n_rows, n, out + first * out_stride, out_stride);
}

ALWAYS_INLINE void float_product(load_floats_fn *load, const void *w, size_t row_bytes, size_t rows,
                                 const struct v4_act *x, float *out, size_t out_stride)
{
    for (size_t r = 0; r < rows; r += QUAD) {
        const char *from = (const char *)w + r * row_bytes;
        size_t t = 0;
        for (; t + FLOAT_TOKENS <= x->n_tokens; t += FLOAT_TOKENS) {
            float_tile(load, from, row_bytes, rows - r, x, t, FLOAT_TOKENS, out + r, out_stride);
        }
        for (; t < x->n_tokens; t++) {
            float_tile(load, from, row_bytes, rows - r, x, t, 1, out + r, out_stride);
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
            store_f32(out + i, load_##name(w, i, cols - i), cols - i);                            \
        }                                                                                         \
    }
FLOAT_SLOTS(f32)
FLOAT_SLOTS(f16)
FLOAT_SLOTS(bf16)
FLOAT_SLOTS(f8_e4m3)

/* A few tokens with up to V4_PANEL_ROWS rows, some columns at a time: the tokens are read from
 * memory once, and lie together in the first cache, which rows that are powers of two apart would
 * drive them from. */
ALWAYS_INLINE void float_panel(const float *w, size_t rows, const float *x, size_t cols, int n,
                               float *out, size_t out_stride)
{
    __m256 sums[V4_PANEL_ROWS / QUAD][QUAD][FLOAT_TOKENS];
    _Alignas(V4_ALIGN) float part[FLOAT_TOKENS * FLOAT_COLS];
    memset(sums, 0, sizeof sums);
    for (size_t from = 0; from < cols; from += FLOAT_COLS) {
        const size_t n_cols = cols - from < FLOAT_COLS ? cols - from : FLOAT_COLS;
        for (int t = 0; t < n; t++) {
            memcpy(part + t * FLOAT_COLS, x + (size_t)t * cols + from, n_cols * sizeof *part);
        }
        for (size_t r = 0; r < rows; r += QUAD) {
            const char *weights = (const char *)(w + r * cols + from);
            float_span(load_f32, weights, cols * sizeof *w, rows - r, part, FLOAT_COLS, n, n_cols,
                       sums[r / QUAD]);
        }
    }
    for (size_t r = 0; r < rows; r += QUAD) {
        float_store(sums[r / QUAD], rows - r, n, out + r, out_stride);
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
            float_panel(from, n_rows, x->x + t * x->cols, x->cols, FLOAT_TOKENS,
                        out + t * out_stride + r, out_stride);
        }
        for (; t < x->n_tokens; t++) {
            float_panel(from, n_rows, x->x + t * x->cols, x->cols, 1, out + t * out_stride + r,
                        out_stride);
        }
    }
}

/* ---- activations ----------------------------------------------------------------------------- */

static void quantize(const float *x, size_t cols, int8_t *q, float *d, int16_t *sum)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (size_t g = 0; g < cols / V4_ACT_GROUP; g++) {
        __m256 v[4];
        __m256i largest = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + g * V4_ACT_GROUP + (size_t)i * LANES);
            const __m256 magnitude = _mm256_andnot_ps(sign, v[i]);
            largest = _mm256_max_epi32(largest, _mm256_castps_si256(magnitude));
        }
        __m128i four = _mm_max_epi32(_mm256_castsi256_si128(largest),
                                     _mm256_extracti128_si256(largest, 1));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
        const float factor = v4_act_scale(_mm_cvtsi128_si32(four), d + g);
        if (factor == 0) {
            memset(q + g * V4_ACT_GROUP, 0, V4_ACT_GROUP);
            sum[2 * g] = sum[2 * g + 1] = 0;
            continue;
        }
        const __m256 inverse = _mm256_set1_ps(factor);
        __m256i i32[4];
        for (int i = 0; i < 4; i++) {
            i32[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
        }
        /* Packing works on 128-bit halves: the permutation puts the dwords back in order. */
        const __m256i low = _mm256_packs_epi32(i32[0], i32[1]);
        const __m256i high = _mm256_packs_epi32(i32[2], i32[3]);
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
        _mm256_storeu_si256((__m256i *)(void *)(q + g * V4_ACT_GROUP), bytes);
        const __m256i ones = _mm256_set1_epi16(1);
        const __m256i sums = _mm256_hadd_epi32(_mm256_madd_epi16(low, ones),
                                               _mm256_madd_epi16(high, ones));
        const __m256i totals = _mm256_hadd_epi32(sums, sums);
        const __m128i both = _mm_add_epi32(_mm256_castsi256_si128(totals),
                                           _mm256_extracti128_si256(totals, 1));
        sum[2 * g] = (int16_t)_mm_cvtsi128_si32(both);
        sum[2 * g + 1] = (int16_t)_mm_extract_epi32(both, 1);
    }
}

static void rms_norm(const float *x, const float *weight, size_t n, float eps, float *out)
{
    __m256 squares = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += LANES) {
        const __m256 v = load_f32(x, i, n - i);
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    const float mean = sum_lanes(squares) / (float)n;
    const __m256 factor = _mm256_set1_ps(1 / sqrtf(mean + eps));
    for (size_t i = 0; i < n; i += LANES) {
        const __m256 v = _mm256_mul_ps(load_f32(x, i, n - i), factor);
        store_f32(out + i, _mm256_mul_ps(v, load_f32(weight, i, n - i)), n - i);
    }
}

/* e^x to a few units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], the series
 * of Taylor. 2^n is two factors, so that subnormal results are right. */
ALWAYS_INLINE __m256 exponential(__m256 x)
{
    /* Of a NaN and a number, these take the second operand: NaN stays. */
    x = _mm256_min_ps(_mm256_set1_ps(89), _mm256_max_ps(_mm256_set1_ps(-106), x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.0f / 720);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
    const __m256i whole = _mm256_cvtps_epi32(n), bias = _mm256_set1_epi32(127);
    const __m256i half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(p,
                         _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}

static void gated(enum v4_activation kind, float *gate, const float *up, size_t n)
{
    const __m256 one = _mm256_set1_ps(1);
    for (size_t i = 0; i < n; i += LANES) {
        const __m256 x = load_f32(gate, i, n - i);
        __m256 y = x;
        if (kind == V4_GELU_TANH) {
            /* 0.5 (1 + tanh y) is 1 / (1 + e^-2y). */
            const __m256 x2 = _mm256_mul_ps(x, x);
            y = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(0.044715f), x2), x, x);
            y = _mm256_mul_ps(y, _mm256_set1_ps(1.5957691216f));
        }
        const __m256 e = exponential(_mm256_sub_ps(_mm256_setzero_ps(), y));
        const __m256 z = _mm256_div_ps(x, _mm256_add_ps(one, e));
        store_f32(gate + i, _mm256_mul_ps(z, load_f32(up, i, n - i)), n - i);
    }
}

static void soft_cap(float *x, size_t n, float cap)
{
    const __m256 one = _mm256_set1_ps(1), caps = _mm256_set1_ps(cap);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (size_t i = 0; i < n; i += LANES) {
        const __m256 v = load_f32(x, i, n - i);
        /* tanh y = (1 - e) / (1 + e) with e = e^-2|y|, and y's sign. */
        const __m256 y = _mm256_div_ps(_mm256_andnot_ps(sign, v), caps);
        const __m256 e = exponential(_mm256_mul_ps(y, _mm256_set1_ps(-2)));
        const __m256 t = _mm256_div_ps(_mm256_sub_ps(one, e), _mm256_add_ps(one, e));
        const __m256 z = _mm256_or_ps(_mm256_mul_ps(t, caps), _mm256_and_ps(sign, v));
        store_f32(x + i, z, n - i);
    }
}

static void add(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i += LANES) {
        store_f32(x + i, _mm256_add_ps(load_f32(x, i, n - i), load_f32(y, i, n - i)), n - i);
    }
}

static void join(float *x, float a, const float *y, float b, size_t n)
{
    for (size_t i = 0; i < n; i += LANES) {
        const __m256 v = _mm256_mul_ps(load_f32(x, i, n - i), _mm256_set1_ps(a));
        const __m256 w = _mm256_mul_ps(load_f32(y, i, n - i), _mm256_set1_ps(b));
        store_f32(x + i, _mm256_add_ps(v, w), n - i);
    }
}

static void f16_from_f32(const float *x, size_t n, uint16_t *out)
{
    for (size_t i = 0; i < n; i += LANES) {
        const __m256 v = load_f32(x, i, n - i);
        uint16_t part[LANES];
        _mm_storeu_si128((__m128i *)(void *)part, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        memcpy(out + i, part, (n - i < LANES ? n - i : LANES) * sizeof *part);
    }
}

static void f32_from_f16(const uint16_t *x, size_t n, float *out)
{
    dequant_row_f16(x, n, out);
}

/* ---- attention ------------------------------------------------------------------------------- */

/* Eight numbers at `at`, of which n are read. */
ALWAYS_INLINE __m256 kv_load(enum v4_kv kind, const char *slab, size_t at, size_t n)
{
    return kind == V4_KV_F16 ? load_f16(slab, at, n) : load_bf16(slab, at, n);
}

/* Adds one slab's keys times n_q queries, two vectors of tokens a query. */
ALWAYS_INLINE void score_slab(enum v4_kv kind, const float *q, int n_q, const char *slab,
                              size_t head_dim, float factor, float *scores, size_t stride)
{
    __m256 acc[QUAD][2];
    UNROLL
    for (int i = 0; i < n_q; i++) {
        acc[i][0] = acc[i][1] = _mm256_setzero_ps();
    }
    for (size_t c = 0; c < head_dim; c++) {
        __m256 keys[2];
        UNROLL
        for (int v = 0; v < 2; v++) {
            keys[v] = kv_load(kind, slab, c * V4_SLAB + (size_t)v * LANES, LANES);
        }
        UNROLL
        for (int i = 0; i < n_q; i++) {
            const __m256 value = _mm256_set1_ps(q[(size_t)i * head_dim + c]);
            acc[i][0] = _mm256_fmadd_ps(value, keys[0], acc[i][0]);
            acc[i][1] = _mm256_fmadd_ps(value, keys[1], acc[i][1]);
        }
    }
    UNROLL
    for (int i = 0; i < n_q; i++) {
        float *to = scores + (size_t)i * stride;
        _mm256_storeu_ps(to, _mm256_mul_ps(acc[i][0], _mm256_set1_ps(factor)));
        _mm256_storeu_ps(to + LANES, _mm256_mul_ps(acc[i][1], _mm256_set1_ps(factor)));
    }
}

/* As many bytes of what is read next as of this, into the second cache. */
ALWAYS_INLINE void bring(const void *next, size_t bytes)
{
    for (size_t at = 0; next && at < bytes; at += 64) {
        _mm_prefetch((const char *)next + at, _MM_HINT_T1);
    }
}

ALWAYS_INLINE void scores_of(enum v4_kv kind, const float *q, size_t n_q, const void *k,
                             size_t n_kv, size_t head_dim, float scale, float *scores,
                             size_t stride, const void *next)
{
    const size_t bytes = v4_slab_bytes(kind, head_dim);
    const char *slab = k;
    for (size_t j = 0; j < n_kv; j += V4_SLAB, slab += bytes) {
        size_t i = 0;
        bring(next ? (const char *)next + (slab - (const char *)k) : NULL, bytes);
#define SCORE_SLABS(n)                                                                            \
    for (; i + (n) <= n_q; i += (n)) {                                                            \
        score_slab(kind, q + i * head_dim, n, slab, head_dim, scale, scores + i * stride + j,     \
                   stride);                                                                       \
    }
        SCORE_SLABS(QUAD)
        SCORE_SLABS(2)
        SCORE_SLABS(1)
#undef SCORE_SLABS
    }
}

static void softmax_tile(float *x, size_t n, float *max, float *sum)
{
    *max = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        *max = x[i] > *max ? x[i] : *max;
    }
    const __m256 shift = _mm256_set1_ps(*max == -INFINITY ? 0 : *max);
    __m256 total = _mm256_setzero_ps();
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m256 e = exponential(_mm256_sub_ps(_mm256_loadu_ps(x + i), shift));
        total = _mm256_add_ps(total, e);
        _mm256_storeu_ps(x + i, e);
    }
    if (i < n) {
        float part[LANES];
        for (size_t k = 0; k < LANES; k++) {
            part[k] = i + k < n ? x[i + k] : -INFINITY;
        }
        const __m256 e = exponential(_mm256_sub_ps(_mm256_loadu_ps(part), shift));
        total = _mm256_add_ps(total, e);
        store_f32(x + i, e, n - i);
    }
    *sum = sum_lanes(total);
}

/* Sixteen columns of the values for n queries, or what there is of them. */
ALWAYS_INLINE void value_tile(enum v4_kv kind, const float *p, int n, size_t p_stride,
                              const char *v, size_t n_kv, size_t head_dim, size_t c, float *out)
{
    const size_t width = head_dim - c, second = width > LANES ? width - LANES : 0;
    const size_t bytes = v4_slab_bytes(kind, head_dim);
    __m256 acc[QUAD][2];
    UNROLL
    for (int i = 0; i < n; i++) {
        acc[i][0] = load_f32(out + (size_t)i * head_dim, 0, width);
        acc[i][1] = load_f32(out + (size_t)i * head_dim, LANES, second);
    }
    for (size_t j = 0; j < n_kv; j++) {
        const char *slab = v + j / V4_SLAB * bytes;
        const size_t token = j % V4_SLAB;
        const __m256 v0 = kv_load(kind, slab, token * head_dim + c, width);
        const __m256 v1 = kv_load(kind, slab, token * head_dim + c + LANES, second);
        UNROLL
        for (int i = 0; i < n; i++) {
            const __m256 factor = _mm256_set1_ps(p[(size_t)i * p_stride + j]);
            acc[i][0] = _mm256_fmadd_ps(factor, v0, acc[i][0]);
            acc[i][1] = _mm256_fmadd_ps(factor, v1, acc[i][1]);
        }
    }
    for (int i = 0; i < n; i++) {
        store_f32(out + (size_t)i * head_dim, acc[i][0], width);
        if (second) {
            store_f32(out + (size_t)i * head_dim + LANES, acc[i][1], second);
        }
    }
}

ALWAYS_INLINE void values_of(enum v4_kv kind, const float *p, size_t n_q, size_t p_stride,
                             const void *v, size_t n_kv, size_t head_dim, float *out,
                             const void *next)
{
    const size_t bytes = (n_kv + V4_SLAB - 1) / V4_SLAB * v4_slab_bytes(kind, head_dim);
    bring(next, bytes);
    for (size_t c = 0; c < head_dim; c += 2 * LANES) {
        size_t i = 0;
#define VALUE_TILES(n)                                                                            \
    for (; i + (n) <= n_q; i += (n)) {                                                            \
        value_tile(kind, p + i * p_stride, n, p_stride, v, n_kv, head_dim, c,                     \
                   out + i * head_dim + c);                                                       \
    }
        VALUE_TILES(QUAD)
        VALUE_TILES(2)
        VALUE_TILES(1)
#undef VALUE_TILES
    }
}

#define KV_SLOTS(KIND, kind)                                                                      \
    static void attn_scores_##kind(const float *q, size_t n_q, const void *k, size_t n_kv,        \
                                   size_t head_dim, float scale, float *scores,                   \
                                   size_t score_stride, const void *next)                         \
    {                                                                                             \
        scores_of(V4_KV_##KIND, q, n_q, k, n_kv, head_dim, scale, scores, score_stride, next);    \
    }                                                                                             \
    static void attn_values_##kind(const float *p, size_t n_q, size_t p_stride, const void *v,    \
                                   size_t n_kv, size_t head_dim, float *out, const void *next)    \
    {                                                                                             \
        values_of(V4_KV_##KIND, p, n_q, p_stride, v, n_kv, head_dim, out, next);                  \
    }
KV_SLOTS(F16, f16)
KV_SLOTS(BF16, bf16)
#undef KV_SLOTS

/* ---- attention over bytes -------------------------------------------------------------------- */

/* Two codes of 16 bits at `at` in all lanes. */
ALWAYS_INLINE __m256i pair_of(const void *codes, size_t at)
{
    int32_t pair;
    memcpy(&pair, (const char *)codes + at * sizeof(int16_t), sizeof pair);
    return _mm256_set1_epi32(pair);
}

/* Eight pairs of bytes, widened. */
ALWAYS_INLINE __m256i widened(const char *bytes)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)bytes));
}

ALWAYS_INLINE void score_bytes(const float *q, int n_q, const char *slab, size_t head_dim,
                               float factor, float *scores, size_t stride)
{
    __m256 acc[QUAD][2];
    UNROLL
    for (int i = 0; i < n_q; i++) {
        acc[i][0] = acc[i][1] = _mm256_setzero_ps();
    }
    for (size_t c = 0; c < head_dim; c += V4_KV_GROUP) {
        const size_t scales = c / V4_KV_GROUP * V4_SLAB;
        __m256i dot[QUAD][2];
        UNROLL
        for (int i = 0; i < n_q; i++) {
            dot[i][0] = dot[i][1] = _mm256_setzero_si256();
        }
        for (size_t at = c; at < c + V4_KV_GROUP; at += 2) {
            const __m256i a = widened(slab + at * V4_SLAB);
            const __m256i b = widened(slab + at * V4_SLAB + 2 * LANES);
            UNROLL
            for (int i = 0; i < n_q; i++) {
                const __m256i pair = pair_of(q + (size_t)i * head_dim, at);
                dot[i][0] = _mm256_add_epi32(dot[i][0], _mm256_madd_epi16(a, pair));
                dot[i][1] = _mm256_add_epi32(dot[i][1], _mm256_madd_epi16(b, pair));
            }
        }
        UNROLL
        for (int v = 0; v < 2; v++) {
            const __m256 scale =
                load_f16(slab + V4_SLAB * head_dim, scales + (size_t)v * LANES, LANES);
            UNROLL
            for (int i = 0; i < n_q; i++) {
                const float own = q[(size_t)i * head_dim + head_dim / 2 + c / V4_KV_GROUP];
                acc[i][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[i][v]),
                                            _mm256_mul_ps(scale, _mm256_set1_ps(own)), acc[i][v]);
            }
        }
    }
    UNROLL
    for (int i = 0; i < n_q; i++) {
        float *to = scores + (size_t)i * stride;
        _mm256_storeu_ps(to, _mm256_mul_ps(acc[i][0], _mm256_set1_ps(factor)));
        _mm256_storeu_ps(to + LANES, _mm256_mul_ps(acc[i][1], _mm256_set1_ps(factor)));
    }
}

static void attn_scores_q8_0(const float *q, size_t n_q, const void *k, size_t n_kv,
                             size_t head_dim, float scale, float *scores, size_t stride,
                             const void *next)
{
    const size_t bytes = v4_slab_bytes(V4_KV_Q8_0, head_dim);
    const char *slab = k;
    for (size_t j = 0; j < n_kv; j += V4_SLAB, slab += bytes) {
        size_t i = 0;
        bring(next ? (const char *)next + (slab - (const char *)k) : NULL, bytes);
#define SCORE_BYTES(n)                                                                            \
    for (; i + (n) <= n_q; i += (n)) {                                                            \
        score_bytes(q + i * head_dim, n, slab, head_dim, scale, scores + i * stride + j, stride); \
    }
        SCORE_BYTES(QUAD)
        SCORE_BYTES(2)
        SCORE_BYTES(1)
#undef SCORE_BYTES
    }
}

/* Weights times scales of n tokens in fifteen bits; gives what undoes it. */
static float byte_weights(const float *p, const float *scales, size_t n, int16_t *codes)
{
    int32_t most = 0;
    for (size_t t = 0; t < n; t++) {
        const float v = p[t] * scales[t];
        int32_t bits;
        memcpy(&bits, &v, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float max, scale;
    memcpy(&max, &most, sizeof max);
    const __m256 inverse = _mm256_set1_ps(v4_kv_inverse(max, &scale));
    for (size_t t = 0; t < n; t += LANES) {
        const __m256 v = _mm256_mul_ps(load_f32(p, t, n - t), load_f32(scales, t, n - t));
        const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse));
        const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                             _mm256_extracti128_si256(whole, 1));
        _mm_storeu_si128((__m128i *)(void *)(codes + t), half);
    }
    return scale;
}

/* Adds sixteen columns of the values for n queries. */
ALWAYS_INLINE void add_bytes(int n, int16_t weights[QUAD][V4_KV_TOKENS], const float *scale,
                             const char *slabs, size_t n_kv, size_t head_dim, size_t c, float *out)
{
    const size_t bytes = v4_slab_bytes(V4_KV_Q8_0, head_dim);
    __m256i dot[QUAD][2];
    UNROLL
    for (int i = 0; i < n; i++) {
        dot[i][0] = dot[i][1] = _mm256_setzero_si256();
    }
    for (size_t j = 0; j < n_kv; j += 2) {
        const char *from = slabs + j / V4_SLAB * bytes + j % V4_SLAB * head_dim + 2 * c;
        const __m256i a = widened(from), b = widened(from + 2 * LANES);
        UNROLL
        for (int i = 0; i < n; i++) {
            const __m256i pair = pair_of(weights[i], j);
            dot[i][0] = _mm256_add_epi32(dot[i][0], _mm256_madd_epi16(a, pair));
            dot[i][1] = _mm256_add_epi32(dot[i][1], _mm256_madd_epi16(b, pair));
        }
    }
    UNROLL
    for (int i = 0; i < n; i++) {
        UNROLL
        for (int v = 0; v < 2; v++) {
            float *to = out + (size_t)i * head_dim + c + (size_t)v * LANES;
            _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[i][v]),
                                                 _mm256_set1_ps(scale[i]), _mm256_loadu_ps(to)));
        }
    }
}

static void attn_values_q8_0(const float *p, size_t n_q, size_t p_stride, const void *v,
                             size_t n_kv, size_t head_dim, float *out, const void *next)
{
    float scales[V4_KV_TOKENS], scale[QUAD];
    int16_t weights[QUAD][V4_KV_TOKENS];
    const size_t bytes = v4_slab_bytes(V4_KV_Q8_0, head_dim);
    bring(next, (n_kv + V4_SLAB - 1) / V4_SLAB * bytes);
    for (size_t c = 0; c < head_dim; c += V4_KV_GROUP) {
        for (size_t j = 0; j < n_kv; j += LANES) {
            const char *slab = (const char *)v + j / V4_SLAB * bytes;
            const size_t at = c / V4_KV_GROUP * V4_SLAB + j % V4_SLAB;
            _mm256_storeu_ps(scales + j, load_f16(slab + V4_SLAB * head_dim, at, LANES));
        }
        size_t i = 0;
#define ADD_BYTES(n)                                                                              \
    for (; i + (n) <= n_q; i += (n)) {                                                            \
        for (size_t r = 0; r < (n); r++) {                                                        \
            scale[r] = byte_weights(p + (i + r) * p_stride, scales, n_kv, weights[r]);            \
        }                                                                                         \
        add_bytes(n, weights, scale, v, n_kv, head_dim, c, out + i * head_dim);                   \
        add_bytes(n, weights, scale, v, n_kv, head_dim, c + 2 * LANES, out + i * head_dim);       \
    }
        ADD_BYTES(QUAD)
        ADD_BYTES(2)
        ADD_BYTES(1)
#undef ADD_BYTES
    }
}

const struct v4_isa v4_isa_avx2 = {
    .name = "avx2",
#define V4_QUANT(NAME, name, number, ...) [number] = gemv_##name,
    .gemv = {V4_QUANTS(V4_QUANT)},
#undef V4_QUANT
#define V4_QUANT(NAME, name, number, ...) [number] = panel_##name,
    .panel = {V4_BLOCKS(V4_QUANT)},
#undef V4_QUANT
    .dequant_row = {[V4_F32] = dequant_row_f32,
                    [V4_F16] = dequant_row_f16,
                    [V4_BF16] = dequant_row_bf16,
                    [V4_F8_E4M3] = dequant_row_f8_e4m3},
    .panel_bytes = panel_bytes,
    .gemm_i8 = gemm_i8,
    .gemm_f32 = gemm_f32,
    .quantize = quantize,
    .rms_norm = rms_norm,
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
