/* The reference: every slot for every format in plain C. Other entries are held against it, and it
 * runs where none of them can. Products of blocks are integer within a group and float between
 * groups, so the sum over a group is the same in every entry. */
#include <math.h>
#include <string.h>

#include "../include/v4.h"
#include "../quant/blocks.h"

/* Partial sums of a dot product: enough for the compiler to use vectors without reordering. */
enum { LANES = 16 };

static float dot_f32(const float *a, const float *b, size_t n)
{
    float lane[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (size_t k = 0; k < LANES; k++) {
            lane[k] += a[i + k] * b[i + k];
        }
    }
    for (size_t k = 0; i < n; i++, k++) {
        lane[k] += a[i] * b[i];
    }
    for (size_t width = LANES / 2; width > 0; width /= 2) {
        for (size_t k = 0; k < width; k++) {
            lane[k] += lane[k + width];
        }
    }
    return lane[0];
}

static int32_t dot_i8(const int8_t *a, const int8_t *b, size_t n)
{
    int32_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

/* Adds to `acc` what the 32 weights from `at` of a row give with token t, rounded as v4.h says.
 *   q      [V4_ACT_GROUP]
 *   scale  [V4_ACT_GROUP / group]
 *   min    the same, or NULL for a format without */
static float add_group(float acc, const struct v4_act *x, size_t t, size_t at, size_t group,
                       const int8_t *q, const float *scale, const float *min)
{
    const size_t i = t * x->cols + at;
    for (size_t g = 0; g < V4_ACT_GROUP / group; g++) {
        float v = (float)dot_i8(q + g * group, x->q + i + g * group, group) * scale[g];
        if (min) {
            int32_t sum = 0;
            for (size_t k = 0; k < group; k += V4_SUM_GROUP) {
                sum += x->sum[(i + g * group + k) / V4_SUM_GROUP];
            }
            v = fmaf(-min[g], (float)sum, v);
        }
        acc = fmaf(v, x->d[i / V4_ACT_GROUP], acc);
    }
    return acc;
}

/* The three slots of a block format. A panel is [V4_PANEL_ROWS][cols] int8, then the scales, then
 * the minima, both [V4_PANEL_ROWS][cols / group]. */
#define V4_QUANT(NAME, name, number, len, bytes, group, has_min)                                  \
    static void dequant_row_##name(const void *w, size_t cols, float *out)                        \
    {                                                                                             \
        const struct v4_block_##name *block = w;                                                  \
        for (size_t i = 0; i < cols; i += (len)) {                                                \
            v4_##name##_decode_f32(block++, out + i);                                             \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    static void gemv_##name(const void *w, size_t row_bytes, size_t rows, const struct v4_act *x, \
                            float *out, size_t out_stride)                                        \
    {                                                                                             \
        int8_t q[len];                                                                            \
        float scale[(len) / (group)], min[(len) / (group)];                                       \
        for (size_t r = 0; r < rows; r++) {                                                       \
            const struct v4_block_##name *block = (const void *)((const char *)w + r * row_bytes); \
            float acc[V4_GEMV_TOKENS] = {0};                                                      \
            for (size_t i = 0; i < x->cols; i += (len)) {                                         \
                v4_##name##_decode_i8(block++, q, scale, min);                                    \
                for (size_t t = 0; t < x->n_tokens; t++) {                                        \
                    for (size_t k = 0; k < (len); k += V4_ACT_GROUP) {                            \
                        const size_t g = k / (group);                                             \
                        acc[t] = add_group(acc[t], x, t, i + k, group, q + k, scale + g,          \
                                           (has_min) ? min + g : 0);                              \
                    }                                                                             \
                }                                                                                 \
            }                                                                                     \
            for (size_t t = 0; t < x->n_tokens; t++) {                                            \
                out[t * out_stride + r] = acc[t];                                                 \
            }                                                                                     \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    static void panel_##name(const void *w, size_t row_bytes, size_t rows, size_t cols,           \
                             void *panel)                                                         \
    {                                                                                             \
        int8_t *q = panel;                                                                        \
        float *scale = (float *)(void *)(q + V4_PANEL_ROWS * cols);                               \
        float *min = scale + V4_PANEL_ROWS * (cols / (group));                                    \
        for (size_t r = 0; r < rows; r++) {                                                       \
            const struct v4_block_##name *block = (const void *)((const char *)w + r * row_bytes); \
            for (size_t i = 0; i < cols; i += (len)) {                                            \
                const size_t at = r * cols + i;                                                   \
                v4_##name##_decode_i8(block++, q + at, scale + at / (group), min + at / (group)); \
            }                                                                                     \
        }                                                                                         \
    }
V4_BLOCKS(V4_QUANT)
#undef V4_QUANT

/* The two slots of a float format: a stretch of the row is converted, then used for all tokens. */
#define V4_QUANT(NAME, name, number, len, bytes, group, has_min)                                  \
    static void dequant_row_##name(const void *w, size_t cols, float *out)                        \
    {                                                                                             \
        const struct v4_block_##name *block = w;                                                  \
        for (size_t i = 0; i < cols; i++) {                                                       \
            v4_##name##_decode_f32(block + i, out + i);                                           \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    static void gemv_##name(const void *w, size_t row_bytes, size_t rows, const struct v4_act *x, \
                            float *out, size_t out_stride)                                        \
    {                                                                                             \
        float part[256];                                                                          \
        for (size_t r = 0; r < rows; r++) {                                                       \
            const struct v4_block_##name *block = (const void *)((const char *)w + r * row_bytes); \
            float acc[V4_GEMV_TOKENS] = {0};                                                      \
            for (size_t i = 0; i < x->cols; i += 256) {                                           \
                const size_t n = x->cols - i < 256 ? x->cols - i : 256;                           \
                dequant_row_##name(block + i, n, part);                                           \
                for (size_t t = 0; t < x->n_tokens; t++) {                                        \
                    acc[t] += dot_f32(part, x->x + t * x->cols + i, n);                           \
                }                                                                                 \
            }                                                                                     \
            for (size_t t = 0; t < x->n_tokens; t++) {                                            \
                out[t * out_stride + r] = acc[t];                                                 \
            }                                                                                     \
        }                                                                                         \
    }
V4_FLOATS(V4_QUANT)
#undef V4_QUANT

static size_t panel_bytes(uint32_t quant, size_t cols)
{
    const struct v4_quant_info *info = v4_quant_describe(quant);
    const size_t floats = (1 + info->has_min) * (cols / info->group);
    return V4_PANEL_ROWS * (cols + sizeof(float) * floats);
}

static void gemm_i8(uint32_t quant, const void *panel, size_t rows, const struct v4_act *x,
                    float *out, size_t out_stride)
{
    const struct v4_quant_info *info = v4_quant_describe(quant);
    const size_t group = info->group;
    const int8_t *q = panel;
    const float *scale = (const float *)(const void *)(q + V4_PANEL_ROWS * x->cols);
    const float *min = scale + V4_PANEL_ROWS * (x->cols / group);
    for (size_t r = 0; r < rows; r++) {
        for (size_t t = 0; t < x->n_tokens; t++) {
            float acc = 0;
            for (size_t k = 0; k < x->cols; k += V4_ACT_GROUP) {
                const size_t at = r * x->cols + k;
                acc = add_group(acc, x, t, k, group, q + at, scale + at / group,
                                info->has_min ? min + at / group : 0);
            }
            out[t * out_stride + r] = acc;
        }
    }
}

static void gemm_f32(const float *w, size_t rows, const struct v4_act *x, float *out,
                     size_t out_stride)
{
    for (size_t r = 0; r < rows; r++) {
        for (size_t t = 0; t < x->n_tokens; t++) {
            out[t * out_stride + r] = dot_f32(w + r * x->cols, x->x + t * x->cols, x->cols);
        }
    }
}

static void quantize(const float *x, size_t cols, int8_t *q, float *d, int16_t *sum)
{
    for (size_t i = 0; i < cols; i += V4_ACT_GROUP) {
        int32_t max = 0;
        for (size_t k = i; k < i + V4_ACT_GROUP; k++) {
            const int32_t bits = v4_magnitude_bits(x[k]);
            max = bits > max ? bits : max;
        }
        const float inverse = v4_act_scale(max, d + i / V4_ACT_GROUP);
        for (size_t k = i; k < i + V4_ACT_GROUP; k++) {
            q[k] = inverse > 0 ? (int8_t)lrintf(x[k] * inverse) : 0;
        }
        for (size_t s = i; s < i + V4_ACT_GROUP; s += V4_SUM_GROUP) {
            int total = 0;
            for (size_t k = s; k < s + V4_SUM_GROUP; k++) {
                total += q[k];
            }
            sum[s / V4_SUM_GROUP] = (int16_t)total;
        }
    }
}

static void rms_norm(const float *x, const float *weight, size_t n, float eps, float *out)
{
    const float factor = 1 / sqrtf(dot_f32(x, x, n) / (float)n + eps);
    for (size_t i = 0; i < n; i++) {
        out[i] = x[i] * factor * weight[i];
    }
}

static void rope(enum v4_rope kind, float *x, size_t n_heads, size_t head_dim, const float *cos,
                 const float *sin, size_t n_pairs)
{
    const size_t step = kind == V4_ROPE_ADJACENT ? 2 : 1;
    const size_t apart = kind == V4_ROPE_ADJACENT ? 1 : n_pairs;
    for (size_t h = 0; h < n_heads; h++) {
        float *head = x + h * head_dim;
        for (size_t p = 0; p < n_pairs; p++) {
            const float a = head[p * step], b = head[p * step + apart];
            head[p * step] = a * cos[p] - b * sin[p];
            head[p * step + apart] = a * sin[p] + b * cos[p];
        }
    }
}

/* The value at `at` of a slab of numbers. */
static float kv_value(enum v4_kv kind, const void *slab, size_t at)
{
    const uint16_t bits = ((const uint16_t *)slab)[at];
    return kind == V4_KV_F16 ? v4_f32_of_f16(bits) : v4_f32_of_bf16(bits);
}

static void scores_of(enum v4_kv kind, const float *q, size_t n_q, const void *k, size_t n_kv,
                      size_t head_dim, float scale, float *scores, size_t score_stride)
{
    const char *slab = k;
    for (size_t j = 0; j < n_kv; j += V4_SLAB, slab += v4_slab_bytes(kind, head_dim)) {
        for (size_t i = 0; i < n_q; i++) {
            memset(scores + i * score_stride + j, 0, V4_SLAB * sizeof *scores);
        }
        for (size_t c = 0; c < head_dim; c++) {
            float keys[V4_SLAB];
            for (size_t t = 0; t < V4_SLAB; t++) {
                keys[t] = kv_value(kind, slab, c * V4_SLAB + t);
            }
            for (size_t i = 0; i < n_q; i++) {
                float *sum = scores + i * score_stride + j;
                for (size_t t = 0; t < V4_SLAB; t++) {
                    sum[t] += q[i * head_dim + c] * keys[t];
                }
            }
        }
        for (size_t i = 0; i < n_q; i++) {
            for (size_t t = 0; t < V4_SLAB; t++) {
                scores[i * score_stride + j + t] *= scale;
            }
        }
    }
}

static void values_of(enum v4_kv kind, const float *p, size_t n_q, size_t p_stride, const void *v,
                      size_t n_kv, size_t head_dim, float *out)
{
    for (size_t j = 0; j < n_kv; j++) {
        const char *slab = (const char *)v + j / V4_SLAB * v4_slab_bytes(kind, head_dim);
        for (size_t c = 0; c < head_dim; c++) {
            const float value = kv_value(kind, slab, j % V4_SLAB * head_dim + c);
            for (size_t i = 0; i < n_q; i++) {
                out[i * head_dim + c] += p[i * p_stride + j] * value;
            }
        }
    }
}

#define KV_SLOTS(KIND, kind)                                                                      \
    static void attn_scores_##kind(const float *q, size_t n_q, const void *k, size_t n_kv,        \
                                   size_t head_dim, float scale, float *scores,                   \
                                   size_t score_stride, const void *next)                         \
    {                                                                                             \
        (void)next;                                                                               \
        scores_of(V4_KV_##KIND, q, n_q, k, n_kv, head_dim, scale, scores, score_stride);          \
    }                                                                                             \
    static void attn_values_##kind(const float *p, size_t n_q, size_t p_stride, const void *v,    \
                                   size_t n_kv, size_t head_dim, float *out, const void *next)    \
    {                                                                                             \
        (void)next;                                                                               \
        values_of(V4_KV_##KIND, p, n_q, p_stride, v, n_kv, head_dim, out);                        \
    }
KV_SLOTS(F16, f16)
KV_SLOTS(BF16, bf16)
#undef KV_SLOTS

/* The scale of a slab's token `token` for the group of column c. */
static float byte_scale(const char *slab, size_t head_dim, size_t c, size_t token)
{
    uint16_t half;
    const size_t at = c / V4_KV_GROUP * V4_SLAB + token;
    memcpy(&half, slab + V4_SLAB * head_dim + at * sizeof half, sizeof half);
    return v4_f32_of_f16(half);
}

/* n values, times a scale each where there are any, to fifteen bits; gives what undoes it. */
static float codes_of(const float *x, const float *scales, size_t n, int16_t *codes)
{
    int32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        const int32_t bits = v4_magnitude_bits(scales ? x[i] * scales[i] : x[i]);
        most = bits > most ? bits : most;
    }
    float max, scale;
    memcpy(&max, &most, sizeof max);
    const float inverse = v4_kv_inverse(max, &scale);
    for (size_t i = 0; i < n; i++) {
        const float code = (scales ? x[i] * scales[i] : x[i]) * inverse;
        codes[i] = fabsf(code) < 32767.5f ? (int16_t)lrintf(code) : 0;
    }
    return scale;
}

static void attn_query(const float *q, size_t n_q, size_t head_dim, float *out)
{
    for (size_t i = 0; i < n_q; i++, q += head_dim, out += head_dim) {
        for (size_t c = 0; c < head_dim; c += V4_KV_GROUP) {
            int16_t codes[V4_KV_GROUP];
            out[head_dim / 2 + c / V4_KV_GROUP] = codes_of(q + c, NULL, V4_KV_GROUP, codes);
            memcpy((char *)out + c * sizeof *codes, codes, sizeof codes);
        }
    }
}

static void attn_scores_q8_0(const float *q, size_t n_q, const void *k, size_t n_kv,
                             size_t head_dim, float scale, float *scores, size_t score_stride,
                             const void *next)
{
    (void)next;
    for (size_t i = 0; i < n_q; i++, q += head_dim) {
        for (size_t j = 0; j < (n_kv + V4_SLAB - 1) / V4_SLAB * V4_SLAB; j++) {
            const size_t token = j % V4_SLAB;
            const char *slab =
                (const char *)k + j / V4_SLAB * v4_slab_bytes(V4_KV_Q8_0, head_dim);
            float sum = 0;
            for (size_t c = 0; c < head_dim; c += V4_KV_GROUP) {
                int16_t codes[V4_KV_GROUP];
                int32_t dot = 0;
                memcpy(codes, (const char *)q + c * sizeof *codes, sizeof codes);
                for (size_t n = 0; n < V4_KV_GROUP; n++) {
                    const size_t at = ((c + n) / 2 * V4_SLAB + token) * 2 + n % 2;
                    dot += codes[n] * (int8_t)slab[at];
                }
                const float own = q[head_dim / 2 + c / V4_KV_GROUP];
                sum += (float)dot * (byte_scale(slab, head_dim, c, token) * own);
            }
            scores[i * score_stride + j] = scale * sum;
        }
    }
}

static void attn_values_q8_0(const float *p, size_t n_q, size_t p_stride, const void *v,
                             size_t n_kv, size_t head_dim, float *out, const void *next)
{
    (void)next;
    const size_t bytes = v4_slab_bytes(V4_KV_Q8_0, head_dim);
    const char *slabs = v;
    for (size_t c = 0; c < head_dim; c += V4_KV_GROUP) {
        float scales[V4_KV_TOKENS];
        for (size_t j = 0; j < n_kv; j++) {
            scales[j] = byte_scale(slabs + j / V4_SLAB * bytes, head_dim, c, j % V4_SLAB);
        }
        for (size_t i = 0; i < n_q; i++) {
            int16_t codes[V4_KV_TOKENS];
            const float scale = codes_of(p + i * p_stride, scales, n_kv, codes);
            for (size_t n = c; n < c + V4_KV_GROUP; n++) {
                int32_t dot = 0;
                for (size_t j = 0; j < n_kv; j++) {
                    const size_t token = j % V4_SLAB;
                    const size_t at = (token / 2 * head_dim + n) * 2 + token % 2;
                    dot += codes[j] * (int8_t)slabs[j / V4_SLAB * bytes + at];
                }
                out[i * head_dim + n] += (float)dot * scale;
            }
        }
    }
}

static void softmax_tile(float *x, size_t n, float *max, float *sum)
{
    *max = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        *max = fmaxf(*max, x[i]);
    }
    const float shift = *max == -INFINITY ? 0 : *max;
    *sum = 0;
    for (size_t i = 0; i < n; i++) {
        x[i] = expf(x[i] - shift);
        *sum += x[i];
    }
}

static void join(float *x, float a, const float *y, float b, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        x[i] = a * x[i] + b * y[i];
    }
}

static float silu(float x)
{
    return x / (1 + expf(-x));
}

static float gelu_tanh(float x)
{
    const float sqrt_2_over_pi = 0.7978845608f;
    return 0.5f * x * (1 + tanhf(sqrt_2_over_pi * (x + 0.044715f * x * x * x)));
}

static void gated(enum v4_activation kind, float *gate, const float *up, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        gate[i] = (kind == V4_SILU ? silu(gate[i]) : gelu_tanh(gate[i])) * up[i];
    }
}

