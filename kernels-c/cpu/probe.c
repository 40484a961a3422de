/* How fast this processor is at its best: the bounds that `cargo xtask bench` holds a model's
 * speed against. No model runs through here. */
#include "../include/v4.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* Registers that are in flight at a time: more than the latency of an instruction times the number
 * of units that run it. */
#define CHAINS 12

__attribute__((target("avx512f"))) static uint64_t read_avx512(const uint64_t *x, size_t n)
{
    __m512i sum[8];
    for (int k = 0; k < 8; k++) {
        sum[k] = _mm512_setzero_si512();
    }
    for (size_t i = 0; i < n; i += 64) {
        for (int k = 0; k < 8; k++) {
            sum[k] = _mm512_add_epi64(sum[k], _mm512_loadu_si512(x + i + 8 * k));
        }
    }
    for (int k = 1; k < 8; k++) {
        sum[0] = _mm512_add_epi64(sum[0], sum[k]);
    }
    return (uint64_t)_mm512_reduce_add_epi64(sum[0]);
}

__attribute__((target("avx512f,avx512vnni"))) static uint64_t int8_avx512(uint64_t rounds,
                                                                         int32_t *sink)
{
    const __m512i a = _mm512_set1_epi8((char)*sink), b = _mm512_set1_epi8(3);
    __m512i acc[CHAINS];
    for (int k = 0; k < CHAINS; k++) {
        acc[k] = _mm512_set1_epi32(k);
    }
    for (uint64_t i = 0; i < rounds; i++) {
        for (int k = 0; k < CHAINS; k++) {
            acc[k] = _mm512_dpbusd_epi32(acc[k], a, b);
        }
    }
    for (int k = 1; k < CHAINS; k++) {
        acc[0] = _mm512_add_epi32(acc[0], acc[k]);
    }
    *sink = _mm512_reduce_add_epi32(acc[0]);
    /* 64 products and as many sums an instruction. */
    return rounds * CHAINS * 128;
}

__attribute__((target("avx2"))) static uint64_t int8_avx2(uint64_t rounds, int32_t *sink)
{
    const __m256i a = _mm256_set1_epi8((char)*sink), b = _mm256_set1_epi8(3);
    const __m256i one = _mm256_set1_epi16(1);
    __m256i acc[CHAINS];
    for (int k = 0; k < CHAINS; k++) {
        acc[k] = _mm256_set1_epi32(k);
    }
    for (uint64_t i = 0; i < rounds; i++) {
        for (int k = 0; k < CHAINS; k++) {
            /* Depends on the sum before, so that no compiler takes it out of the loop. */
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_xor_si256(a, acc[k]), b);
            acc[k] = _mm256_add_epi32(acc[k], _mm256_madd_epi16(pairs, one));
        }
    }
    for (int k = 1; k < CHAINS; k++) {
        acc[0] = _mm256_add_epi32(acc[0], acc[k]);
    }
    *sink = _mm256_extract_epi32(acc[0], 0);
    /* 32 products and as many sums. */
    return rounds * CHAINS * 64;
}

__attribute__((target("avx512f,avx512bf16"))) static uint64_t bf16_avx512(uint64_t rounds,
                                                                         int32_t *sink)
{
    /* Pairs of bfloat16 1.0, with a last bit that the compiler cannot know. */
    const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80 | (*sink & 1));
    const __m512bh b = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    __m512 acc[CHAINS];
    for (int k = 0; k < CHAINS; k++) {
        acc[k] = _mm512_set1_ps((float)k);
    }
    for (uint64_t i = 0; i < rounds; i++) {
        for (int k = 0; k < CHAINS; k++) {
            acc[k] = _mm512_dpbf16_ps(acc[k], a, b);
        }
    }
    for (int k = 1; k < CHAINS; k++) {
        acc[0] = _mm512_add_ps(acc[0], acc[k]);
    }
    *sink = _mm512_reduce_add_ps(acc[0]) != 0;
    /* 32 products and as many sums. */
    return rounds * CHAINS * 64;
}

