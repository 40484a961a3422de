/* Products of blocks in 256-bit vectors, for AVX2 and AVX-VNNI.
 *
 * They are held to the rounding that v4.h lays down, so their bits are those of portable.c. The
 * file that includes this defines HAS_DPBUSD, and WIDE_OFFSET for ymm_formats.h.
 *
 * vpdpbusd multiplies unsigned bytes by signed ones: weights are made unsigned by adding the
 * format's offset, and offset x (sum of the activations) is taken off again as an integer. So does
 * vpmaddubsw, which gives sums of two products in 16 bits: as long as codes are below 64 several
 * of them are added up before they are widened. Where codes fill a byte even one may not fit; there
 * a product straight from blocks is |w| times a with w's sign (at most 2 x 128 x 127), and a panel
 * has 16-bit codes for vpmaddwd. */
#ifndef V4_YMM_PRODUCTS_H
#define V4_YMM_PRODUCTS_H

#include "../include/v4.h"
#include "ymm_formats.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))
/* For loops over registers. */
#define UNROLL _Pragma("GCC unroll 16")

/* A sum as it is now: else the compiler makes a tree of a chain of additions, for which it has not
 * the registers. */
#define KEEP(v) __asm__("" : "+x"(v))

enum { OCTET = 8, TILE_TOKENS = 4 };

/* What the loops must know of a format. All of it is constant where it is used. */
struct format {
    prepare_fn *prepare;
    codes_fn *codes;
    int len, bytes; /* of a block */
    int offset;     /* added to each q */
    int sums;       /* results of vpmaddubsw that fit 16 bits together; 0 where codes fill a byte */
    int pairs;      /* 1 where groups have 16 weights */
    int mins;       /* 1 where groups have a minimum */
};

/* ---- products straight from blocks ----------------------------------------------------------- */

/* 64 activations of a token as they meet codes. */
struct act_pair {
    __m256i lo, hi;
    __m256 d[2]; /* of each group, in all elements */
    /* For the halves of groups of 16, else [0]: minus offset x sum of each lane's group as
     * integers, or the sum as floats for formats with minima. */
    __m256i correction[2];
};

/* Group g of token t, and the one after it if there is one; else g again with a scale of 0. */
ALWAYS_INLINE void load_act(const struct v4_act *x, size_t t, size_t g, struct format f,
                            struct act_pair *a)
{
    const size_t n_groups = x->cols / V4_ACT_GROUP, at = t * n_groups + g;
    const size_t next = at + (g + 1 < n_groups);
    const uint8_t *q0 = (const uint8_t *)x->q + at * V4_ACT_GROUP;
    const uint8_t *q1 = (const uint8_t *)x->q + next * V4_ACT_GROUP;
    a->lo = two_lanes(q0, q1);
    a->hi = two_lanes(q0 + 16, q1 + 16);
    a->d[0] = _mm256_set1_ps(x->d[at]);
    a->d[1] = _mm256_set1_ps(next == at ? 0 : x->d[next]);
    const int16_t *s0 = x->sum + 2 * at, *s1 = x->sum + 2 * next;
    const int factor = f.mins ? 1 : -f.offset;
    UNROLL
    for (int p = 0; p <= f.pairs; p++) {
        const int first = factor * (f.pairs ? s0[p] : s0[0] + s0[1]);
        const int second = factor * (f.pairs ? s1[p] : s1[0] + s1[1]);
        a->correction[p] = _mm256_inserti128_si256(
            _mm256_set1_epi32(first), _mm_set1_epi32(second), 1);
        if (f.mins) {
            a->correction[p] = _mm256_castps_si256(_mm256_cvtepi32_ps(a->correction[p]));
        }
    }
}

/* Sums of four products each. */
ALWAYS_INLINE __m256i dots(__m256i w, __m256i a, struct format f)
{
#if HAS_DPBUSD
    (void)f;
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), w, a);
#else
    const __m256i size = f.sums ? w : _mm256_abs_epi8(w);
    const __m256i signed_a = f.sums ? a : _mm256_sign_epi8(a, w);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(size, signed_a), _mm256_set1_epi16(1));
#endif
}

/* The same of both halves of groups of 32. */
ALWAYS_INLINE __m256i dots_of_both(struct codes c, const struct act_pair *a, struct format f)
{
#if HAS_DPBUSD
    return _mm256_dpbusd_avx_epi32(dots(c.lo, a->lo, f), c.hi, a->hi);
#else
    if (f.sums >= 2) {
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(c.lo, a->lo),
                                               _mm256_maddubs_epi16(c.hi, a->hi));
        return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    return _mm256_add_epi32(dots(c.lo, a->lo, f), dots(c.hi, a->hi, f));
#endif
}

