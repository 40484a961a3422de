/* How AVX2 and AVX-VNNI read each block format: four rows and 256 weights of each at a time.
 *
 * Codes come two groups of 32 weights at a time, a group a 128-bit lane: `lo` has its weights
 * 0..15, `hi` its weights 16..31. A byte is decode_i8's q plus the format's offset, unsigned; or q
 * itself where the format's values fill a byte and WIDE_OFFSET is 0. */
#ifndef V4_YMM_FORMATS_H
#define V4_YMM_FORMATS_H

#include <immintrin.h>

#include "../quant/blocks.h"

#ifndef WIDE_OFFSET
#error "the file that includes this says what is added to values that fill a byte: 0 or 128"
#endif

enum { QUAD = 4, STRETCH_GROUPS = 8, STRETCH_PAIRS = STRETCH_GROUPS / 2 };

/* 256 weights of four rows; fewer where a row of short blocks ends. Element r of lane l of scale
 * and min [.][j] is row r, group 2 j + l; formats with groups of 16 have [0] for the first half of
 * those 32 weights and [1] for the second. */
struct stretch {
    const uint8_t *rows[QUAD];
    __m256 scale[2][STRETCH_PAIRS], min[2][STRETCH_PAIRS];
    /* The weights, for formats that are read by decode_i8. */
    _Alignas(32) int8_t q[QUAD][V4_MAX_BLOCK_LEN];
};

struct codes {
    __m256i lo, hi;
};

/* Scales and minima of the first n groups. */
typedef void prepare_fn(struct stretch *s, int n);
/* Row r, groups 2 j and 2 j + 1. `next` is the distance of their blocks where these are of 32
 * weights: 0 if there is no second. */
typedef struct codes codes_fn(const struct stretch *s, int r, int j, size_t next);

static inline __m128i load_128(const uint8_t *p)
{
    return _mm_loadu_si128((const __m128i *)(const void *)p);
}

static inline __m256i two_lanes(const uint8_t *a, const uint8_t *b)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(a)), load_128(b), 1);
}

static inline __m256i both_lanes(const uint8_t *p)
{
    return _mm256_broadcastsi128_si256(load_128(p));
}

static inline __m256i low_bits(__m256i v, int mask)
{
    return _mm256_and_si256(v, _mm256_set1_epi8((char)mask));
}

/* Bytes shifted right by `first` in lane 0 and `first` + `step` in lane 1, cut to `mask`. */
static inline __m256i lane_bits(__m256i v, int first, int step, int mask)
{
    const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, step, step, step, step);
    const __m256i by = _mm256_add_epi32(_mm256_set1_epi32(first), lanes);
    return low_bits(_mm256_srlv_epi32(v, by), mask);
}

static inline __m256i look_up(const int8_t *table, __m256i codes)
{
    return _mm256_shuffle_epi8(both_lanes((const uint8_t *)table), codes);
}

/* ---- scales ---------------------------------------------------------------------------------- */

/* A half at byte `at` of each block of 32 weights. */
static inline void block_halves(const struct stretch *s, int n, size_t bytes, size_t at,
                                __m256 out[STRETCH_PAIRS])
{
    /* [two groups][group][row]: through memory, for it costs no work of the vector units. */
    _Alignas(16) uint16_t halves[STRETCH_PAIRS][2][QUAD];
    if (n < STRETCH_GROUPS) {
        memset(halves, 0, sizeof halves);
    }
    for (int r = 0; r < QUAD; r++) {
        const uint8_t *p = s->rows[r] + at;
        for (int g = 0; g < n; g++, p += bytes) {
            halves[g / 2][g % 2][r] = v4_load_u16(p);
        }
    }
    for (int j = 0; j < STRETCH_PAIRS; j++) {
        out[j] = _mm256_cvtph_ps(_mm_load_si128((const __m128i *)(const void *)halves[j]));
    }
}

