/* How AVX-512 reads each block format: sixteen rows side by side, a row an element of a vector.
 *
 * vpdpbusd multiplies four bytes of an element by four others and adds them up. So weights are
 * wanted with four consecutive ones of a row in an element; they lie sixteen bytes or more together
 * in each row. Sixteen bytes of sixteen rows are turned into that order as they are, packed; only
 * then are codes taken out of them, which is cheaper, since there are fewer.
 *
 * A chunk is up to eight groups of 32 weights: one block of 256, or some smaller ones. A code is
 * decode_i8's q plus the format's offset, so that it is unsigned, as vpdpbusd wants one side. */
#ifndef V4_AVX512_FORMATS_H
#define V4_AVX512_FORMATS_H

#include <immintrin.h>

#include "../quant/blocks.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))
/* For loops over registers. */
#define UNROLL _Pragma("GCC unroll 16")

enum { LANES = 16, CHUNK_GROUPS = 8, CODE_VECTORS = V4_ACT_GROUP / 4 };

/* What is small and lies scattered in the blocks of a chunk, copied by plain loads and stores,
 * which leave the vector units free: a number a group, or a block, of each row. */
struct scattered {
    _Alignas(64) uint32_t words[CHUNK_GROUPS][LANES];
    _Alignas(64) uint32_t fifth[CHUNK_GROUPS][LANES];
    _Alignas(64) uint16_t halves[CHUNK_GROUPS][LANES];
    _Alignas(64) uint8_t bytes[CHUNK_GROUPS][LANES];
};

/* Scales and minima of a chunk: one a group, or two in formats with groups of 16. */
struct scales {
    _Alignas(64) float scale[CHUNK_GROUPS][2][LANES];
    _Alignas(64) float min[CHUNK_GROUPS][2][LANES];
};

/* Weights of formats without a fast way, decoded by decode_i8: [row][weight]. */
struct decoded {
    _Alignas(64) int8_t q[LANES][V4_MAX_BLOCK_LEN];
};

/* What a chunk is read with, apart from the rows themselves. */
struct room {
    struct scales scales;
    struct decoded decoded;
};

/* Vectors that a unit of a chunk is held in while codes are taken out of it. */
enum { RAW_VECTORS = 24 };

/* The functions of a format. `p` is the chunk in the first row; rows are `stride` bytes apart.
 * Everything is constant where it is used, so nothing is called. */
/* Copies what lies scattered in block b. */
typedef void scatter_fn(const uint8_t *p, size_t stride, int b, struct scattered *to);
typedef void scales_fn(const uint8_t *p, size_t stride, int groups, const struct scattered *from,
                       struct room *to);
typedef void raw_fn(const uint8_t *p, size_t stride, int unit, const struct scattered *from,
                    const struct room *room, __m512i raw[RAW_VECTORS]);
/* Weights 4 j .. 4 j + 3 of group k of the unit. */
typedef __m512i code_fn(const __m512i raw[RAW_VECTORS], int k, int j);

struct format {
    scatter_fn *scatter;
    scales_fn *scales;
    raw_fn *raw;
    code_fn *code;
    int block_groups; /* groups of a block */
    int block_bytes;
    int unit;         /* groups that are read together */
    int offset;       /* added to each q */
    int pairs;        /* 1 where groups have 16 weights */
    int mins;         /* 1 where groups have a minimum */
    int wide;         /* 1 where scales reach 2^104 and more */
};

/* ---- sixteen rows ---------------------------------------------------------------------------- */

ALWAYS_INLINE __m128i load_16(const uint8_t *p)
{
    return _mm_loadu_si128((const __m128i *)(const void *)p);
}

/* Sixteen bytes of four places. */
ALWAYS_INLINE __m512i four_places(const uint8_t *p0, const uint8_t *p1, const uint8_t *p2,
                                  const uint8_t *p3)
{
    __m512i v = _mm512_castsi128_si512(load_16(p0));
    v = _mm512_inserti32x4(v, load_16(p1), 1);
    v = _mm512_inserti32x4(v, load_16(p2), 2);
    return _mm512_inserti32x4(v, load_16(p3), 3);
}