/* Sums the four elements of each lane of four vectors: element r of lane l is the sum of v[r]'s. */
ALWAYS_INLINE __m256i sum_in_lanes(const __m256i v[QUAD])
{
    const __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]),
                                       _mm256_unpackhi_epi32(v[0], v[1]));
    const __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]),
                                       _mm256_unpackhi_epi32(v[2], v[3]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

/* Part p of four rows' products with two groups, before the activations' scale: element r of lane l
 * is row r, group l. */
ALWAYS_INLINE __m256 multiply_quad(const struct codes c[QUAD], const struct stretch *s, int j,
                                   int p, const struct act_pair *a, struct format f)
{
    __m256i v[QUAD];
    UNROLL
    for (int r = 0; r < QUAD; r++) {
        if (f.pairs) {
            v[r] = dots(p ? c[r].hi : c[r].lo, p ? a->hi : a->lo, f);
        } else {
            v[r] = dots_of_both(c[r], a, f);
        }
    }
    __m256i sums = sum_in_lanes(v);
    if (f.offset) {
        sums = _mm256_add_epi32(sums, a->correction[p]);
    }
    const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), s->scale[p][j]);
    if (f.mins) {
        return _mm256_fnmadd_ps(s->min[p][j], _mm256_castsi256_ps(a->correction[p]), product);
    }
    return product;
}

/* Groups 2 j and 2 j + 1 of a stretch of eight rows with n tokens from `first`. */
ALWAYS_INLINE void gemv_pair(const struct stretch s[2], int j, size_t next, const struct v4_act *x,
                             size_t first, int n, size_t g, struct format f, __m256 *acc)
{
    struct act_pair a[TILE_TOKENS];
    __m256 part[TILE_TOKENS][2][2];
    UNROLL
    for (int t = 0; t < n; t++) {
        load_act(x, first + (size_t)t, g, f, &a[t]);
    }
    UNROLL
    for (int i = 0; i < 2; i++) {
        struct codes c[QUAD];
        UNROLL
        for (int r = 0; r < QUAD; r++) {
            c[r] = f.codes(&s[i], r, j, next);
        }
        UNROLL
        for (int t = 0; t < n; t++) {
            UNROLL
            for (int p = 0; p <= f.pairs; p++) {
                part[t][p][i] = multiply_quad(c, &s[i], j, p, &a[t], f);
            }
        }
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        UNROLL
        for (int l = 0; l < 2; l++) {
            UNROLL
            for (int p = 0; p <= f.pairs; p++) {
                const __m256 *v = part[t][p];
                const __m256 rows = l ? _mm256_permute2f128_ps(v[0], v[1], 0x31)
                                      : _mm256_permute2f128_ps(v[0], v[1], 0x20);
                acc[t] = _mm256_fmadd_ps(rows, a[t].d[l], acc[t]);
            }
        }
    }
}

/* Eight rows from w; beyond the last the last again. */
ALWAYS_INLINE void find_rows(const uint8_t *w, size_t row_bytes, size_t left, struct stretch s[2])
{
    for (size_t i = 0; i < OCTET; i++) {
        s[i / QUAD].rows[i % QUAD] = w + (i < left ? i : left - 1) * row_bytes;
    }
}

/* Scales of the stretch from group g; gives how many groups it has. */
ALWAYS_INLINE int begin_stretch(struct stretch s[2], size_t g, size_t n_groups, struct format f)
{
    const int n = n_groups - g < STRETCH_GROUPS ? (int)(n_groups - g) : STRETCH_GROUPS;
    f.prepare(&s[0], n);
    f.prepare(&s[1], n);
    return n;
}

ALWAYS_INLINE void end_stretch(struct stretch s[2], struct format f)
{
    for (int i = 0; i < OCTET; i++) {
        s[i / QUAD].rows[i % QUAD] += V4_MAX_BLOCK_LEN / f.len * f.bytes;
    }
}

ALWAYS_INLINE size_t next_block(int j, int n, struct format f)
{
    return f.len == V4_ACT_GROUP && 2 * j + 1 < n ? (size_t)f.bytes : 0;
}

/* Eight rows that are read side by side are more streams than a processor may foresee. So while one
 * tile of them is used the next one is fetched, in the order in which it lies in memory. */
ALWAYS_INLINE const uint8_t *fetch(const uint8_t *from, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64) {
        _mm_prefetch((const char *)from + i, _MM_HINT_T0);
    }
    return from + bytes;
}

ALWAYS_INLINE void store_rows(float *out, __m256 v, size_t n)
{
    if (n >= OCTET) {
        _mm256_storeu_ps(out, v);
        return;
    }
    float part[OCTET];
    _mm256_storeu_ps(part, v);
    memcpy(out, part, n * sizeof *part);
}