/* The whole of a stretch is worth a copy that knows how much it is. */
static inline void halves_at(const struct stretch *s, int n, size_t bytes, size_t at,
                             __m256 out[STRETCH_PAIRS])
{
    if (n == STRETCH_GROUPS) {
        block_halves(s, STRETCH_GROUPS, bytes, at, out);
    } else {
        block_halves(s, n, bytes, at, out);
    }
}

static inline void negate(__m256 v[STRETCH_PAIRS])
{
    for (int j = 0; j < STRETCH_PAIRS; j++) {
        v[j] = _mm256_xor_ps(v[j], _mm256_set1_ps(-0.0f));
    }
}

/* Element j of lane l of v[r] as element r of lane l of out[j]. */
static inline void turn(const __m256 v[QUAD], __m256 out[STRETCH_PAIRS])
{
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
    out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
}

/* A half in all elements. */
static inline __m256 half_at(const uint8_t *p)
{
    return _mm256_cvtph_ps(_mm_set1_epi16((short)v4_load_u16(p)));
}

/* Eight bytes of a block, even groups to lane 0 and odd ones to lane 1, times `factor`. */
static inline __m256 eight_scales(uint64_t bytes, __m256 factor)
{
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i sorted = _mm_shuffle_epi8(_mm_cvtsi64_si128((int64_t)bytes), order);
    return _mm256_mul_ps(factor, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(sorted)));
}

/* Sixteen signed bytes of a block of groups of 16, in order, times `factor`. */
static inline void sixteen_scales(__m128i bytes, __m256 factor, __m256 out[2])
{
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
    const __m128i sorted = _mm_shuffle_epi8(bytes, order);
    const __m256i first = _mm256_cvtepi8_epi32(sorted);
    const __m256i second = _mm256_cvtepi8_epi32(_mm_srli_si128(sorted, 8));
    out[0] = _mm256_mul_ps(factor, _mm256_cvtepi32_ps(first));
    out[1] = _mm256_mul_ps(factor, _mm256_cvtepi32_ps(second));
}

/* ---- blocks of 32 and 64 weights ------------------------------------------------------------- */

static inline struct codes nibbles(__m256i v)
{
    return (struct codes){low_bits(v, 15), low_bits(_mm256_srli_epi16(v, 4), 15)};
}

#define BLOCK_AT(name) (s->rows[r] + 2 * (size_t)j * sizeof(struct v4_block_##name))

static inline void prepare_q4_0(struct stretch *s, int n)
{
    halves_at(s, n, sizeof(struct v4_block_q4_0), 0, s->scale[0]);
}

static inline struct codes codes_q4_0(const struct stretch *s, int r, int j, size_t next)
{
    const uint8_t *p = BLOCK_AT(q4_0) + 2;
    return nibbles(two_lanes(p, p + next));
}

static inline void prepare_q4_1(struct stretch *s, int n)
{
    halves_at(s, n, sizeof(struct v4_block_q4_1), 0, s->scale[0]);
    halves_at(s, n, sizeof(struct v4_block_q4_1), 2, s->min[0]);
    negate(s->min[0]);
}

static inline struct codes codes_q4_1(const struct stretch *s, int r, int j, size_t next)
{
    const uint8_t *p = BLOCK_AT(q4_1) + 4;
    return nibbles(two_lanes(p, p + next));
}

/* Sixteen bits from byte `at` of the first word of each lane, as 16 in sixteen bytes. */
static inline __m256i spread_bits(__m256i v, int at)
{
    const __m128i bytes = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m128i from = _mm_add_epi8(bytes, _mm_set1_epi8((char)at));
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201u);
    const __m256i v8 = _mm256_and_si256(
        _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(from)), bit);
    return low_bits(_mm256_cmpeq_epi8(v8, bit), 16);
}

/* A block of 22 or 24 bytes that ends with four bytes of fifth bits and sixteen of nibbles. */
static inline struct codes fives(const uint8_t *fifth, size_t next)
{
    struct codes c = nibbles(two_lanes(fifth + 4, fifth + next + 4));
    const __m128i a = _mm_cvtsi32_si128((int)v4_load_u32(fifth));
    const __m128i b = _mm_cvtsi32_si128((int)v4_load_u32(fifth + next));
    const __m256i bits = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    c.lo = _mm256_or_si256(c.lo, spread_bits(bits, 0));
    c.hi = _mm256_or_si256(c.hi, spread_bits(bits, 2));
    return c;
}

