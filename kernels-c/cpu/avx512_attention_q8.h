/* Attention over bytes with AVX-512 VNNI: a part of avx512.c.
 *
 * v4.h says what is computed: products of bytes by fifteen bits, two for each lane in an
 * instruction, exact until the scales. A byte is widened once for all queries of a tile. */
#ifndef V4_AVX512_ATTENTION_Q8_H
#define V4_AVX512_ATTENTION_Q8_H

/* The scales of the slab's tokens for the group of column c. */
ALWAYS_INLINE __m512 kv_scales(const char *slab, size_t head_dim, size_t c)
{
    const char *scales = slab + V4_SLAB * head_dim + c / V4_KV_GROUP * V4_SLAB * sizeof(uint16_t);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)scales));
}

/* The scales of the slab that will be read next. */
ALWAYS_INLINE void bring_scales(const char *ahead, size_t head_dim)
{
    bring(ahead + V4_SLAB * head_dim, V4_SLAB * head_dim / V4_KV_GROUP * sizeof(uint16_t));
}

/* The largest magnitude, NaN above all. */
ALWAYS_INLINE float largest_magnitude(__m512i bits)
{
    const int most = _mm512_reduce_max_epi32(bits);
    float max;
    memcpy(&max, &most, sizeof max);
    return max;
}

ALWAYS_INLINE __m512i magnitude_bits(__m512 v)
{
    return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}

/* Sixteen values times the inverse, to nearest, in 16 bits. */
ALWAYS_INLINE void store_codes(void *to, __m512 v, float inverse)
{
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
    _mm256_storeu_si256(to, _mm512_cvtepi32_epi16(whole));
}

static void attn_query(const float *q, size_t n_q, size_t head_dim, float *out)
{
    for (size_t i = 0; i < n_q; i++, q += head_dim, out += head_dim) {
        for (size_t c = 0; c < head_dim; c += V4_KV_GROUP) {
            const __m512 a = _mm512_loadu_ps(q + c), b = _mm512_loadu_ps(q + c + LANES);
            const __m512i bits = _mm512_max_epi32(magnitude_bits(a), magnitude_bits(b));
            float scale;
            const float inverse = v4_kv_inverse(largest_magnitude(bits), &scale);
            out[head_dim / 2 + c / V4_KV_GROUP] = scale;
            store_codes((char *)out + c * sizeof(int16_t), a, inverse);
            store_codes((char *)out + (c + LANES) * sizeof(int16_t), b, inverse);
        }
    }
}

/* Two codes of 16 bits at `at` in all lanes. */
ALWAYS_INLINE __m512i pair_of(const void *codes, size_t at)
{
    int32_t pair;
    memcpy(&pair, (const char *)codes + at * sizeof(int16_t), sizeof pair);
    return _mm512_set1_epi32(pair);
}

/* Sixteen pairs of bytes, widened. */
ALWAYS_INLINE __m512i widened(const char *bytes)
{
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)bytes));
}