/* Eight rows with n tokens; meanwhile fetches as many bytes from `next`, if it is not NULL. */
ALWAYS_INLINE void gemv_tile(const uint8_t *w, size_t row_bytes, size_t left, const uint8_t *next,
                             const struct v4_act *x, size_t first, int n, struct format f,
                             float *out, size_t out_stride)
{
    struct stretch s[2];
    __m256 acc[TILE_TOKENS];
    UNROLL
    for (int t = 0; t < n; t++) {
        acc[t] = _mm256_setzero_ps();
    }
    find_rows(w, row_bytes, left, s);
    const size_t n_groups = x->cols / V4_ACT_GROUP;
    for (size_t g = 0; g < n_groups; g += STRETCH_GROUPS) {
        if (next) {
            next = fetch(next, (size_t)(OCTET * (V4_MAX_BLOCK_LEN / f.len) * f.bytes));
        }
        const int groups = begin_stretch(s, g, n_groups, f);
        for (int j = 0; 2 * j < groups; j++) {
            gemv_pair(s, j, next_block(j, groups, f), x, first, n, g + 2 * (size_t)j, f, acc);
        }
        end_stretch(s, f);
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        store_rows(out + (first + (size_t)t) * out_stride, acc[t], left);
    }
}

ALWAYS_INLINE void gemv_blocks(const void *w, size_t row_bytes, size_t n_rows,
                               const struct v4_act *x, float *out, size_t out_stride,
                               struct format f)
{
    for (size_t r = 0; r < n_rows; r += OCTET) {
        const size_t left = n_rows - r;
        const uint8_t *from = (const uint8_t *)w + r * row_bytes;
        const uint8_t *next = left > OCTET ? from + OCTET * row_bytes : NULL;
        size_t t = 0;
        for (; t + 4 <= x->n_tokens; t += 4, next = NULL) {
            gemv_tile(from, row_bytes, left, next, x, t, 4, f, out + r, out_stride);
        }
        for (; t + 2 <= x->n_tokens; t += 2, next = NULL) {
            gemv_tile(from, row_bytes, left, next, x, t, 2, f, out + r, out_stride);
        }
        if (t < x->n_tokens) {
            gemv_tile(from, row_bytes, left, next, x, t, 1, f, out + r, out_stride);
        }
    }
}

/* ---- panels ---------------------------------------------------------------------------------- */

/* A panel is 32 rows, a group of 32 weights after another: for each eight rows eight times (for
 * four weights each) the rows' four bytes, then scales, then minima, each [pair][32 rows]. Codes
 * that fill a byte take two instead: eight times weights 0 and 2 of the four, then 1 and 3. */
ALWAYS_INLINE size_t code_bytes(int is_wide)
{
    return is_wide && !HAS_DPBUSD ? 2 : 1;
}

ALWAYS_INLINE size_t panel_group_bytes(int is_wide, int pairs, int mins)
{
    return V4_PANEL_ROWS * (V4_ACT_GROUP * code_bytes(is_wide) +
                            sizeof(float) * (size_t)((1 + pairs) * (1 + mins)));
}

ALWAYS_INLINE void transpose8(__m256i v[OCTET])
{
    __m256i a[OCTET];
    UNROLL
    for (int i = 0; i < OCTET; i += 4) {
        const __m256i x0 = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        const __m256i x1 = _mm256_unpackhi_epi32(v[i], v[i + 1]);
        const __m256i x2 = _mm256_unpacklo_epi32(v[i + 2], v[i + 3]);
        const __m256i x3 = _mm256_unpackhi_epi32(v[i + 2], v[i + 3]);
        a[i] = _mm256_unpacklo_epi64(x0, x2);
        a[i + 1] = _mm256_unpackhi_epi64(x0, x2);
        a[i + 2] = _mm256_unpacklo_epi64(x1, x3);
        a[i + 3] = _mm256_unpackhi_epi64(x1, x3);
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(a[i], a[4 + i], 0x20);
        v[4 + i] = _mm256_permute2x128_si256(a[i], a[4 + i], 0x31);
    }
}

/* Bytes 0 and 2 of each element as 16 bits, and bytes 1 and 3. */
ALWAYS_INLINE __m256i even_bytes(__m256i v)
{
    return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
}

ALWAYS_INLINE __m256i odd_bytes(__m256i v)
{
    return _mm256_srai_epi16(v, 8);
}