static inline void prepare_q5_0(struct stretch *s, int n)
{
    halves_at(s, n, sizeof(struct v4_block_q5_0), 0, s->scale[0]);
}

static inline struct codes codes_q5_0(const struct stretch *s, int r, int j, size_t next)
{
    return fives(BLOCK_AT(q5_0) + 2, next);
}

static inline void prepare_q5_1(struct stretch *s, int n)
{
    halves_at(s, n, sizeof(struct v4_block_q5_1), 0, s->scale[0]);
    halves_at(s, n, sizeof(struct v4_block_q5_1), 2, s->min[0]);
    negate(s->min[0]);
}

static inline struct codes codes_q5_1(const struct stretch *s, int r, int j, size_t next)
{
    return fives(BLOCK_AT(q5_1) + 4, next);
}

static inline __m256i wide(__m256i q)
{
    return WIDE_OFFSET ? _mm256_xor_si256(q, _mm256_set1_epi8(-128)) : q;
}

static inline void prepare_q8_0(struct stretch *s, int n)
{
    halves_at(s, n, sizeof(struct v4_block_q8_0), 0, s->scale[0]);
}

static inline struct codes codes_q8_0(const struct stretch *s, int r, int j, size_t next)
{
    const uint8_t *p = BLOCK_AT(q8_0) + 2;
    return (struct codes){wide(two_lanes(p, p + next)), wide(two_lanes(p + 16, p + next + 16))};
}

#define WIDE(x) (int8_t)(WIDE_OFFSET ? (x) < 0 ? (x) + 128 : (x) - 128 : (x))
_Alignas(16) static const int8_t iq4_table[16] = {
    WIDE(-127), WIDE(-104), WIDE(-83), WIDE(-65), WIDE(-49), WIDE(-35), WIDE(-22), WIDE(-10),
    WIDE(1),    WIDE(13),   WIDE(25),  WIDE(38),  WIDE(53),  WIDE(69),  WIDE(89),  WIDE(113)};

static inline void prepare_iq4_nl(struct stretch *s, int n)
{
    prepare_q4_0(s, n);
}

static inline struct codes codes_iq4_nl(const struct stretch *s, int r, int j, size_t next)
{
    const struct codes c = codes_q4_0(s, r, j, next);
    return (struct codes){look_up(iq4_table, c.lo), look_up(iq4_table, c.hi)};
}

/* e2m1 doubled, plus 12, the format's offset. */
_Alignas(16) static const int8_t e2m1_table[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                   12, 11, 10, 9,  8,  6,  4,  0};

static inline void prepare_mxfp4(struct stretch *s, int n)
{
    uint8_t e[STRETCH_PAIRS][2][QUAD] = {0};
    for (int r = 0; r < QUAD; r++) {
        for (int g = 0; g < n; g++) {
            e[g / 2][g % 2][r] = s->rows[r][(size_t)g * sizeof(struct v4_block_mxfp4)];
        }
    }
    for (int j = 0; j < STRETCH_PAIRS; j++) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)e[j]);
        const __m256i v = _mm256_cvtepu8_epi32(bytes);
        const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(v, _mm256_set1_epi32(1)), 23);
        const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), v);
        const __m256i tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), v);
        s->scale[0][j] = _mm256_castsi256_ps(_mm256_blendv_epi8(normal, subnormal, tiny));
    }
}

static inline struct codes codes_mxfp4(const struct stretch *s, int r, int j, size_t next)
{
    const uint8_t *p = BLOCK_AT(mxfp4) + 1;
    const struct codes c = nibbles(two_lanes(p, p + next));
    return (struct codes){look_up(e2m1_table, c.lo), look_up(e2m1_table, c.hi)};
}

