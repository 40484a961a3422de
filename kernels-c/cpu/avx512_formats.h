/* How AVX-512 reads each block format: 128 weights of a row at a time, as unsigned bytes.
 *
 * A chunk is four groups of 32 weights. `lo` has weights 0..15 of each group, a group a 128-bit
 * lane, `hi` weights 16..31. A byte is decode_i8's q plus the format's offset, so that it is
 * unsigned, as vpdpbusd wants one of its sides. Scales (and minima) are one a group, or, in formats
 * with groups of 16, [0] for `lo` and [1] for `hi`. */
#ifndef V4_AVX512_FORMATS_H
#define V4_AVX512_FORMATS_H

#include <immintrin.h>

#include "../quant/blocks.h"

struct chunk {
    __m512i lo, hi;
    __m128 scale[2], min[2];
};

/* Reads chunk `half` of the bytes at p, which are `unit` bytes and hold `halves` chunks. */
typedef void load_chunk_fn(const uint8_t *p, int half, struct chunk *c);

/* What the loops must know of a format. All of it is constant where it is used. */
struct format {
    load_chunk_fn *load;
    int unit;   /* bytes of `halves` chunks */
    int halves; /* 2 where a block has 256 weights, else 1 */
    int offset; /* added to each q */
    int pairs;  /* 1 where groups have 16 weights */
    int mins;   /* 1 where groups have a minimum */
};

/* Where byte b of a stretch is, in words, when it is loaded as 64 bytes from 0 and 64 from
 * `second`. */
#define WORD(b, second) ((b) < 64 ? (b) / 2 : 32 + ((b) - (second)) / 2)
#define WORDS(b, s)                                                                              \
    WORD(b, s), WORD((b) + 2, s), WORD((b) + 4, s), WORD((b) + 6, s), WORD((b) + 8, s),          \
        WORD((b) + 10, s), WORD((b) + 12, s), WORD((b) + 14, s)
/* The sixteen bytes from `at` of four blocks of `size` bytes, and two bytes of each. */
#define SIXTEEN(at, size, s)                                                                     \
    {WORDS(at, s), WORDS((at) + (size), s), WORDS((at) + 2 * (size), s),                         \
     WORDS((at) + 3 * (size), s)}
#define TWO(at, size, s)                                                                         \
    WORD(at, s), WORD((at) + (size), s), WORD((at) + 2 * (size), s), WORD((at) + 3 * (size), s)

/* Two loads that cover four blocks, and words picked from them. */
static inline __m512i pick(__m512i first, const uint16_t *words, __m512i second)
{
    return _mm512_permutex2var_epi16(first, _mm512_load_si512(words), second);
}

static inline __m128 halves_to_floats(__m512i v)
{
    return _mm_cvtph_ps(_mm512_castsi512_si128(v));
}

/* One half-precision number in eight lanes. */
static inline __m256 half_in_lanes(const uint8_t *p)
{
    return _mm256_cvtph_ps(_mm_set1_epi16((short)v4_load_u16(p)));
}

static inline __m512i low_nibbles(__m512i v)
{
    return _mm512_and_si512(v, _mm512_set1_epi8(15));
}

static inline __m512i high_nibbles(__m512i v)
{
    return low_nibbles(_mm512_srli_epi16(v, 4));
}

static inline __m512i look_up(const int8_t *table, __m512i codes)
{
    const __m128i values = _mm_load_si128((const __m128i *)(const void *)table);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), codes);
}

/* Lanes 0, 2 of a and of b, and lanes 1, 3: from weights in order to `lo` and `hi`. */
static inline __m512i even_lanes(__m512i a, __m512i b)
{
    return _mm512_shuffle_i32x4(a, b, 0x88);
}

static inline __m512i odd_lanes(__m512i a, __m512i b)
{
    return _mm512_shuffle_i32x4(a, b, 0xdd);
}

static inline __m128i load_u32(const uint8_t *p)
{
    return _mm_cvtsi32_si128((int)v4_load_u32(p));
}

_Alignas(64) static const uint16_t q4_0_codes[32] = SIXTEEN(2, 18, 8);
_Alignas(64) static const uint16_t q4_0_scales[32] = {TWO(0, 18, 8)};