/* The keys of n_vec slabs for a few queries, as `score_slabs` does. */
ALWAYS_INLINE void score_bytes(const float *q, int n_q, int n_vec, const char *k, size_t n_slabs,
                               size_t head_dim, float factor, float *scores, size_t stride,
                               const char *ahead)
{
    const size_t bytes = v4_slab_bytes(V4_KV_Q8_0, head_dim);
    const char *slab[COPY_VECTORS];
    __m512 acc[FEW][COPY_VECTORS];
    UNROLL
    for (int v = 0; v < n_vec; v++) {
        slab[v] = k + ((size_t)v < n_slabs ? (size_t)v : n_slabs - 1) * bytes;
        bring_scales(ahead + (size_t)v * bytes, head_dim);
        UNROLL
        for (int i = 0; i < n_q; i++) {
            acc[i][v] = _mm512_setzero_ps();
        }
    }
    for (size_t c = 0; c < head_dim; c += V4_KV_GROUP) {
        __m512i dot[FEW][COPY_VECTORS];
        UNROLL
        for (int i = 0; i < n_q; i++) {
            UNROLL
            for (int v = 0; v < n_vec; v++) {
                dot[i][v] = _mm512_setzero_si512();
            }
        }
        for (size_t at = c; at < c + V4_KV_GROUP; at += 2) {
            __m512i keys[COPY_VECTORS];
            UNROLL
            for (int v = 0; v < n_vec; v++) {
                _mm_prefetch(ahead + (size_t)v * bytes + at * LANES, _MM_HINT_T1);
                keys[v] = widened(slab[v] + at * LANES);
            }
            UNROLL
            for (int i = 0; i < n_q; i++) {
                const __m512i pair = pair_of(q + (size_t)i * head_dim, at);
                UNROLL
                for (int v = 0; v < n_vec; v++) {
                    dot[i][v] = _mm512_dpwssd_epi32(dot[i][v], keys[v], pair);
                }
            }
        }
        UNROLL
        for (int v = 0; v < n_vec; v++) {
            const __m512 scale = kv_scales(slab[v], head_dim, c);
            UNROLL
            for (int i = 0; i < n_q; i++) {
                const float own = q[(size_t)i * head_dim + head_dim / 2 + c / V4_KV_GROUP];
                acc[i][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i][v]),
                                            _mm512_mul_ps(scale, _mm512_set1_ps(own)), acc[i][v]);
            }
        }
    }
    UNROLL
    for (int v = 0; v < n_vec; v++) {
        UNROLL
        for (int i = 0; i < n_q; i++) {
            if ((size_t)v < n_slabs) {
                _mm512_storeu_ps(scores + (size_t)i * stride + (size_t)v * LANES,
                                 _mm512_mul_ps(acc[i][v], _mm512_set1_ps(factor)));
            }
        }
    }
}

static void attn_scores_q8_0(const float *q, size_t n_q, const void *k, size_t n_kv,
                             size_t head_dim, float scale, float *scores, size_t stride,
                             const void *next)
{
    const size_t n_slabs = (n_kv + V4_SLAB - 1) / V4_SLAB;
    const size_t bytes = v4_slab_bytes(V4_KV_Q8_0, head_dim);
    const char *slabs = k, *ahead = next ? next : k;
    for (size_t i = 0; i < n_q; i += FEW) {
        switch (n_q - i) {
#define SCORE_BYTES(n, n_vec)                                                                     \
    for (size_t s = 0; s < n_slabs; s += (n_vec)) {                                               \
        score_bytes(q + i * head_dim, n, n_vec, slabs + s * bytes, n_slabs - s, head_dim, scale,  \
                    scores + i * stride + s * LANES, stride, ahead + s * bytes);                  \
    }                                                                                             \
    break;
        case 1: SCORE_BYTES(1, 4)
        case 2: SCORE_BYTES(2, 4)
        case 3: SCORE_BYTES(3, 4)
        case 4: SCORE_BYTES(4, 4)
        case 5: SCORE_BYTES(5, 2)
        case 6: SCORE_BYTES(6, 2)
        case 7: SCORE_BYTES(7, 2)
        default: SCORE_BYTES(FEW, 2)
#undef SCORE_BYTES
        }
        ahead = k;
    }
}

/* Weights times scales of n tokens in fifteen bits; gives what undoes it. */
ALWAYS_INLINE float byte_weights(const float *p, const float *scales, size_t n, int16_t *codes)
{
    __m512i most = _mm512_setzero_si512();
    for (size_t t = 0; t < n; t += LANES) {
        const __mmask16 mask = first_lanes(n - t);
        const __m512 v = _mm512_maskz_mul_ps(mask, _mm512_maskz_loadu_ps(mask, p + t),
                                             _mm512_load_ps(scales + t));
        most = _mm512_max_epi32(most, magnitude_bits(v));
    }
    float scale;
    const float inverse = v4_kv_inverse(largest_magnitude(most), &scale);
    for (size_t t = 0; t < n; t += LANES) {
        const __mmask16 mask = first_lanes(n - t);
        const __m512 v = _mm512_maskz_mul_ps(mask, _mm512_maskz_loadu_ps(mask, p + t),
                                             _mm512_load_ps(scales + t));
        store_codes(codes + t, v, inverse);
    }
    return scale;
}