static inline void prepare_nvfp4(struct stretch *s, int n)
{
    uint8_t d[2][STRETCH_PAIRS][2][QUAD] = {0};
    for (int r = 0; r < QUAD; r++) {
        for (int g = 0; g < n; g++) {
            const uint8_t *block = s->rows[r] + (size_t)(g / 2) * sizeof(struct v4_block_nvfp4);
            d[0][g / 2][g % 2][r] = block[2 * (g % 2)];
            d[1][g / 2][g % 2][r] = block[2 * (g % 2) + 1];
        }
    }
    for (int i = 0; i < 2 * STRETCH_PAIRS; i++) {
        const uint8_t *from = &d[i / STRETCH_PAIRS][i % STRETCH_PAIRS][0][0];
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)from);
        const __m128i v = _mm_cvtepu8_epi16(bytes), mask = _mm_set1_epi16(0x7f);
        /* Only the NaN without a sign is 0: see v4_half_of_ue4m3. */
        const __m128i nan = _mm_cmpeq_epi16(v, mask);
        /* e4m3 as half precision has the same bits, 2^8 too small; the table is doubled. */
        const __m128i half = _mm_slli_epi16(_mm_andnot_si128(nan, _mm_and_si128(v, mask)), 7);
        s->scale[i / STRETCH_PAIRS][i % STRETCH_PAIRS] =
            _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(128));
    }
}

static inline struct codes codes_nvfp4(const struct stretch *s, int r, int j, size_t next)
{
    (void)next;
    const uint8_t *p = s->rows[r] + (size_t)j * sizeof(struct v4_block_nvfp4) + 4;
    const struct codes c = nibbles(two_lanes(p, p + 16));
    const __m256i low = look_up(e2m1_table, c.lo), high = look_up(e2m1_table, c.hi);
    return (struct codes){_mm256_unpacklo_epi64(low, high), _mm256_unpackhi_epi64(low, high)};
}

/* ---- blocks of 256 weights ------------------------------------------------------------------- */

/* Also of Q5_K: see v4_k_scale_min. */
static inline void prepare_q4_k(struct stretch *s, int n)
{
    (void)n;
    __m256 scale[QUAD], min[QUAD];
    for (int r = 0; r < QUAD; r++) {
        const struct v4_block_q4_k *block = (const void *)s->rows[r];
        const uint32_t a = v4_load_u32(block->scales), b = v4_load_u32(block->scales + 4);
        const uint32_t e = v4_load_u32(block->scales + 8);
        const uint32_t s4 = (e & 0x0f0f0f0f) | (a >> 2 & 0x30303030);
        const uint32_t m4 = (e >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030);
        scale[r] = eight_scales((a & 0x3f3f3f3f) | (uint64_t)s4 << 32, half_at(block->d));
        min[r] = eight_scales((b & 0x3f3f3f3f) | (uint64_t)m4 << 32, half_at(block->dmin));
    }
    turn(scale, s->scale[0]);
    turn(min, s->min[0]);
}

static inline struct codes k_nibbles(const uint8_t *qs)
{
    return (struct codes){lane_bits(both_lanes(qs), 0, 4, 15),
                          lane_bits(both_lanes(qs + 16), 0, 4, 15)};
}

static inline struct codes codes_q4_k(const struct stretch *s, int r, int j, size_t next)
{
    (void)next;
    const struct v4_block_q4_k *block = (const void *)s->rows[r];
    return k_nibbles(block->qs + 32 * j);
}

static inline void prepare_q5_k(struct stretch *s, int n)
{
    prepare_q4_k(s, n);
}

static inline __m256i with_bits(__m256i v, __m256i bits, int by)
{
    return _mm256_or_si256(v, _mm256_slli_epi16(bits, by));
}

static inline struct codes codes_q5_k(const struct stretch *s, int r, int j, size_t next)
{
    (void)next;
    const struct v4_block_q5_k *block = (const void *)s->rows[r];
    struct codes c = k_nibbles(block->qs + 32 * j);
    c.lo = with_bits(c.lo, lane_bits(both_lanes(block->qh), 2 * j, 1, 1), 4);
    c.hi = with_bits(c.hi, lane_bits(both_lanes(block->qh + 16), 2 * j, 1, 1), 4);
    return c;
}