/* Half h of the codes of two groups of eight rows to their places from `to`. */
ALWAYS_INLINE void pack_half(__m256i v[OCTET], int h, int groups, uint8_t *to, size_t stride,
                             int is_wide)
{
    transpose8(v);
    UNROLL
    for (int l = 0; l < 2; l++) {
        if (l == groups) {
            break;
        }
        __m256i *codes = (__m256i *)(void *)(to + (size_t)l * stride);
        UNROLL
        for (int k = 0; k < 4; k++) {
            const __m256i four = v[4 * l + k];
            if (code_bytes(is_wide) == 2) {
                _mm256_store_si256(codes + 2 * (4 * h + k), even_bytes(four));
                _mm256_store_si256(codes + 2 * (4 * h + k) + 1, odd_bytes(four));
            } else {
                _mm256_store_si256(codes + 4 * h + k, four);
            }
        }
    }
}

/* Scales (or minima) of two groups of eight rows: each lane to a group. */
ALWAYS_INLINE void pack_scales(const struct stretch s[2], int j, int groups, int pairs, int mins,
                               float *to, size_t stride)
{
    UNROLL
    for (int i = 0; i < 4 * (1 + pairs); i++) {
        const int l = i % 2, q = i / 2 % 2, p = i / 4;
        float *lane = (float *)(void *)((char *)to + (size_t)l * stride);
        float *scale = lane + p * V4_PANEL_ROWS + 4 * q;
        if (l < groups) {
            const __m256 v = s[q].scale[p][j], m = mins ? s[q].min[p][j] : v;
            _mm_store_ps(scale, l ? _mm256_extractf128_ps(v, 1) : _mm256_castps256_ps128(v));
            if (mins) {
                _mm_store_ps(scale + (1 + pairs) * V4_PANEL_ROWS,
                             l ? _mm256_extractf128_ps(m, 1) : _mm256_castps256_ps128(m));
            }
        }
    }
}

/* Eight rows of a panel. */
ALWAYS_INLINE void pack_octet(struct stretch s[2], size_t octet, size_t n_groups, uint8_t *panel,
                              struct format f)
{
    const int is_wide = f.sums == 0;
    const size_t stride = panel_group_bytes(is_wide, f.pairs, f.mins);
    const size_t octet_bytes = OCTET * V4_ACT_GROUP * code_bytes(is_wide);
    for (size_t g = 0; g < n_groups; g += STRETCH_GROUPS) {
        const int n = begin_stretch(s, g, n_groups, f);
        for (int j = 0; 2 * j < n; j++) {
            __m256i lo[OCTET], hi[OCTET];
            UNROLL
            for (int r = 0; r < OCTET; r++) {
                const struct codes c =
                    f.codes(&s[r / QUAD], r % QUAD, j, next_block(j, n, f));
                lo[r] = c.lo;
                hi[r] = c.hi;
            }
            const int groups = n - 2 * j < 2 ? 1 : 2;
            uint8_t *to = panel + (g + 2 * (size_t)j) * stride;
            pack_half(lo, 0, groups, to + octet * octet_bytes, stride, is_wide);
            pack_half(hi, 1, groups, to + octet * octet_bytes, stride, is_wide);
            float *scale = (float *)(void *)(to + V4_PANEL_ROWS / OCTET * octet_bytes);
            pack_scales(s, j, groups, f.pairs, f.mins, scale + octet * OCTET, stride);
        }
        end_stretch(s, f);
    }
}

ALWAYS_INLINE void panel_blocks(const void *w, size_t row_bytes, size_t n_rows, size_t cols,
                                void *panel, struct format f)
{
    for (size_t octet = 0; octet * OCTET < n_rows; octet++) {
        struct stretch s[2];
        /* Rows beyond the last repeat it; gemm_i8 does not write what they give. */
        const size_t r = octet * OCTET;
        find_rows((const uint8_t *)w + r * row_bytes, row_bytes, n_rows - r, s);
        pack_octet(s, octet, cols / V4_ACT_GROUP, panel, f);
    }
}

/* ---- products with a panel ------------------------------------------------------------------- */

/* Groups that are used for all tokens before the next ones: what they take stays in a cache. */
enum { BLOCK_GROUPS = 64 };

/* Tokens of a tile, as the codes of a panel meet them. */
struct tile_acts {
    size_t n_groups; /* of the block */
    const int8_t *q[TILE_TOKENS];
    const float *d[TILE_TOKENS];
    /* As in struct act_pair, [token][group][pair]. */
    int32_t correction[TILE_TOKENS][BLOCK_GROUPS * 2];
    /* For wide codes: even bytes of each four, then odd ones. */
    _Alignas(32) int16_t wide[TILE_TOKENS][BLOCK_GROUPS][2][V4_ACT_GROUP / 2];
};