/* Sixteen bytes of sixteen rows: v[j] has bytes 4 j .. 4 j + 3 of each. */
ALWAYS_INLINE void turn_16(const uint8_t *p, size_t stride, __m512i v[4])
{
    size_t three = 3 * stride;
    /* Or else the compiler keeps sixteen addresses from one unit to the next, most of them in
     * vectors and masks, and to fetch one takes a turn of a port that multiplies. */
    __asm__("" : "+r"(p), "+r"(stride), "+r"(three));
    const uint8_t *const p4 = p + 4 * stride, *const p8 = p4 + 4 * stride;
    const uint8_t *const p12 = p4 + 8 * stride;
    const size_t two = 2 * stride;
    const __m512i a = four_places(p, p4, p8, p12);
    const __m512i b = four_places(p + stride, p4 + stride, p8 + stride, p12 + stride);
    const __m512i c = four_places(p + two, p4 + two, p8 + two, p12 + two);
    const __m512i d = four_places(p + three, p4 + three, p8 + three, p12 + three);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    const __m512i ab2 = _mm512_unpackhi_epi32(a, b), cd2 = _mm512_unpackhi_epi32(c, d);
    v[0] = _mm512_unpacklo_epi64(ab, cd);
    v[1] = _mm512_unpackhi_epi64(ab, cd);
    v[2] = _mm512_unpacklo_epi64(ab2, cd2);
    v[3] = _mm512_unpackhi_epi64(ab2, cd2);
}

ALWAYS_INLINE void turn_32(const uint8_t *p, size_t stride, __m512i v[8])
{
    turn_16(p, stride, v);
    turn_16(p + 16, stride, v + 4);
}

/* ---- codes ----------------------------------------------------------------------------------- */

ALWAYS_INLINE __m512i low_nibbles(__m512i v)
{
    return _mm512_and_si512(v, _mm512_set1_epi8(15));
}

ALWAYS_INLINE __m512i high_nibbles(__m512i v)
{
    return low_nibbles(_mm512_srli_epi16(v, 4));
}

/* Sixteen bytes whose low nibbles are weights 0..15 of a group and whose high ones 16..31. */
ALWAYS_INLINE __m512i nibble(const __m512i raw[4], int j)
{
    return j < 4 ? low_nibbles(raw[j]) : high_nibbles(raw[j - 4]);
}

ALWAYS_INLINE __m512i look_up(const int8_t *table, __m512i codes)
{
    const __m128i values = _mm_load_si128((const __m128i *)(const void *)table);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), codes);
}

/* v with the bits of `mask` taken from `other`. */
ALWAYS_INLINE __m512i with_bits(__m512i v, __m512i other, int mask)
{
    return _mm512_ternarylogic_epi64(v, other, _mm512_set1_epi8((char)mask), 0xf8);
}

/* v shifted left, or right where `by` is negative; what crosses from byte to byte is for the caller
 * to mask. */
ALWAYS_INLINE __m512i shifted(__m512i v, int by)
{
    return by < 0 ? _mm512_srli_epi16(v, (unsigned)-by) : _mm512_slli_epi16(v, (unsigned)by);
}

/* The bits of `codes` where v has a bit of `mask`. */
ALWAYS_INLINE __m512i add_where(__m512i codes, __m512i v, __m512i mask, int value)
{
    const __mmask64 set = _mm512_test_epi8_mask(v, mask);
    return _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8((char)value));
}

/* A code's fifth bit is bit 4 j + b of the row's word, for byte b of vector j. */
ALWAYS_INLINE __m512i with_fifth(__m512i codes, __m512i words, int j)
{
    const __m512i byte = _mm512_set1_epi32(j / 2 * 0x01010101);
    const __m512i first = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    const __m512i bits = _mm512_set1_epi32(j % 2 ? (int)0x80402010 : 0x08040201);
    const __m512i spread = _mm512_shuffle_epi8(words, _mm512_add_epi8(first, byte));
    return add_where(codes, spread, bits, 16);
}