static inline void prepare_q6_k(struct stretch *s, int n)
{
    (void)n;
    __m256 scale[2][QUAD];
    for (int r = 0; r < QUAD; r++) {
        const struct v4_block_q6_k *block = (const void *)s->rows[r];
        __m256 v[2];
        sixteen_scales(load_128((const uint8_t *)block->scales), half_at(block->d), v);
        scale[0][r] = v[0];
        scale[1][r] = v[1];
    }
    turn(scale[0], s->scale[0]);
    turn(scale[1], s->scale[1]);
}

static inline struct codes codes_q6_k(const struct stretch *s, int r, int j, size_t next)
{
    (void)next;
    const struct v4_block_q6_k *block = (const void *)s->rows[r];
    const uint8_t *ql = block->ql + 64 * (j / 2), *qh = block->qh + 32 * (j / 2);
    const int by = 4 * (j % 2);
    const __m256i lo = lane_bits(two_lanes(ql, ql + 32), by, 0, 15);
    const __m256i hi = lane_bits(two_lanes(ql + 16, ql + 48), by, 0, 15);
    return (struct codes){with_bits(lo, lane_bits(both_lanes(qh), by, 2, 3), 4),
                          with_bits(hi, lane_bits(both_lanes(qh + 16), by, 2, 3), 4)};
}

static inline void prepare_q2_k(struct stretch *s, int n)
{
    (void)n;
    __m256 scale[2][QUAD], min[2][QUAD];
    for (int r = 0; r < QUAD; r++) {
        const struct v4_block_q2_k *block = (const void *)s->rows[r];
        const __m128i both = load_128(block->scales), mask = _mm_set1_epi8(15);
        __m256 v[2], m[2];
        sixteen_scales(_mm_and_si128(both, mask), half_at(block->d), v);
        sixteen_scales(_mm_and_si128(_mm_srli_epi16(both, 4), mask), half_at(block->dmin), m);
        for (int p = 0; p < 2; p++) {
            scale[p][r] = v[p];
            min[p][r] = m[p];
        }
    }
    for (int p = 0; p < 2; p++) {
        turn(scale[p], s->scale[p]);
        turn(min[p], s->min[p]);
    }
}

static inline struct codes codes_q2_k(const struct stretch *s, int r, int j, size_t next)
{
    (void)next;
    const struct v4_block_q2_k *block = (const void *)s->rows[r];
    const uint8_t *qs = block->qs + 32 * (j / 2);
    return (struct codes){lane_bits(both_lanes(qs), 4 * (j % 2), 2, 3),
                          lane_bits(both_lanes(qs + 16), 4 * (j % 2), 2, 3)};
}

static inline void prepare_q3_k(struct stretch *s, int n)
{
    (void)n;
    __m256 scale[2][QUAD];
    for (int r = 0; r < QUAD; r++) {
        const struct v4_block_q3_k *block = (const void *)s->rows[r];
        const __m128i a = _mm_cvtsi32_si128((int)v4_load_u32(block->scales));
        const __m128i b = _mm_cvtsi32_si128((int)v4_load_u32(block->scales + 4));
        const uint32_t c = v4_load_u32(block->scales + 8);
        const __m128i ab = _mm_unpacklo_epi32(a, b);
        const __m128i low = _mm_unpacklo_epi64(ab, _mm_srli_epi16(ab, 4));
        const __m128i high = _mm_srlv_epi32(_mm_set1_epi32((int)c), _mm_setr_epi32(0, 2, 4, 6));
        const __m128i s6 = _mm_or_si128(
            _mm_and_si128(low, _mm_set1_epi8(15)),
            _mm_slli_epi16(_mm_and_si128(high, _mm_set1_epi8(3)), 4));
        __m256 v[2];
        sixteen_scales(_mm_sub_epi8(s6, _mm_set1_epi8(32)), half_at(block->d), v);
        scale[0][r] = v[0];
        scale[1][r] = v[1];
    }
    turn(scale[0], s->scale[0]);
    turn(scale[1], s->scale[1]);
}