/* What a panel's product must know of a format. */
struct panel_kind {
    int sums, pairs, mins;
};

ALWAYS_INLINE void correct(const struct v4_act *x, size_t t, size_t g0, size_t groups, int offset,
                           struct panel_kind kind, int32_t *out)
{
    const int16_t *sum = x->sum + t * (x->cols / V4_SUM_GROUP) + 2 * g0;
    const int factor = kind.mins ? 1 : -offset;
    for (size_t g = 0; g < groups * (size_t)(1 + kind.pairs); g++) {
        const int32_t value = factor * (kind.pairs ? sum[g] : sum[2 * g] + sum[2 * g + 1]);
        const float real = (float)value;
        memcpy(out + g, kind.mins ? (const void *)&real : (const void *)&value, sizeof *out);
    }
}

ALWAYS_INLINE void set_acts(const struct v4_act *x, size_t first, int n, size_t g0, size_t groups,
                            int offset, struct panel_kind kind, struct tile_acts *a)
{
    a->n_groups = groups;
    UNROLL
    for (int t = 0; t < n; t++) {
        const size_t at = (first + (size_t)t) * (x->cols / V4_ACT_GROUP) + g0;
        a->q[t] = x->q + at * V4_ACT_GROUP;
        a->d[t] = x->d + at;
        if (kind.mins || offset) {
            correct(x, first + (size_t)t, g0, groups, offset, kind, a->correction[t]);
        }
        for (size_t g = 0; g < groups && kind.sums == 0 && !HAS_DPBUSD; g++) {
            const __m256i v =
                _mm256_loadu_si256((const __m256i *)(const void *)(a->q[t] + g * V4_ACT_GROUP));
            _mm256_store_si256((__m256i *)(void *)a->wide[t][g][0], even_bytes(v));
            _mm256_store_si256((__m256i *)(void *)a->wide[t][g][1], odd_bytes(v));
        }
    }
}

ALWAYS_INLINE __m256i four_bytes(const void *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}

ALWAYS_INLINE __m256i code_vector(const uint8_t *codes, int i)
{
    return _mm256_load_si256((const __m256i *)(const void *)codes + i);
}

enum { TILE_OCTETS = 2 };
typedef __m256i tile_dots[TILE_TOKENS][TILE_OCTETS];

#if HAS_DPBUSD
ALWAYS_INLINE void panel_dots(const uint8_t *codes, const struct tile_acts *a, size_t g, int n,
                              int from, int to, struct panel_kind kind, tile_dots dot)
{
    (void)kind;
    UNROLL
    for (int j = from; j < to; j++) {
        const __m256i w0 = code_vector(codes, j), w1 = code_vector(codes, j + V4_ACT_GROUP / 4);
        UNROLL
        for (int t = 0; t < n; t++) {
            const __m256i four = four_bytes(a->q[t] + g * V4_ACT_GROUP + 4 * j);
            dot[t][0] = _mm256_dpbusd_avx_epi32(dot[t][0], w0, four);
            dot[t][1] = _mm256_dpbusd_avx_epi32(dot[t][1], w1, four);
        }
    }
}
#else
/* Adds sums of two products, at most kind.sums of them, to dot. */
ALWAYS_INLINE void narrow_dots(const uint8_t *codes, const struct tile_acts *a, size_t g, int n,
                               int from, int to, tile_dots dot)
{
    const __m256i one = _mm256_set1_epi16(1);
    tile_dots sum;
    UNROLL
    for (int j = from; j < to; j++) {
        const __m256i w0 = code_vector(codes, j), w1 = code_vector(codes, j + V4_ACT_GROUP / 4);
        UNROLL
        for (int t = 0; t < n; t++) {
            const __m256i four = four_bytes(a->q[t] + g * V4_ACT_GROUP + 4 * j);
            const __m256i p0 = _mm256_maddubs_epi16(w0, four), p1 = _mm256_maddubs_epi16(w1, four);
            sum[t][0] = j == from ? p0 : _mm256_add_epi16(sum[t][0], p0);
            sum[t][1] = j == from ? p1 : _mm256_add_epi16(sum[t][1], p1);
            KEEP(sum[t][0]);
            KEEP(sum[t][1]);
        }
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        dot[t][0] = _mm256_add_epi32(dot[t][0], _mm256_madd_epi16(sum[t][0], one));
        dot[t][1] = _mm256_add_epi32(dot[t][1], _mm256_madd_epi16(sum[t][1], one));
    }
}