/* Adds 32 columns of the values for a few queries. */
ALWAYS_INLINE void add_bytes(int n_q, int16_t weights[FEW][V4_KV_TOKENS], const float *scale,
                             const char *slabs, size_t n_kv, size_t head_dim, size_t c,
                             float *out, const char *ahead)
{
    const size_t bytes = v4_slab_bytes(V4_KV_Q8_0, head_dim);
    __m512i dot[FEW][2];
    UNROLL
    for (int i = 0; i < n_q; i++) {
        dot[i][0] = dot[i][1] = _mm512_setzero_si512();
    }
    for (size_t j = 0; j < n_kv; j += V4_SLAB) {
        const size_t n_tokens = n_kv - j < V4_SLAB ? n_kv - j : V4_SLAB;
        const size_t slab = j / V4_SLAB * bytes;
        for (size_t t = 0; t < n_tokens; t += 2) {
            const size_t at = slab + t * head_dim + 2 * c;
            const __m512i a = widened(slabs + at), b = widened(slabs + at + 2 * LANES);
            _mm_prefetch(ahead + at, _MM_HINT_T1);
            UNROLL
            for (int i = 0; i < n_q; i++) {
                const __m512i pair = pair_of(weights[i], j + t);
                dot[i][0] = _mm512_dpwssd_epi32(dot[i][0], a, pair);
                dot[i][1] = _mm512_dpwssd_epi32(dot[i][1], b, pair);
            }
        }
    }
    UNROLL
    for (int i = 0; i < n_q; i++) {
        const __m512 own = _mm512_set1_ps(scale[i]);
        UNROLL
        for (int v = 0; v < 2; v++) {
            float *to = out + (size_t)i * head_dim + c + (size_t)v * LANES;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i][v]), own,
                                                 _mm512_loadu_ps(to)));
        }
    }
}

static void attn_values_q8_0(const float *p, size_t n_q, size_t p_stride, const void *v,
                             size_t n_kv, size_t head_dim, float *out, const void *next)
{
    _Alignas(64) float scales[V4_KV_TOKENS];
    int16_t weights[FEW][V4_KV_TOKENS];
    float scale[FEW];
    const size_t bytes = v4_slab_bytes(V4_KV_Q8_0, head_dim);
    const char *slabs = v, *ahead = next ? next : v;
    for (size_t c = 0; c < head_dim; c += V4_KV_GROUP) {
        for (size_t j = 0; j < n_kv; j += V4_SLAB) {
            const size_t at = j / V4_SLAB * bytes;
            if (c == 0) {
                bring_scales(ahead + at, head_dim);
            }
            _mm512_store_ps(scales + j, kv_scales(slabs + at, head_dim, c));
        }
        for (size_t i = 0; i < n_q; i += FEW) {
            for (size_t r = 0; r < FEW && i + r < n_q; r++) {
                scale[r] = byte_weights(p + (i + r) * p_stride, scales, n_kv, weights[r]);
            }
            float *to = out + i * head_dim;
            switch (n_q - i) {
#define ADD_BYTES(n)                                                                              \
    add_bytes(n, weights, scale, slabs, n_kv, head_dim, c, to, i == 0 ? ahead : slabs);           \
    break;
            case 1: ADD_BYTES(1)
            case 2: ADD_BYTES(2)
            case 3: ADD_BYTES(3)
            case 4: ADD_BYTES(4)
            case 5: ADD_BYTES(5)
            case 6: ADD_BYTES(6)
            case 7: ADD_BYTES(7)
            default: ADD_BYTES(FEW)
#undef ADD_BYTES
            }
        }
    }
}

#endif