/* ---- scales ---------------------------------------------------------------------------------- */

ALWAYS_INLINE __m512 floats_of_halves(const uint16_t halves[LANES])
{
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(const void *)halves));
}

/* The low half of each word, as a half-precision number. */
ALWAYS_INLINE __m512 low_halves(__m512i words)
{
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
}

ALWAYS_INLINE __m512 high_halves(__m512i words)
{
    return low_halves(_mm512_srli_epi32(words, 16));
}

/* Bits `from` .. `from` + n of each word. */
ALWAYS_INLINE __m512i field(__m512i words, int from, int n)
{
    return _mm512_and_si512(_mm512_srli_epi32(words, (unsigned)from),
                            _mm512_set1_epi32((1 << n) - 1));
}

ALWAYS_INLINE __m512 times(__m512 d, __m512i integers)
{
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps(integers));
}

/* Copies a number of `bytes` bytes at `at` of each block, `size` bytes apart, of sixteen rows. */
#define SCATTER(name, type, to_field, at, size)                                                   \
    ALWAYS_INLINE void name(const uint8_t *p, size_t stride, int b, struct scattered *to)         \
    {                                                                                             \
        const uint8_t *from = p + (size_t)b * (size) + (at);                                      \
        size_t three = 3 * stride;                                                                \
        __asm__("" : "+r"(from), "+r"(stride), "+r"(three));                                      \
        UNROLL                                                                                    \
        for (size_t r = 0; r < LANES; r++) {                                                      \
            type value;                                                                           \
            memcpy(&value, from + (r % 4 == 3 ? three : r % 4 * stride), sizeof value);           \
            from += r % 4 == 3 ? 4 * stride : 0;                                                  \
            /* Or else the compiler makes vectors of several, which is slower. */                 \
            __asm__("" : "+r"(value));                                                            \
            to->to_field[b][r] = value;                                                           \
        }                                                                                         \
    }

/* How a unit of the chunk at p is read to raw, a function of that name. */
#define RAW(name, ...)                                                                            \
    ALWAYS_INLINE void name##_raw(const uint8_t *p, size_t stride, int unit,                      \
                                  const struct scattered *from, const struct room *room,          \
                                  __m512i raw[RAW_VECTORS])                                       \
    {                                                                                             \
        (void)p, (void)stride, (void)from, (void)room;                                            \
        __VA_ARGS__                                                                               \
    }

/* ---- blocks of 32 ---------------------------------------------------------------------------- */

ALWAYS_INLINE void set_halves_as_scales(int groups, const struct scattered *from, struct room *to)
{
    for (int g = 0; g < groups; g++) {
        _mm512_store_ps(to->scales.scale[g][0], floats_of_halves(from->halves[g]));
    }
}

/* A word is a scale and a minimum, whose sign is the other way round in blocks. */
ALWAYS_INLINE void set_words_as_scales(int groups, const struct scattered *from, struct room *to)
{
    for (int g = 0; g < groups; g++) {
        const __m512i words = _mm512_load_si512(from->words[g]);
        _mm512_store_ps(to->scales.scale[g][0], low_halves(words));
        const __m512 min = _mm512_xor_ps(high_halves(words), _mm512_set1_ps(-0.0f));
        _mm512_store_ps(to->scales.min[g][0], min);
    }
}

SCATTER(q4_0_scatter, uint16_t, halves, 0, 18)

ALWAYS_INLINE void q4_0_scales(const uint8_t *p, size_t stride, int groups,
                               const struct scattered *from, struct room *to)
{
    (void)p, (void)stride;
    set_halves_as_scales(groups, from, to);
}

RAW(q4_0, turn_16(p + 18 * unit + 2, stride, raw);)

ALWAYS_INLINE __m512i q4_0_code(const __m512i raw[RAW_VECTORS], int k, int j)
{
    (void)k;
    return nibble(raw, j);
}