static inline void load_q4_0(const uint8_t *p, int half, struct chunk *c)
{
    (void)half;
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 8);
    const __m512i codes = pick(a, q4_0_codes, b);
    c->lo = low_nibbles(codes);
    c->hi = high_nibbles(codes);
    c->scale[0] = halves_to_floats(pick(a, q4_0_scales, b));
}

/* The table plus 128, the format's offset. */
_Alignas(16) static const int8_t iq4_table[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                  -127, -115, -103, -90, -75, -59, -39, -15};

static inline void load_iq4_nl(const uint8_t *p, int half, struct chunk *c)
{
    load_q4_0(p, half, c);
    c->lo = look_up(iq4_table, c->lo);
    c->hi = look_up(iq4_table, c->hi);
}

static inline void load_iq4_xs(const uint8_t *p, int half, struct chunk *c)
{
    const struct v4_block_iq4_xs *block = (const void *)p;
    const __m512i codes = _mm512_loadu_si512(block->qs + 64 * half);
    c->lo = look_up(iq4_table, low_nibbles(codes));
    c->hi = look_up(iq4_table, high_nibbles(codes));
    const unsigned l = v4_load_u16(block->scales_l + 2 * half);
    const unsigned h = v4_load_u16(block->scales_h) >> (8 * half);
    const __m128i low = _mm_and_si128(
        _mm_srlv_epi32(_mm_set1_epi32((int)l), _mm_setr_epi32(0, 4, 8, 12)), _mm_set1_epi32(15));
    const __m128i high = _mm_and_si128(
        _mm_sllv_epi32(_mm_set1_epi32((int)(h & 255)), _mm_setr_epi32(4, 2, 0, 0)),
        _mm_set1_epi32(48));
    const __m128i last = _mm_and_si128(_mm_set1_epi32((int)(h >> 2)), _mm_setr_epi32(0, 0, 0, 48));
    const __m128i high4 = _mm_blend_epi32(high, last, 8);
    const __m128i s = _mm_sub_epi32(_mm_or_si128(low, high4), _mm_set1_epi32(32));
    c->scale[0] = _mm_mul_ps(_mm256_castps256_ps128(half_in_lanes(block->d)), _mm_cvtepi32_ps(s));
}

_Alignas(64) static const uint16_t q4_1_codes[32] = SIXTEEN(4, 20, 16);
_Alignas(64) static const uint16_t q4_1_scales[32] = {TWO(0, 20, 16), TWO(2, 20, 16)};

static inline void load_q4_1(const uint8_t *p, int half, struct chunk *c)
{
    (void)half;
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 16);
    const __m512i codes = pick(a, q4_1_codes, b);
    c->lo = low_nibbles(codes);
    c->hi = high_nibbles(codes);
    const __m256 scales = _mm256_cvtph_ps(_mm512_castsi512_si128(pick(a, q4_1_scales, b)));
    c->scale[0] = _mm256_castps256_ps128(scales);
    c->min[0] = _mm_xor_ps(_mm256_extractf128_ps(scales, 1), _mm_set1_ps(-0.0f));
}

/* Sets bit 4 of the bytes that a mask names. */
static inline __m512i fifth_bits(__m512i codes, uint64_t mask)
{
    return _mm512_mask_add_epi8(codes, mask, codes, _mm512_set1_epi8(16));
}

static inline uint64_t word64(__m512i v, int i)
{
    return (uint64_t)(i == 0 ? _mm_cvtsi128_si64(_mm512_castsi512_si128(v))
                             : _mm_extract_epi64(_mm512_castsi512_si128(v), 1));
}

_Alignas(64) static const uint16_t q5_0_codes[32] = SIXTEEN(6, 22, 24);
_Alignas(64) static const uint16_t q5_0_scales[32] = {TWO(0, 22, 24)};
_Alignas(64) static const uint16_t q5_0_fifth[32] = {TWO(2, 22, 24), TWO(4, 22, 24)};

static inline void load_q5_0(const uint8_t *p, int half, struct chunk *c)
{
    (void)half;
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 24);
    const __m512i codes = pick(a, q5_0_codes, b), fifth = pick(a, q5_0_fifth, b);
    c->lo = fifth_bits(low_nibbles(codes), word64(fifth, 0));
    c->hi = fifth_bits(high_nibbles(codes), word64(fifth, 1));
    c->scale[0] = halves_to_floats(pick(a, q5_0_scales, b));
}

