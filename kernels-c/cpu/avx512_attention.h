/* Attention with AVX-512: a part of avx512.c.
 *
 * A few queries (a token of decode: the heads of a group) take the numbers as they come, convert
 * each once for all of them and keep every sum in a register; memory is the limit then. Many
 * (prefill) take them from a converted copy in the first cache. Sums run in the same order, so both
 * give the same bits. */
#ifndef V4_AVX512_ATTENTION_H
#define V4_AVX512_ATTENTION_H

/* Queries that are a few; tokens and columns of a converted copy; queries of a tile of many. */
enum { FEW = 8, COPY = 64, COPY_VECTORS = COPY / LANES, ATTN_ROWS = 6 };

/* Sixteen numbers at `at`, of which those in the mask are read. */
ALWAYS_INLINE __m512 kv_load(enum v4_kv kind, const char *slab, size_t at, __mmask16 mask)
{
    return kind == V4_KV_F16 ? load_f16(slab, at, mask) : load_bf16(slab, at, mask);
}

/* Into the second cache. */
ALWAYS_INLINE void bring(const char *ahead, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += LINE) {
        _mm_prefetch(ahead + at, _MM_HINT_T1);
    }
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* Adds column c of the keys of n_vec slabs. */
ALWAYS_INLINE void score_column(enum v4_kv kind, const float *q, int n_q, int n_vec,
                                const char *const slab[COPY_VECTORS], size_t c, size_t head_dim,
                                __m512 acc[FEW][COPY_VECTORS])
{
    __m512 keys[COPY_VECTORS];
    UNROLL
    for (int v = 0; v < n_vec; v++) {
        keys[v] = kv_load(kind, slab[v], c * LANES, 0xffff);
    }
    UNROLL
    for (int i = 0; i < n_q; i++) {
        const __m512 value = _mm512_set1_ps(q[(size_t)i * head_dim + c]);
        UNROLL
        for (int v = 0; v < n_vec; v++) {
            acc[i][v] = _mm512_fmadd_ps(value, keys[v], acc[i][v]);
        }
    }
}

/* The keys of n_vec slabs for a few queries. Of slabs beyond the n_slabs that there are, nothing
 * is kept. */