ALWAYS_INLINE void wide_dots(const uint8_t *codes, const struct tile_acts *a, size_t g, int n,
                             int from, int to, tile_dots dot)
{
    UNROLL
    for (int i = 2 * from; i < 2 * to; i++) {
        const __m256i w0 = code_vector(codes, i), w1 = code_vector(codes, i + V4_ACT_GROUP / 2);
        UNROLL
        for (int t = 0; t < n; t++) {
            const __m256i two = four_bytes(a->wide[t][g][i % 2] + 2 * (i / 2));
            dot[t][0] = _mm256_add_epi32(dot[t][0], _mm256_madd_epi16(w0, two));
            dot[t][1] = _mm256_add_epi32(dot[t][1], _mm256_madd_epi16(w1, two));
            KEEP(dot[t][0]);
            KEEP(dot[t][1]);
        }
    }
}

ALWAYS_INLINE void panel_dots(const uint8_t *codes, const struct tile_acts *a, size_t g, int n,
                              int from, int to, struct panel_kind kind, tile_dots dot)
{
    if (kind.sums == 0) {
        wide_dots(codes, a, g, n, from, to, dot);
        return;
    }
    UNROLL
    for (int j = from; j < to; j += kind.sums) {
        narrow_dots(codes, a, g, n, j, j + kind.sums < to ? j + kind.sums : to, dot);
    }
}
#endif

/* Adds part p of group g of sixteen rows' products, from `dot`, to acc. */
ALWAYS_INLINE void add_part(const float *scale, const struct tile_acts *a, size_t g, int p, int n,
                            struct panel_kind kind, tile_dots dot,
                            __m256 acc[TILE_TOKENS][TILE_OCTETS])
{
    const float *min = scale + (1 + kind.pairs) * V4_PANEL_ROWS;
    UNROLL
    for (int t = 0; t < n; t++) {
        const __m256 d = _mm256_broadcast_ss(a->d[t] + g);
        UNROLL
        for (int o = 0; o < TILE_OCTETS; o++) {
            const int at = p * V4_PANEL_ROWS + o * OCTET;
            __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(dot[t][o]), _mm256_load_ps(scale + at));
            if (kind.mins) {
                const int32_t *sum = &a->correction[t][g * (size_t)(1 + kind.pairs) + (size_t)p];
                v = _mm256_fnmadd_ps(_mm256_load_ps(min + at),
                                     _mm256_castsi256_ps(four_bytes(sum)), v);
            }
            acc[t][o] = _mm256_fmadd_ps(v, d, acc[t][o]);
        }
    }
}

/* Sixteen rows with n tokens. `codes` and `scale` are those of the block's first group. */
ALWAYS_INLINE void panel_tile(const uint8_t *codes, const float *scale, size_t left,
                              const struct tile_acts *a, int n, int is_first, int offset,
                              struct panel_kind kind, float *out, size_t out_stride)
{
    const size_t stride = panel_group_bytes(kind.sums == 0, kind.pairs, kind.mins);
    const int step = V4_ACT_GROUP / 4 / (1 + kind.pairs);
    __m256 acc[TILE_TOKENS][TILE_OCTETS];
    float rows[TILE_TOKENS][TILE_OCTETS * OCTET] = {0};
    const size_t n_rows = left < TILE_OCTETS * OCTET ? left : TILE_OCTETS * OCTET;
    UNROLL
    for (int t = 0; t < n; t++) {
        if (!is_first) {
            memcpy(rows[t], out + (size_t)t * out_stride, n_rows * sizeof *out);
        }
        acc[t][0] = _mm256_loadu_ps(rows[t]);
        acc[t][1] = _mm256_loadu_ps(rows[t] + OCTET);
    }
    for (size_t g = 0; g < a->n_groups; g++) {
        UNROLL
        for (int p = 0; p <= kind.pairs; p++) {
            tile_dots dot;
            UNROLL
            for (int t = 0; t < n; t++) {
                const int32_t *less = &a->correction[t][g * (size_t)(1 + kind.pairs) + (size_t)p];
                const int is_corrected = !kind.mins && offset;
                dot[t][0] = is_corrected ? four_bytes(less) : _mm256_setzero_si256();
                dot[t][1] = dot[t][0];
            }
            panel_dots(codes, a, g, n, p * step, (p + 1) * step, kind, dot);
            add_part(scale, a, g, p, n, kind, dot, acc);
        }
        codes += stride;
        scale = (const float *)(const void *)((const char *)scale + stride);
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        store_rows(out + (size_t)t * out_stride, acc[t][0], n_rows);
        if (n_rows > OCTET) {
            store_rows(out + (size_t)t * out_stride + OCTET, acc[t][1], n_rows - OCTET);
        }
    }
}