_Alignas(64) static const uint16_t q5_1_codes[32] = SIXTEEN(8, 24, 32);
_Alignas(64) static const uint16_t q5_1_scales[32] = {TWO(0, 24, 32), TWO(2, 24, 32)};
_Alignas(64) static const uint16_t q5_1_fifth[32] = {TWO(4, 24, 32), TWO(6, 24, 32)};

static inline void load_q5_1(const uint8_t *p, int half, struct chunk *c)
{
    (void)half;
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 32);
    const __m512i codes = pick(a, q5_1_codes, b), fifth = pick(a, q5_1_fifth, b);
    c->lo = fifth_bits(low_nibbles(codes), word64(fifth, 0));
    c->hi = fifth_bits(high_nibbles(codes), word64(fifth, 1));
    const __m256 scales = _mm256_cvtph_ps(_mm512_castsi512_si128(pick(a, q5_1_scales, b)));
    c->scale[0] = _mm256_castps256_ps128(scales);
    c->min[0] = _mm_xor_ps(_mm256_extractf128_ps(scales, 1), _mm_set1_ps(-0.0f));
}

/* Four blocks are 136 bytes: the last eight come with a second pair of loads. */
_Alignas(64) static const uint16_t q8_0_lo[32] = SIXTEEN(2, 34, 64);
_Alignas(64) static const uint16_t q8_0_hi[32] = SIXTEEN(10, 34, 64);
_Alignas(64) static const uint16_t q8_0_scales[32] = {TWO(0, 34, 64)};

static inline void load_q8_0(const uint8_t *p, int half, struct chunk *c)
{
    (void)half;
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64);
    const __m512i a8 = _mm512_loadu_si512(p + 8), b8 = _mm512_loadu_si512(p + 72);
    const __m512i offset = _mm512_set1_epi8(-128);
    c->lo = _mm512_xor_si512(pick(a, q8_0_lo, b), offset);
    c->hi = _mm512_xor_si512(pick(a8, q8_0_hi, b8), offset);
    c->scale[0] = halves_to_floats(pick(a, q8_0_scales, b));
}

/* e2m1 doubled, plus 12, the format's offset. */
_Alignas(16) static const int8_t e2m1_table[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                   12, 11, 10, 9,  8,  6,  4,  0};

static inline void load_mxfp4(const uint8_t *p, int half, struct chunk *c)
{
    (void)half;
    __m512i codes = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(const void *)(p + 1)));
    const uint8_t *q = p + 1;
    codes = _mm512_inserti32x4(codes, _mm_loadu_si128((const __m128i *)(const void *)(q + 17)), 1);
    codes = _mm512_inserti32x4(codes, _mm_loadu_si128((const __m128i *)(const void *)(q + 34)), 2);
    codes = _mm512_inserti32x4(codes, _mm_loadu_si128((const __m128i *)(const void *)(q + 51)), 3);
    c->lo = look_up(e2m1_table, low_nibbles(codes));
    c->hi = look_up(e2m1_table, high_nibbles(codes));
    const uint32_t bytes = (uint32_t)p[0] | (uint32_t)p[17] << 8 | (uint32_t)p[34] << 16 |
                           (uint32_t)p[51] << 24;
    const __m128i e = _mm_cvtepu8_epi32(_mm_cvtsi32_si128((int)bytes));
    const __m128i normal = _mm_slli_epi32(_mm_sub_epi32(e, _mm_set1_epi32(1)), 23);
    const __m128i subnormal = _mm_sllv_epi32(_mm_set1_epi32(0x00200000), e);
    const __mmask8 tiny = _mm_cmplt_epi32_mask(e, _mm_set1_epi32(2));
    c->scale[0] = _mm_castsi128_ps(_mm_mask_mov_epi32(normal, tiny, subnormal));
}

/* Two blocks of 36 bytes. */
_Alignas(64) static const uint16_t nvfp4_codes[32] = {
    WORDS(4, 8), WORDS(20, 8), WORDS(40, 8), WORDS(56, 8)};