/* The table plus 128, the format's offset. */
_Alignas(16) static const int8_t iq4_table[16] = {1,    24,   45,   63,  79,  93,  106, 118,
                                                  -127, -115, -103, -90, -75, -59, -39, -15};

#define iq4_nl_scatter q4_0_scatter
#define iq4_nl_scales q4_0_scales
#define iq4_nl_raw q4_0_raw

ALWAYS_INLINE __m512i iq4_nl_code(const __m512i raw[RAW_VECTORS], int k, int j)
{
    (void)k;
    return look_up(iq4_table, nibble(raw, j));
}

SCATTER(q4_1_scatter, uint32_t, words, 0, 20)

ALWAYS_INLINE void q4_1_scales(const uint8_t *p, size_t stride, int groups,
                               const struct scattered *from, struct room *to)
{
    (void)p, (void)stride;
    set_words_as_scales(groups, from, to);
}

RAW(q4_1, turn_16(p + 20 * unit + 4, stride, raw);)

#define q4_1_code q4_0_code

SCATTER(q5_0_halves, uint16_t, halves, 0, 22)
SCATTER(q5_0_fifth, uint32_t, fifth, 2, 22)

ALWAYS_INLINE void q5_0_scatter(const uint8_t *p, size_t stride, int b, struct scattered *to)
{
    q5_0_halves(p, stride, b, to);
    q5_0_fifth(p, stride, b, to);
}

#define q5_0_scales q4_0_scales

RAW(q5_0,
    turn_16(p + 22 * unit + 6, stride, raw);
    raw[4] = _mm512_load_si512(from->fifth[unit]);)

ALWAYS_INLINE __m512i q5_0_code(const __m512i raw[RAW_VECTORS], int k, int j)
{
    (void)k;
    return with_fifth(nibble(raw, j), raw[4], j);
}

SCATTER(q5_1_words, uint32_t, words, 0, 24)
SCATTER(q5_1_fifth, uint32_t, fifth, 4, 24)

ALWAYS_INLINE void q5_1_scatter(const uint8_t *p, size_t stride, int b, struct scattered *to)
{
    q5_1_words(p, stride, b, to);
    q5_1_fifth(p, stride, b, to);
}

#define q5_1_scales q4_1_scales

RAW(q5_1,
    turn_16(p + 24 * unit + 8, stride, raw);
    raw[4] = _mm512_load_si512(from->fifth[unit]);)

#define q5_1_code q5_0_code

SCATTER(q8_0_scatter, uint16_t, halves, 0, 34)

#define q8_0_scales q4_0_scales

RAW(q8_0, turn_32(p + 34 * unit + 2, stride, raw);)

/* Signed bytes plus 128. */
ALWAYS_INLINE __m512i q8_0_code(const __m512i raw[RAW_VECTORS], int k, int j)
{
    (void)k;
    return _mm512_xor_si512(raw[j], _mm512_set1_epi8(-128));
}

/* ---- four-bit floats ------------------------------------------------------------------------- */

/* e2m1 doubled, plus 12, the format's offset. */
_Alignas(16) static const int8_t e2m1_table[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                   12, 11, 10, 9,  8,  6,  4,  0};

SCATTER(mxfp4_scatter, uint8_t, bytes, 0, 17)

/* See v4_half_of_e8m0. */
ALWAYS_INLINE void mxfp4_scales(const uint8_t *p, size_t stride, int groups,
                                const struct scattered *from, struct room *to)
{
    (void)p, (void)stride;
    for (int g = 0; g < groups; g++) {
        const __m512i e = _mm512_cvtepu8_epi32(load_16(from->bytes[g]));
        const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
        const __mmask16 tiny = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
        const __m512i small = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
        const __m512i bits = _mm512_mask_mov_epi32(normal, tiny, small);
        _mm512_store_ps(to->scales.scale[g][0], _mm512_castsi512_ps(bits));
    }
}

RAW(mxfp4, turn_16(p + 17 * unit + 1, stride, raw);)

ALWAYS_INLINE __m512i mxfp4_code(const __m512i raw[RAW_VECTORS], int k, int j)
{
    (void)k;
    return look_up(e2m1_table, nibble(raw, j));
}