/* All rows with n tokens and the groups from g0 on. */
ALWAYS_INLINE void panel_rows(const uint8_t *panel, size_t rows, const struct v4_act *x,
                              size_t first, int n, size_t g0, int offset, struct panel_kind kind,
                              float *out, size_t out_stride)
{
    struct tile_acts a;
    const size_t left = x->cols / V4_ACT_GROUP - g0;
    set_acts(x, first, n, g0, left < BLOCK_GROUPS ? left : BLOCK_GROUPS, offset, kind, &a);
    const size_t octet_bytes = OCTET * V4_ACT_GROUP * code_bytes(kind.sums == 0);
    const uint8_t *from = panel + g0 * panel_group_bytes(kind.sums == 0, kind.pairs, kind.mins);
    const float *scale = (const float *)(const void *)(from + V4_PANEL_ROWS / OCTET * octet_bytes);
    for (size_t r = 0; r < rows; r += TILE_OCTETS * OCTET) {
        panel_tile(from + r / OCTET * octet_bytes, scale + r, rows - r, &a, n, g0 == 0, offset,
                   kind, out + first * out_stride + r, out_stride);
    }
}

ALWAYS_INLINE void panel_product(const void *panel, size_t rows, const struct v4_act *x, int offset,
                                 struct panel_kind kind, float *out, size_t out_stride)
{
    for (size_t g0 = 0; g0 < x->cols / V4_ACT_GROUP; g0 += BLOCK_GROUPS) {
        size_t t = 0;
        for (; t + TILE_TOKENS <= x->n_tokens; t += TILE_TOKENS) {
            panel_rows(panel, rows, x, t, TILE_TOKENS, g0, offset, kind, out, out_stride);
        }
        for (; t < x->n_tokens; t++) {
            panel_rows(panel, rows, x, t, 1, g0, offset, kind, out, out_stride);
        }
    }
}

/* ---- the formats ----------------------------------------------------------------------------- */

/* Name, offset, sums: see struct format. */
#define FAST_FORMATS(FORMAT) \
    FORMAT(Q4_0, q4_0, 8, 8) \
    FORMAT(Q4_1, q4_1, 0, 8) \
    FORMAT(Q5_0, q5_0, 16, 4) \
    FORMAT(Q5_1, q5_1, 0, 4) \
    FORMAT(Q8_0, q8_0, WIDE_OFFSET, 0) \
    FORMAT(Q2_K, q2_k, 0, 8) \
    FORMAT(Q3_K, q3_k, 4, 8) \
    FORMAT(Q4_K, q4_k, 0, 8) \
    FORMAT(Q5_K, q5_k, 0, 4) \
    FORMAT(Q6_K, q6_k, 32, 2) \
    FORMAT(IQ4_NL, iq4_nl, WIDE_OFFSET, 0) \
    FORMAT(IQ4_XS, iq4_xs, WIDE_OFFSET, 0) \
    FORMAT(MXFP4, mxfp4, 12, 4) \
    FORMAT(NVFP4, nvfp4, 12, 4)

/* The rest goes through decode_i8. All have blocks of 256 and no minima. */
#define SLOW_FORMATS(FORMAT) \
    FORMAT(IQ2_XXS, iq2_xxs) \
    FORMAT(IQ2_XS, iq2_xs) \
    FORMAT(IQ2_S, iq2_s) \
    FORMAT(IQ3_XXS, iq3_xxs) \
    FORMAT(IQ3_S, iq3_s) \
    FORMAT(IQ1_S, iq1_s) \
    FORMAT(IQ1_M, iq1_m) \
    FORMAT(TQ1_0, tq1_0) \
    FORMAT(TQ2_0, tq2_0)
SLOW_FORMATS(PREPARE_PLAIN)

#define V4_QUANT(NAME, name, number, len, bytes, group, has_min) \
    enum { NAME##_LEN = len, NAME##_BYTES = bytes, NAME##_PAIRS = (group) == 16,                  \
           NAME##_MINS = has_min };
V4_BLOCKS(V4_QUANT)
#undef V4_QUANT

#define FAST_SLOTS(NAME, name, offset, sums)                                                      \
    static const struct format format_##name = {                                                  \
        prepare_##name, codes_##name, NAME##_LEN, NAME##_BYTES, offset, sums, NAME##_PAIRS,       \
        NAME##_MINS};                                                                             \
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
FAST_FORMATS(FAST_SLOTS)

/* All of these share one copy of the loops for groups of 16 and one for groups of 32. */
#define SLOW_LOOPS(loops, pairs)                                                                  \
    static __attribute__((noinline)) void gemv_##loops(                                           \
        prepare_fn *prepare, int bytes, const void *w, size_t row_bytes, size_t rows,             \
        const struct v4_act *x, float *out, size_t out_stride)                                    \
    {                                                                                             \
        const struct format f = {prepare, codes_plain, V4_MAX_BLOCK_LEN, bytes, WIDE_OFFSET,      \
                                 0,       pairs,       0};                                        \
        gemv_blocks(w, row_bytes, rows, x, out, out_stride, f);                                   \
    }                                                                                             \
    static __attribute__((noinline)) void panel_##loops(prepare_fn *prepare, int bytes,           \
                                                        const void *w, size_t row_bytes,          \
                                                        size_t rows, size_t cols, void *panel)    \
    {                                                                                             \
        const struct format f = {prepare, codes_plain, V4_MAX_BLOCK_LEN, bytes, WIDE_OFFSET,      \
                                 0,       pairs,       0};                                        \
        panel_blocks(w, row_bytes, rows, cols, panel, f);                                         \
    }