ALWAYS_INLINE void score_slabs(enum v4_kv kind, const float *q, int n_q, int n_vec, const char *k,
                               size_t n_slabs, size_t head_dim, float factor, float *scores,
                               size_t stride, const char *ahead)
{
    enum { STEP = 4 };
    const size_t bytes = v4_slab_bytes(kind, head_dim);
    const size_t column = LANES * sizeof(uint16_t);
    const char *slab[COPY_VECTORS];
    __m512 acc[FEW][COPY_VECTORS];
    UNROLL
    for (int v = 0; v < n_vec; v++) {
        slab[v] = k + ((size_t)v < n_slabs ? (size_t)v : n_slabs - 1) * bytes;
        UNROLL
        for (int i = 0; i < n_q; i++) {
            acc[i][v] = _mm512_setzero_ps();
        }
    }
    size_t c = 0;
    for (; c + STEP <= head_dim; c += STEP) {
        UNROLL
        for (int v = 0; v < n_vec; v++) {
            bring(ahead + (size_t)v * bytes + c * column, STEP * column);
        }
        UNROLL
        for (size_t at = c; at < c + STEP; at++) {
            score_column(kind, q, n_q, n_vec, slab, at, head_dim, acc);
        }
    }
    for (; c < head_dim; c++) {
        score_column(kind, q, n_q, n_vec, slab, c, head_dim, acc);
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

ALWAYS_INLINE void score_few(enum v4_kv kind, const float *q, int n_q, int n_vec, const char *k,
                             size_t n_kv, size_t head_dim, float factor, float *scores,
                             size_t stride, const char *next)
{
    const size_t n_slabs = (n_kv + V4_SLAB - 1) / V4_SLAB;
    const size_t bytes = v4_slab_bytes(kind, head_dim);
    for (size_t s = 0; s < n_slabs; s += (size_t)n_vec) {
        score_slabs(kind, q, n_q, n_vec, k + s * bytes, n_slabs - s, head_dim, factor,
                    scores + s * LANES, stride, next + s * bytes);
    }
}

/* Columns c.. of up to 64 keys to keys[column][key]; what is missing is zero. */
ALWAYS_INLINE void copy_keys(enum v4_kv kind, const char *k, size_t n_slabs, size_t head_dim,
                             size_t c, size_t width, float keys[COPY][COPY])
{
    for (size_t v = 0; v < COPY_VECTORS; v++) {
        const char *slab = k + v * v4_slab_bytes(kind, head_dim);
        for (size_t i = 0; i < width; i++) {
            __m512 key = _mm512_setzero_ps();
            if (v < n_slabs) {
                key = kv_load(kind, slab, (c + i) * LANES, 0xffff);
            }
            _mm512_store_ps(&keys[i][v * LANES], key);
        }
    }
}

/* Adds `width` columns of n_q queries times the copied keys to the scores of n_slabs of them. */
ALWAYS_INLINE void score_tile(const float *q, int n_q, size_t q_stride, float keys[COPY][COPY],
                              size_t width, size_t n_slabs, int begin, float factor, float *scores,
                              size_t stride)
{
    __m512 acc[ATTN_ROWS][COPY_VECTORS];
    __mmask16 mask[COPY_VECTORS];
    UNROLL
    for (size_t v = 0; v < COPY_VECTORS; v++) {
        mask[v] = v < n_slabs ? 0xffff : 0;
        UNROLL
        for (int i = 0; i < n_q; i++) {
            const float *from = scores + (size_t)i * stride + LANES * v;
            acc[i][v] = _mm512_maskz_loadu_ps(begin ? 0 : mask[v], from);
        }
    }
    for (size_t c = 0; c < width; c++) {
        __m512 key[COPY_VECTORS];
        UNROLL
        for (size_t v = 0; v < COPY_VECTORS; v++) {
            key[v] = _mm512_load_ps(&keys[c][LANES * v]);
        }
        UNROLL
        for (int i = 0; i < n_q; i++) {
            const __m512 value = _mm512_set1_ps(q[(size_t)i * q_stride + c]);
            UNROLL
            for (size_t v = 0; v < COPY_VECTORS; v++) {
                acc[i][v] = _mm512_fmadd_ps(value, key[v], acc[i][v]);
            }
        }
    }
    UNROLL
    for (int i = 0; i < n_q; i++) {
        UNROLL
        for (size_t v = 0; v < COPY_VECTORS; v++) {
            _mm512_mask_storeu_ps(scores + (size_t)i * stride + LANES * v, mask[v],
                                  _mm512_mul_ps(acc[i][v], _mm512_set1_ps(factor)));
        }
    }
}

static void score_tiles(const float *q, size_t n_q, size_t q_stride, float keys[COPY][COPY],
                        size_t width, size_t n_slabs, int begin, float factor, float *scores,
                        size_t stride)
{
    size_t i = 0;
#define SCORE_TILES(n_tile)                                                                       \
    for (; i + (n_tile) <= n_q; i += (n_tile)) {                                                  \
        score_tile(q + i * q_stride, n_tile, q_stride, keys, width, n_slabs, begin, factor,       \
                   scores + i * stride, stride);                                                  \
    }
    SCORE_TILES(ATTN_ROWS)
    SCORE_TILES(3)
    SCORE_TILES(1)
#undef SCORE_TILES
}

ALWAYS_INLINE void score_many(enum v4_kv kind, const float *q, size_t n_q, const char *k,
                              size_t n_kv, size_t head_dim, float scale, float *scores,
                              size_t stride)
{
    _Alignas(64) float keys[COPY][COPY];
    for (size_t j = 0; j < n_kv; j += COPY, k += COPY_VECTORS * v4_slab_bytes(kind, head_dim)) {
        const size_t n_slabs = (n_kv - j + V4_SLAB - 1) / V4_SLAB;
        for (size_t c = 0; c < head_dim; c += COPY) {
            const size_t width = head_dim - c < COPY ? head_dim - c : COPY;
            const float factor = c + width == head_dim ? scale : 1;
            copy_keys(kind, k, n_slabs, head_dim, c, width, keys);
            score_tiles(q + c, n_q, head_dim, keys, width, n_slabs, c == 0, factor, scores + j,
                        stride);
        }
    }
}

ALWAYS_INLINE void scores_of(enum v4_kv kind, const float *q, size_t n_q, const void *k,
                             size_t n_kv, size_t head_dim, float scale, float *scores,
                             size_t stride, const void *next)
{
    const char *ahead = next ? next : k;
    switch (n_q) {
#define SCORE_FEW(n, n_vec)                                                                       \
    case n:                                                                                       \
        score_few(kind, q, n, n_vec, k, n_kv, head_dim, scale, scores, stride, ahead);            \
        return;
        SCORE_FEW(1, 4)
        SCORE_FEW(2, 4)
        SCORE_FEW(3, 4)
        SCORE_FEW(4, 4)
        SCORE_FEW(5, 2)
        SCORE_FEW(6, 2)
        SCORE_FEW(7, 2)
        SCORE_FEW(8, 2)
#undef SCORE_FEW
    default:
        score_many(kind, q, n_q, k, n_kv, head_dim, scale, scores, stride);
    }
}

/* ---- values ---------------------------------------------------------------------------------- */

/* Adds the values of up to sixteen tokens in n_vec vectors of columns from c. */
ALWAYS_INLINE void add_slab(enum v4_kv kind, const float *p, int n_q, size_t p_stride,
                            const char *slab, size_t n_tokens, size_t head_dim, size_t c,
                            int n_vec, const __mmask16 mask[COPY_VECTORS],
                            __m512 acc[FEW][COPY_VECTORS], const char *ahead)
{
    for (size_t t = 0; t < n_tokens; t++) {
        const size_t at = t * head_dim + c;
        __m512 values[COPY_VECTORS];
        bring(ahead + at * sizeof(uint16_t), (size_t)n_vec * LANES * sizeof(uint16_t));
        UNROLL
        for (int v = 0; v < n_vec; v++) {
            values[v] = kv_load(kind, slab, at + (size_t)v * LANES, mask[v]);
        }
        UNROLL
        for (int i = 0; i < n_q; i++) {
            const __m512 factor = _mm512_set1_ps(p[(size_t)i * p_stride + t]);
            UNROLL
            for (int v = 0; v < n_vec; v++) {
                acc[i][v] = _mm512_fmadd_ps(factor, values[v], acc[i][v]);
            }
        }
    }
}

ALWAYS_INLINE void values_few(enum v4_kv kind, const float *p, int n_q, size_t p_stride,
                              const char *slabs, size_t n_kv, size_t head_dim, int n_vec,
                              float *out, const char *next)
{
    const size_t bytes = v4_slab_bytes(kind, head_dim);
    for (size_t c = 0; c < head_dim; c += (size_t)n_vec * LANES) {
        __m512 acc[FEW][COPY_VECTORS];
        __mmask16 mask[COPY_VECTORS];
        UNROLL
        for (int v = 0; v < n_vec; v++) {
            const size_t column = c + (size_t)v * LANES;
            mask[v] = column < head_dim ? first_lanes(head_dim - column) : 0;
            UNROLL
            for (int i = 0; i < n_q; i++) {
                acc[i][v] = _mm512_maskz_loadu_ps(mask[v], out + (size_t)i * head_dim + column);
            }
        }
        for (size_t j = 0; j < n_kv; j += V4_SLAB) {
            const size_t n_tokens = n_kv - j < V4_SLAB ? n_kv - j : V4_SLAB;
            const size_t at = j / V4_SLAB * bytes;
            add_slab(kind, p + j, n_q, p_stride, slabs + at, n_tokens, head_dim, c, n_vec, mask,
                     acc, next + at);
        }
        UNROLL
        for (int v = 0; v < n_vec; v++) {
            UNROLL
            for (int i = 0; i < n_q; i++) {
                _mm512_mask_storeu_ps(out + (size_t)i * head_dim + c + (size_t)v * LANES, mask[v],
                                      acc[i][v]);
            }
        }
    }
}

/* Columns c.. of up to 64 values to values[token][column]; columns beyond the width are zero. */
ALWAYS_INLINE void copy_values(enum v4_kv kind, const char *slabs, size_t n_tokens,
                               size_t head_dim, size_t c, size_t width, float values[COPY][COPY])
{
    const size_t bytes = v4_slab_bytes(kind, head_dim);
    for (size_t j = 0; j < n_tokens; j++) {
        const char *slab = slabs + j / V4_SLAB * bytes;
        const size_t token = j % V4_SLAB;
        for (size_t i = 0; i < COPY; i += LANES) {
            const __mmask16 mask = i < width ? first_lanes(width - i) : 0;
            const __m512 value = kv_load(kind, slab, token * head_dim + c + i, mask);
            _mm512_store_ps(&values[j][i], value);
        }
    }
}

/* Adds up to 64 columns of the copied values for a few of many queries. */
ALWAYS_INLINE void value_tile(const float *p, int n_q, size_t p_stride, float values[COPY][COPY],
                              size_t n_tokens, size_t width, float *out, size_t out_stride)
{
    __m512 acc[ATTN_ROWS][COPY_VECTORS];
    __mmask16 mask[COPY_VECTORS];
    UNROLL
    for (size_t v = 0; v < COPY_VECTORS; v++) {
        mask[v] = width > v * LANES ? first_lanes(width - v * LANES) : 0;
        UNROLL
        for (int i = 0; i < n_q; i++) {
            acc[i][v] = _mm512_maskz_loadu_ps(mask[v], out + (size_t)i * out_stride + v * LANES);
        }
    }
    for (size_t j = 0; j < n_tokens; j++) {
        __m512 value[COPY_VECTORS];
        UNROLL
        for (size_t v = 0; v < COPY_VECTORS; v++) {
            value[v] = _mm512_load_ps(&values[j][v * LANES]);
        }
        UNROLL
        for (int i = 0; i < n_q; i++) {
            const __m512 factor = _mm512_set1_ps(p[(size_t)i * p_stride + j]);
            UNROLL
            for (size_t v = 0; v < COPY_VECTORS; v++) {
                acc[i][v] = _mm512_fmadd_ps(factor, value[v], acc[i][v]);
            }
        }
    }
    UNROLL
    for (size_t v = 0; v < COPY_VECTORS; v++) {
        UNROLL
        for (int i = 0; i < n_q; i++) {
            _mm512_mask_storeu_ps(out + (size_t)i * out_stride + v * LANES, mask[v], acc[i][v]);
        }
    }
}

static void value_tiles(const float *p, size_t n_q, size_t p_stride, float values[COPY][COPY],
                        size_t n_tokens, size_t width, float *out, size_t out_stride)
{
    size_t i = 0;
#define VALUE_TILES(n)                                                                            \
    for (; i + (n) <= n_q; i += (n)) {                                                            \
        value_tile(p + i * p_stride, n, p_stride, values, n_tokens, width, out + i * out_stride,  \
                   out_stride);                                                                   \
    }
    VALUE_TILES(ATTN_ROWS)
    VALUE_TILES(3)
    VALUE_TILES(1)
#undef VALUE_TILES
}

ALWAYS_INLINE void values_many(enum v4_kv kind, const float *p, size_t n_q, size_t p_stride,
                               const char *slabs, size_t n_kv, size_t head_dim, float *out)
{
    _Alignas(64) float values[COPY][COPY];
    const size_t bytes = v4_slab_bytes(kind, head_dim);
    for (size_t j = 0; j < n_kv; j += COPY) {
        const size_t n_tokens = n_kv - j < COPY ? n_kv - j : COPY;
        for (size_t c = 0; c < head_dim; c += COPY) {
            const size_t width = head_dim - c < COPY ? head_dim - c : COPY;
            copy_values(kind, slabs + j / V4_SLAB * bytes, n_tokens, head_dim, c, width, values);
            value_tiles(p + j, n_q, p_stride, values, n_tokens, width, out + c, head_dim);
        }
    }
}

ALWAYS_INLINE void values_of(enum v4_kv kind, const float *p, size_t n_q, size_t p_stride,
                             const void *v, size_t n_kv, size_t head_dim, float *out,
                             const void *next)
{
    const char *ahead = next ? next : v;
    switch (n_q) {
#define VALUES_FEW(n, n_vec)                                                                      \
    case n:                                                                                       \
        values_few(kind, p, n, p_stride, v, n_kv, head_dim, n_vec, out, ahead);                   \
        return;
        VALUES_FEW(1, 4)
        VALUES_FEW(2, 4)
        VALUES_FEW(3, 4)
        VALUES_FEW(4, 4)
        VALUES_FEW(5, 2)
        VALUES_FEW(6, 2)
        VALUES_FEW(7, 2)
        VALUES_FEW(8, 2)
#undef VALUES_FEW
    default:
        values_many(kind, p, n_q, p_stride, v, n_kv, head_dim, out);
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

#endif