static inline struct codes codes_q3_k(const struct stretch *s, int r, int j, size_t next)
{
    (void)next;
    const struct v4_block_q3_k *block = (const void *)s->rows[r];
    const uint8_t *qs = block->qs + 32 * (j / 2);
    const __m256i lo = lane_bits(both_lanes(qs), 4 * (j % 2), 2, 3);
    const __m256i hi = lane_bits(both_lanes(qs + 16), 4 * (j % 2), 2, 3);
    return (struct codes){
        with_bits(lo, lane_bits(both_lanes(block->hmask), 2 * j, 1, 1), 2),
        with_bits(hi, lane_bits(both_lanes(block->hmask + 16), 2 * j, 1, 1), 2)};
}

static inline void prepare_iq4_xs(struct stretch *s, int n)
{
    (void)n;
    __m256 scale[QUAD];
    for (int r = 0; r < QUAD; r++) {
        const struct v4_block_iq4_xs *block = (const void *)s->rows[r];
        const uint32_t l = v4_load_u32(block->scales_l);
        const uint64_t nibbles = (l & 0x0f0f0f0f) | (uint64_t)(l >> 4 & 0x0f0f0f0f) << 32;
        const __m256i low = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)nibbles));
        const __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32(v4_load_u16(block->scales_h)),
                                               _mm256_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14));
        const __m256i upper =
            _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4);
        const __m256i v = _mm256_sub_epi32(_mm256_or_si256(low, upper), _mm256_set1_epi32(32));
        scale[r] = _mm256_mul_ps(half_at(block->d), _mm256_cvtepi32_ps(v));
    }
    turn(scale, s->scale[0]);
}

static inline struct codes codes_iq4_xs(const struct stretch *s, int r, int j, size_t next)
{
    (void)next;
    const struct v4_block_iq4_xs *block = (const void *)s->rows[r];
    const uint8_t *qs = block->qs + 32 * j;
    const struct codes c = nibbles(two_lanes(qs, qs + 16));
    return (struct codes){look_up(iq4_table, c.lo), look_up(iq4_table, c.hi)};
}

/* ---- formats that are read by decode_i8 ------------------------------------------------------ */

/* Scales as decode_i8 gives them to where a stretch has them. None of these formats has minima. */
static inline void spread_scales(float scale[QUAD][V4_MAX_BLOCK_LEN / V4_SUM_GROUP], int pairs,
                                 struct stretch *s)
{
    for (int p = 0; p <= pairs; p++) {
        __m256 v[QUAD];
        for (int r = 0; r < QUAD; r++) {
            float sorted[STRETCH_GROUPS];
            for (int g = 0; g < STRETCH_GROUPS; g++) {
                sorted[g % 2 * STRETCH_PAIRS + g / 2] = scale[r][(1 + pairs) * g + p];
            }
            v[r] = _mm256_loadu_ps(sorted);
        }
        turn(v, s->scale[p]);
    }
}

static inline struct codes codes_plain(const struct stretch *s, int r, int j, size_t next)
{
    (void)next;
    const uint8_t *q = (const uint8_t *)s->q[r] + 64 * j;
    return (struct codes){wide(two_lanes(q, q + 32)), wide(two_lanes(q + 16, q + 48))};
}

#define PREPARE_PLAIN(NAME, name)                                                                \
    static __attribute__((noinline)) void prepare_##name(struct stretch *s, int n)               \
    {                                                                                            \
        (void)n;                                                                                 \
        float scale[QUAD][V4_MAX_BLOCK_LEN / V4_SUM_GROUP], min[V4_MAX_BLOCK_LEN / V4_SUM_GROUP]; \
        for (int r = 0; r < QUAD; r++) {                                                         \
            v4_##name##_decode_i8((const void *)s->rows[r], s->q[r], scale[r], min);             \
        }                                                                                        \
        spread_scales(scale, V4_##NAME##_GROUP == 16, s);                                        \
    }

#endif