SLOW_LOOPS(slow16, 1)
SLOW_LOOPS(slow32, 0)

#define SLOW_SLOTS(NAME, name)                                                                    \
    static void gemv_##name(const void *w, size_t row_bytes, size_t rows, const struct v4_act *x, \
                            float *out, size_t out_stride)                                        \
    {                                                                                             \
        (NAME##_PAIRS ? gemv_slow16 : gemv_slow32)(prepare_##name, NAME##_BYTES, w, row_bytes,    \
                                                   rows, x, out, out_stride);                     \
    }                                                                                             \
    static void panel_##name(const void *w, size_t row_bytes, size_t rows, size_t cols,           \
                             void *panel)                                                         \
    {                                                                                             \
        (NAME##_PAIRS ? panel_slow16 : panel_slow32)(prepare_##name, NAME##_BYTES, w, row_bytes,  \
                                                     rows, cols, panel);                          \
    }
SLOW_FORMATS(SLOW_SLOTS)

/* What gemm_i8 must know of a format, and which of its copies serves it. */
struct panel_format {
    int offset, sums;
};

static struct panel_format panel_format(uint32_t quant)
{
    switch (quant) {
#define PANEL_FORMAT(NAME, name, offset, sums) \
    case V4_##NAME:                            \
        return (struct panel_format){offset, sums};
        FAST_FORMATS(PANEL_FORMAT)
#undef PANEL_FORMAT
    default:
        return (struct panel_format){WIDE_OFFSET, 0};
    }
}

static size_t panel_bytes(uint32_t quant, size_t cols)
{
    const struct v4_quant_info *info = v4_quant_describe(quant);
    const int is_wide = panel_format(quant).sums == 0;
    return cols / V4_ACT_GROUP *
           panel_group_bytes(is_wide, info->group == 16, (int)info->has_min);
}

#define GEMM(name, sums, pairs, mins)                                                             \
    static void gemm_##name(const void *panel, size_t rows, const struct v4_act *x, int offset,   \
                            float *out, size_t out_stride)                                        \
    {                                                                                             \
        const struct panel_kind kind = {sums, pairs, mins};                                       \
        panel_product(panel, rows, x, offset, kind, out, out_stride);                             \
    }
GEMM(8_plain, 8, 0, 0)
GEMM(8_mins, 8, 0, 1)
GEMM(8_pairs, 8, 1, 0)
GEMM(8_pairs_mins, 8, 1, 1)
GEMM(4_plain, 4, 0, 0)
GEMM(4_mins, 4, 0, 1)
GEMM(4_pairs, 4, 1, 0)
GEMM(2_pairs, 2, 1, 0)
GEMM(wide_plain, 0, 0, 0)
GEMM(wide_pairs, 0, 1, 0)

static void gemm_i8(uint32_t quant, const void *panel, size_t rows, const struct v4_act *x,
                    float *out, size_t out_stride)
{
    typedef void gemm_fn(const void *panel, size_t rows, const struct v4_act *x, int offset,
                         float *out, size_t out_stride);
    const struct v4_quant_info *info = v4_quant_describe(quant);
    const struct panel_format format = panel_format(quant);
    const int pairs = info->group == 16, mins = (int)info->has_min;
    gemm_fn *gemm = pairs ? gemm_wide_pairs : gemm_wide_plain;
    if (format.sums == 8) {
        gemm = pairs ? mins ? gemm_8_pairs_mins : gemm_8_pairs : mins ? gemm_8_mins : gemm_8_plain;
    } else if (format.sums == 4) {
        gemm = pairs ? gemm_4_pairs : mins ? gemm_4_mins : gemm_4_plain;
    } else if (format.sums == 2) {
        gemm = gemm_2_pairs;
    }
    gemm(panel, rows, x, format.offset, out, out_stride);
}

#endif