SCATTER(nvfp4_scatter, uint32_t, words, 0, 36)

/* Two e4m3 numbers, halved, of each row: bytes `at` and `at` + 1 of its word. e4m3 as half
 * precision has the same bits, 2^8 too small; the table of the codes is doubled. */
ALWAYS_INLINE void set_ue4m3(__m512i words, int at, float to[2][LANES])
{
    const __m512i first = field(words, 8 * at, 8), second = field(words, 8 * at + 8, 8);
    const __m512i both = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
    /* 0x7f is no number and counts as 0; otherwise the sign does not count. */
    const __mmask32 number = _mm512_cmpneq_epi16_mask(both, _mm512_set1_epi16(0x7f));
    const __m512i bits = _mm512_maskz_mov_epi16(number, both);
    const __m512i halves =
        _mm512_slli_epi16(_mm512_and_si512(bits, _mm512_set1_epi16(0x7f)), 7);
    const __m512 factor = _mm512_set1_ps(128);
    const __m512 a = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), factor);
    const __m512 b = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)), factor);
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    _mm512_store_ps(to[0], _mm512_permutex2var_ps(a, even, b));
    _mm512_store_ps(to[1], _mm512_permutex2var_ps(a, odd, b));
}

ALWAYS_INLINE void nvfp4_scales(const uint8_t *p, size_t stride, int groups,
                                const struct scattered *from, struct room *to)
{
    (void)p, (void)stride;
    for (int b = 0; b < groups / 2; b++) {
        const __m512i words = _mm512_load_si512(from->words[b]);
        set_ue4m3(words, 0, to->scales.scale[2 * b]);
        set_ue4m3(words, 2, to->scales.scale[2 * b + 1]);
    }
}

/* Half a block: 8 bytes of the low and high nibbles of sixteen weights, and 8 of the next. */
RAW(nvfp4, turn_16(p + 36 * (unit / 2) + 4 + 16 * (unit % 2), stride, raw);)

ALWAYS_INLINE __m512i nvfp4_code(const __m512i raw[RAW_VECTORS], int k, int j)
{
    (void)k;
    const __m512i four = raw[j / 4 * 2 + j % 2];
    return look_up(e2m1_table, j % 4 < 2 ? low_nibbles(four) : high_nibbles(four));
}

/* ---- blocks of 256 --------------------------------------------------------------------------- */

ALWAYS_INLINE void no_scatter(const uint8_t *p, size_t stride, int b, struct scattered *to)
{
    (void)p, (void)stride, (void)b, (void)to;
}

/* Four groups from g: their s and m are the bytes of a word. */
ALWAYS_INLINE void k_four_groups(__m512 d, __m512 dmin, __m512i s, __m512i m, int g,
                                 struct scales *to)
{
    UNROLL
    for (int i = 0; i < 4; i++) {
        _mm512_store_ps(to->scale[g + i][0], times(d, field(s, 8 * i, 8)));
        _mm512_store_ps(to->min[g + i][0], times(dmin, field(m, 8 * i, 8)));
    }
}

/* Also of Q5_K: see v4_k_scale_min. */
ALWAYS_INLINE void q4_k_scales(const uint8_t *p, size_t stride, int groups,
                               const struct scattered *from, struct room *to)
{
    (void)groups, (void)from;
    __m512i v[4];
    turn_16(p, stride, v);
    const __m512 d = low_halves(v[0]), dmin = high_halves(v[0]);
    const __m512i six = _mm512_set1_epi8(63), four = _mm512_set1_epi8(15);
    k_four_groups(d, dmin, _mm512_and_si512(v[1], six), _mm512_and_si512(v[2], six), 0,
                  &to->scales);
    const __m512i s = with_bits(_mm512_and_si512(v[3], four), _mm512_srli_epi32(v[1], 2), 0x30);
    const __m512i m = with_bits(_mm512_and_si512(_mm512_srli_epi32(v[3], 4), four),
                                _mm512_srli_epi32(v[2], 2), 0x30);
    k_four_groups(d, dmin, s, m, 4, &to->scales);
}