__attribute__((target("avx512f"))) static uint64_t f32_avx512(uint64_t rounds, int32_t *sink)
{
    /* acc = acc / 2 + b stays where it is; without b it would be denormal, which is slow. */
    const __m512 half = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1.0f + (float)(*sink & 1));
    __m512 acc[CHAINS];
    for (int k = 0; k < CHAINS; k++) {
        acc[k] = _mm512_set1_ps((float)k);
    }
    for (uint64_t i = 0; i < rounds; i++) {
        for (int k = 0; k < CHAINS; k++) {
            acc[k] = _mm512_fmadd_ps(acc[k], half, b);
        }
    }
    for (int k = 1; k < CHAINS; k++) {
        acc[0] = _mm512_add_ps(acc[0], acc[k]);
    }
    *sink = _mm512_reduce_add_ps(acc[0]) != 0;
    return rounds * CHAINS * 32;
}

__attribute__((target("avx2,fma"))) static uint64_t f32_avx2(uint64_t rounds, int32_t *sink)
{
    const __m256 half = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1.0f + (float)(*sink & 1));
    __m256 acc[CHAINS];
    for (int k = 0; k < CHAINS; k++) {
        acc[k] = _mm256_set1_ps((float)k);
    }
    for (uint64_t i = 0; i < rounds; i++) {
        for (int k = 0; k < CHAINS; k++) {
            acc[k] = _mm256_fmadd_ps(acc[k], half, b);
        }
    }
    for (int k = 1; k < CHAINS; k++) {
        acc[0] = _mm256_add_ps(acc[0], acc[k]);
    }
    *sink = _mm256_cvtss_f32(acc[0]) != 0;
    return rounds * CHAINS * 16;
}
#endif

static uint64_t read_plain(const uint64_t *x, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += x[i];
    }
    return sum;
}

static uint64_t int8_plain(uint64_t rounds, int32_t *sink)
{
    enum { LANES = 64 };
    int8_t a[LANES];
    int32_t acc[LANES] = {0};
    for (int k = 0; k < LANES; k++) {
        a[k] = (int8_t)(*sink + k);
    }
    for (uint64_t i = 0; i < rounds; i++) {
        for (int k = 0; k < LANES; k++) {
            acc[k] += a[k] * (int8_t)i;
        }
    }
    for (int k = 1; k < LANES; k++) {
        acc[0] += acc[k];
    }
    *sink = acc[0];
    return rounds * LANES * 2;
}

static uint64_t f32_plain(uint64_t rounds, int32_t *sink)
{
    enum { LANES = 48 };
    const float b = 1.0f + (float)(*sink & 1);
    float acc[LANES];
    for (int k = 0; k < LANES; k++) {
        acc[k] = (float)k;
    }
    for (uint64_t i = 0; i < rounds; i++) {
        for (int k = 0; k < LANES; k++) {
            acc[k] = acc[k] * 0.5f + b;
        }
    }
    for (int k = 1; k < LANES; k++) {
        acc[0] += acc[k];
    }
    *sink = acc[0] != 0;
    return rounds * LANES * 2;
}

uint64_t v4_probe_read(const uint64_t *x, size_t n)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        return read_avx512(x, n);
    }
#endif
    return read_plain(x, n);
}

static uint64_t int8(uint64_t rounds, int32_t *sink)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni")) {
        return int8_avx512(rounds, sink);
    }
    if (__builtin_cpu_supports("avx2")) {
        return int8_avx2(rounds, sink);
    }
#endif
    return int8_plain(rounds, sink);
}

static uint64_t bf16(uint64_t rounds, int32_t *sink)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16")) {
        return bf16_avx512(rounds, sink);
    }
#endif
    (void)rounds;
    (void)sink;
    return 0;
}

static uint64_t f32(uint64_t rounds, int32_t *sink)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        return f32_avx512(rounds, sink);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return f32_avx2(rounds, sink);
    }
#endif
    return f32_plain(rounds, sink);
}

uint64_t v4_probe_multiply(enum v4_probe kind, uint64_t rounds, int32_t *sink)
{
    switch (kind) {
    case V4_PROBE_INT8:
        return int8(rounds, sink);
    case V4_PROBE_BF16:
        return bf16(rounds, sink);
    case V4_PROBE_F32:
        return f32(rounds, sink);
    }
    return 0;
}