static inline void load_nvfp4(const uint8_t *p, int half, struct chunk *c)
{
    (void)half;
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 8);
    const __m512i codes = pick(a, nvfp4_codes, b);
    const __m512i low = look_up(e2m1_table, low_nibbles(codes));
    const __m512i high = look_up(e2m1_table, high_nibbles(codes));
    c->lo = _mm512_unpacklo_epi64(low, high);
    c->hi = _mm512_unpackhi_epi64(low, high);
    /* e4m3 as half precision has the same bits, 2^8 too small; the table is doubled. */
    const __m128i d = _mm_unpacklo_epi32(load_u32(p), load_u32(p + 36));
    const __m128i even = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i sorted = _mm_shuffle_epi8(d, even);
    const __mmask16 nan = _mm_cmpeq_epi8_mask(sorted, _mm_set1_epi8(0x7f));
    const __m128i bits = _mm_and_si128(_mm_mask_mov_epi8(sorted, nan, _mm_setzero_si128()),
                                       _mm_set1_epi8(0x7f));
    const __m128i half_bits = _mm_slli_epi16(_mm_cvtepu8_epi16(bits), 7);
    const __m256 scales = _mm256_mul_ps(_mm256_cvtph_ps(half_bits), _mm256_set1_ps(128));
    c->scale[0] = _mm256_castps256_ps128(scales);
    c->scale[1] = _mm256_extractf128_ps(scales, 1);
}

/* Half a superblock's scales and minima, also of Q5_K: see v4_k_scale_min. */
static inline void k_scales(const uint8_t *d, const uint8_t *scales, int half, struct chunk *c)
{
    const uint32_t a = v4_load_u32(scales), b = v4_load_u32(scales + 4);
    const uint32_t e = v4_load_u32(scales + 8);
    const uint32_t s = half ? (e & 0x0f0f0f0f) | (a >> 2 & 0x30303030) : a & 0x3f3f3f3f;
    const uint32_t m = half ? (e >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030) : b & 0x3f3f3f3f;
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)(s | (uint64_t)m << 32)));
    const __m256 d_dmin = _mm256_castps128_ps256(_mm_cvtph_ps(load_u32(d)));
    const __m256i eight = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m256 factors = _mm256_permutevar8x32_ps(d_dmin, eight);
    const __m256 product = _mm256_mul_ps(factors, _mm256_cvtepi32_ps(bytes));
    c->scale[0] = _mm256_castps256_ps128(product);
    c->min[0] = _mm256_extractf128_ps(product, 1);
}

/* Groups 0, 2 in the low nibbles and 1, 3 in the high ones: in order, first halves and second. */
_Alignas(64) static const uint64_t k_lo[8] = {0, 1, 8, 9, 4, 5, 12, 13};
_Alignas(64) static const uint64_t k_hi[8] = {2, 3, 10, 11, 6, 7, 14, 15};

static inline void k_codes(const uint8_t *qs, int half, struct chunk *c)
{
    const __m512i codes = _mm512_loadu_si512(qs + 64 * half);
    const __m512i low = low_nibbles(codes), high = high_nibbles(codes);
    c->lo = _mm512_permutex2var_epi64(low, _mm512_load_si512(k_lo), high);
    c->hi = _mm512_permutex2var_epi64(low, _mm512_load_si512(k_hi), high);
}

static inline void load_q4_k(const uint8_t *p, int half, struct chunk *c)
{
    const struct v4_block_q4_k *block = (const void *)p;
    k_codes(block->qs, half, c);
    k_scales(block->d, block->scales, half, c);
}

/* The sixteen bytes at p in each lane, every lane's own bits of them: lane g has bits from
 * `first` + `step` g moved to `to`. Whatever crosses from byte to byte is for the caller to
 * mask. */
static inline __m512i lane_bits(const uint8_t *p, int first, int step, int to)
{
    const __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)p));
    const int64_t by = first - to;
    return _mm512_rorv_epi64(v, _mm512_setr_epi64(by, by, by + step, by + step, by + 2 * step,
                                                  by + 2 * step, by + 3 * step, by + 3 * step));
}

/* v with the bits of `mask` taken from `other`. */
static inline __m512i with_bits(__m512i v, __m512i other, int mask)
{
    return _mm512_ternarylogic_epi64(v, other, _mm512_set1_epi8((char)mask), 0xf8);
}