#define q4_k_scatter no_scatter

/* Two groups: the low and the high nibbles of 32 bytes. */
RAW(q4_k, turn_32(p + 16 + 32 * unit, stride, raw);)

ALWAYS_INLINE __m512i q4_k_code(const __m512i raw[RAW_VECTORS], int k, int j)
{
    return k ? high_nibbles(raw[j]) : low_nibbles(raw[j]);
}

#define q5_k_scatter no_scatter
#define q5_k_scales q4_k_scales

/* The fifth bits are raw[8..16], the unit's lowest two bits at first. */
RAW(q5_k,
    turn_32(p + 48 + 32 * unit, stride, raw);
    turn_32(p + 16, stride, raw + 8);
    raw[16] = _mm512_set1_epi8((char)(1 << (2 * unit)));
    raw[17] = _mm512_set1_epi8((char)(2 << (2 * unit)));)

ALWAYS_INLINE __m512i q5_k_code(const __m512i raw[RAW_VECTORS], int k, int j)
{
    return add_where(q4_k_code(raw, k, j), raw[8 + j], raw[16 + k], 16);
}

/* The signed bytes of four words, a scale each, times d: pairs 0 and 1 of eight groups. */
ALWAYS_INLINE void set_byte_scales(__m512 d, const __m512i words[4],
                                   float to[CHUNK_GROUPS][2][LANES])
{
    UNROLL
    for (int g = 0; g < CHUNK_GROUPS; g++) {
        UNROLL
        for (int i = 0; i < 2; i++) {
            const int at = 2 * g + i;
            const __m512i up = _mm512_slli_epi32(words[at / 4], (unsigned)(24 - at % 4 * 8));
            _mm512_store_ps(to[g][i], times(d, _mm512_srai_epi32(up, 24)));
        }
    }
}

#define q6_k_scatter no_scatter

ALWAYS_INLINE void q6_k_scales(const uint8_t *p, size_t stride, int groups,
                               const struct scattered *from, struct room *to)
{
    (void)groups, (void)from;
    __m512i v[4], last[4];
    turn_16(p + 192, stride, v);
    turn_16(p + 194, stride, last);
    set_byte_scales(high_halves(last[3]), v, to->scales.scale);
}

/* Four groups: nibbles of 64 bytes in raw[0..16], and two bits more for each in raw[16..24]. */
RAW(q6_k,
    turn_32(p + 64 * unit, stride, raw);
    turn_32(p + 64 * unit + 32, stride, raw + 8);
    turn_32(p + 128 + 32 * unit, stride, raw + 16);)

ALWAYS_INLINE __m512i q6_k_code(const __m512i raw[RAW_VECTORS], int k, int j)
{
    const __m512i low = raw[k % 2 * 8 + j];
    const __m512i four = k < 2 ? low_nibbles(low) : high_nibbles(low);
    return with_bits(four, shifted(raw[16 + j], 4 - 2 * k), 0x30);
}

#define q2_k_scatter no_scatter

ALWAYS_INLINE void q2_k_scales(const uint8_t *p, size_t stride, int groups,
                               const struct scattered *from, struct room *to)
{
    (void)groups, (void)from;
    __m512i v[4], last[4], m[4];
    turn_16(p, stride, v);
    turn_16(p + 68, stride, last);
    UNROLL
    for (int i = 0; i < 4; i++) {
        m[i] = high_nibbles(v[i]);
        v[i] = low_nibbles(v[i]);
    }
    set_byte_scales(low_halves(last[3]), v, to->scales.scale);
    set_byte_scales(high_halves(last[3]), m, to->scales.min);
}

/* Four groups: two bits each of 32 bytes. */
RAW(q2_k, turn_32(p + 16 + 32 * unit, stride, raw);)

ALWAYS_INLINE __m512i q2_k_code(const __m512i raw[RAW_VECTORS], int k, int j)
{
    return _mm512_and_si512(shifted(raw[j], -2 * k), _mm512_set1_epi8(3));
}