static void soft_cap(float *x, size_t n, float cap)
{
    for (size_t i = 0; i < n; i++) {
        x[i] = cap * tanhf(x[i] / cap);
    }
}

static void add(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        x[i] += y[i];
    }
}

static void f16_from_f32(const float *x, size_t n, uint16_t *out)
{
    for (size_t i = 0; i < n; i++) {
        out[i] = v4_f16_of_f32(x[i]);
    }
}

static void f32_from_f16(const uint16_t *x, size_t n, float *out)
{
    for (size_t i = 0; i < n; i++) {
        out[i] = v4_f32_of_f16(x[i]);
    }
}

const struct v4_isa v4_isa_portable = {
    .name = "portable",
#define V4_QUANT(NAME, name, number, len, bytes, group, has_min) [number] = dequant_row_##name,
    .dequant_row = {V4_QUANTS(V4_QUANT)},
#undef V4_QUANT
#define V4_QUANT(NAME, name, number, len, bytes, group, has_min) [number] = gemv_##name,
    .gemv = {V4_QUANTS(V4_QUANT)},
#undef V4_QUANT
#define V4_QUANT(NAME, name, number, len, bytes, group, has_min) [number] = panel_##name,
    .panel = {V4_BLOCKS(V4_QUANT)},
#undef V4_QUANT
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