static inline void load_q5_k(const uint8_t *p, int half, struct chunk *c)
{
    const struct v4_block_q5_k *block = (const void *)p;
    k_codes(block->qs, half, c);
    c->lo = with_bits(c->lo, lane_bits(block->qh, 4 * half, 1, 4), 16);
    c->hi = with_bits(c->hi, lane_bits(block->qh + 16, 4 * half, 1, 4), 16);
    k_scales(block->d, block->scales, half, c);
}

/* Eight integers times d, those with an even index first. */
static inline void pair_scales(const uint8_t *d, __m256i integers, struct chunk *c)
{
    const __m256 products = _mm256_mul_ps(half_in_lanes(d), _mm256_cvtepi32_ps(integers));
    const __m256i sorted = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m256 scales = _mm256_permutevar8x32_ps(products, sorted);
    c->scale[0] = _mm256_castps256_ps128(scales);
    c->scale[1] = _mm256_extractf128_ps(scales, 1);
}

static inline __m128i load_u64(const uint8_t *p)
{
    return _mm_loadl_epi64((const __m128i *)(const void *)p);
}

static inline void load_q6_k(const uint8_t *p, int half, struct chunk *c)
{
    const struct v4_block_q6_k *block = (const void *)p;
    const __m512i codes = _mm512_loadu_si512(block->ql + 64 * half);
    const __m512i low = low_nibbles(codes), high = high_nibbles(codes);
    const uint8_t *qh = block->qh + 32 * half;
    c->lo = with_bits(even_lanes(low, high), lane_bits(qh, 0, 2, 4), 48);
    c->hi = with_bits(odd_lanes(low, high), lane_bits(qh + 16, 0, 2, 4), 48);
    const uint8_t *scales = (const uint8_t *)block->scales + 8 * half;
    pair_scales(block->d, _mm256_cvtepi8_epi32(load_u64(scales)), c);
}

static inline void load_q2_k(const uint8_t *p, int half, struct chunk *c)
{
    const struct v4_block_q2_k *block = (const void *)p;
    const uint8_t *qs = block->qs + 32 * half;
    c->lo = _mm512_and_si512(lane_bits(qs, 0, 2, 0), _mm512_set1_epi8(3));
    c->hi = _mm512_and_si512(lane_bits(qs + 16, 0, 2, 0), _mm512_set1_epi8(3));
    const __m256i both = _mm256_cvtepu8_epi32(load_u64(block->scales + 8 * half));
    pair_scales(block->dmin, _mm256_srli_epi32(both, 4), c);
    c->min[0] = c->scale[0];
    c->min[1] = c->scale[1];
    pair_scales(block->d, _mm256_and_si256(both, _mm256_set1_epi32(15)), c);
}

static inline void load_q3_k(const uint8_t *p, int half, struct chunk *c)
{
    const struct v4_block_q3_k *block = (const void *)p;
    const uint8_t *qs = block->qs + 32 * half;
    const __m512i lo = _mm512_and_si512(lane_bits(qs, 0, 2, 0), _mm512_set1_epi8(3));
    const __m512i hi = _mm512_and_si512(lane_bits(qs + 16, 0, 2, 0), _mm512_set1_epi8(3));
    c->lo = with_bits(lo, lane_bits(block->hmask, 4 * half, 1, 2), 4);
    c->hi = with_bits(hi, lane_bits(block->hmask + 16, 4 * half, 1, 2), 4);
    /* Eight low nibbles, and two bits for each of four, which serve groups g and g + 4 of the
     * half. */
    const __m256i low = _mm256_and_si256(
        _mm256_srli_epi32(_mm256_cvtepu8_epi32(load_u64(block->scales)), 4 * half),
        _mm256_set1_epi32(15));
    const __m256i upper =
        _mm256_broadcastsi128_si256(_mm_cvtepu8_epi32(load_u32(block->scales + 8)));
    const __m256i shift = _mm256_add_epi32(_mm256_set1_epi32(4 * half),
                                           _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
    const __m256i high = _mm256_and_si256(_mm256_srlv_epi32(upper, shift), _mm256_set1_epi32(3));
    const __m256i s = _mm256_or_si256(low, _mm256_slli_epi32(high, 4));
    pair_scales(block->d, _mm256_sub_epi32(s, _mm256_set1_epi32(32)), c);
}

#endif