#define q3_k_scatter no_scatter

/* The last sixteen bytes are two of codes, twelve of scales and d. */
ALWAYS_INLINE void q3_k_scales(const uint8_t *p, size_t stride, int groups,
                               const struct scattered *from, struct room *to)
{
    (void)groups, (void)from;
    __m512i v[4], s[4], words[3];
    turn_16(p + 94, stride, v);
    UNROLL
    for (int i = 0; i < 3; i++) {
        words[i] = _mm512_or_si512(_mm512_srli_epi32(v[i], 16), _mm512_slli_epi32(v[i + 1], 16));
    }
    const __m512i bias = _mm512_set1_epi8(32);
    UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512i low = i < 2 ? low_nibbles(words[i]) : high_nibbles(words[i - 2]);
        s[i] = _mm512_sub_epi8(with_bits(low, shifted(words[2], 4 - 2 * i), 0x30), bias);
    }
    set_byte_scales(high_halves(v[3]), s, to->scales.scale);
}

/* Four groups, as Q2_K, and the third bits in raw[8..16]. */
ALWAYS_INLINE void q3_k_raw(const uint8_t *p, size_t stride, int unit, const struct scattered *from,
                            const struct room *room, __m512i raw[RAW_VECTORS])
{
    (void)from, (void)room;
    turn_32(p + 32 + 32 * unit, stride, raw);
    turn_32(p, stride, raw + 8);
    UNROLL
    for (int k = 0; k < 4; k++) {
        raw[16 + k] = _mm512_set1_epi8((char)(1 << (4 * unit + k)));
    }
}

ALWAYS_INLINE __m512i q3_k_code(const __m512i raw[RAW_VECTORS], int k, int j)
{
    return add_where(q2_k_code(raw, k, j), raw[8 + j], raw[16 + k], 4);
}

#define iq4_xs_scatter no_scatter

ALWAYS_INLINE void iq4_xs_scales(const uint8_t *p, size_t stride, int groups,
                                 const struct scattered *from, struct room *to)
{
    (void)groups, (void)from;
    __m512i v[4];
    turn_16(p, stride, v);
    const __m512 d = low_halves(v[0]);
    UNROLL
    for (int g = 0; g < CHUNK_GROUPS; g++) {
        const __m512i low = field(v[1], 4 * g, 4), high = field(v[0], 16 + 2 * g, 2);
        const __m512i s = _mm512_or_si512(low, _mm512_slli_epi32(high, 4));
        const __m512 scale = times(d, _mm512_sub_epi32(s, _mm512_set1_epi32(32)));
        _mm512_store_ps(to->scales.scale[g][0], scale);
    }
}

RAW(iq4_xs, turn_16(p + 8 + 16 * unit, stride, raw);)

#define iq4_xs_code iq4_nl_code

/* ---- the rest -------------------------------------------------------------------------------- */

/* Formats whose weights come from large tables go through decode_i8, a block a row. */
#define DECODED(name, group)                                                                      \
    static __attribute__((noinline)) void name##_scales(const uint8_t *p, size_t stride,          \
                                                        int groups, const struct scattered *from, \
                                                        struct room *to)                          \
    {                                                                                             \
        (void)groups, (void)from;                                                                 \
        for (int r = 0; r < LANES; r++, p += stride) {                                            \
            float scale[V4_MAX_BLOCK_LEN / 16], min[V4_MAX_BLOCK_LEN / 16];                       \
            v4_##name##_decode_i8((const void *)p, to->decoded.q[r], scale, min);                 \
            for (int g = 0; g < V4_MAX_BLOCK_LEN / (group); g++) {                                \
                const int at = g * (group) / 16;                                                  \
                to->scales.scale[at / 2][at % 2][r] = scale[g];                                   \
            }                                                                                     \
        }                                                                                         \
    }

RAW(decoded, turn_32((const uint8_t *)room->decoded.q[0] + 32 * unit, V4_MAX_BLOCK_LEN, raw);)

#endif
