/* AArch64 with the dot product instructions (ARMv8.2 and later).
 *
 * Products of blocks are held to the rounding that v4.h lays down, so their bits are those of
 * portable.c. Blocks are unpacked by decode_i8, which the compiler vectorises. What is not here is
 * inherited. `cargo xtask ci` tests it under qemu-user; its speed on a real machine was never
 * measured. */
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "../include/v4.h"
#include "../quant/blocks.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))
/* For loops over registers. */
#define UNROLL _Pragma("GCC unroll 16")

enum { LANES = 4, QUAD = 4, TILE_TOKENS = 4 };

/* Groups of 16, and minima, by quant/all.h. All of it is constant where it is used. */
struct format {
    void (*decode)(const void *block, int8_t *q, float *scale, float *min);
    int len, bytes, pairs, mins;
};

/* Adds a group's part of four rows' products, rounded as v4.h says.
 *   dot, scale, min, sum  one, or a pair */
ALWAYS_INLINE float32x4_t add_scaled(float32x4_t acc, const int32x4_t *dot,
                                     const float32x4_t *scale, const float32x4_t *min,
                                     const int16_t *sum, float d, int pairs, int mins)
{
    UNROLL
    for (int p = 0; p <= pairs; p++) {
        float32x4_t v = vmulq_f32(vcvtq_f32_s32(dot[p]), scale[p]);
        if (mins) {
            const float total = (float)(pairs ? sum[p] : sum[0] + sum[1]);
            v = vfmsq_f32(v, min[p], vdupq_n_f32(total));
        }
        acc = vfmaq_f32(acc, v, vdupq_n_f32(d));
    }
    return acc;
}

/* ---- products straight from blocks ----------------------------------------------------------- */

/* A block of each of four rows. */
struct quad {
    int8_t q[QUAD][V4_MAX_BLOCK_LEN];
    float scale[QUAD][V4_MAX_BLOCK_LEN / V4_SUM_GROUP], min[QUAD][V4_MAX_BLOCK_LEN / V4_SUM_GROUP];
};

/* One number of each of four rows. */
ALWAYS_INLINE float32x4_t of_rows(float v[QUAD][V4_MAX_BLOCK_LEN / V4_SUM_GROUP], int i)
{
    const float rows[QUAD] = {v[0][i], v[1][i], v[2][i], v[3][i]};
    return vld1q_f32(rows);
}

ALWAYS_INLINE int32x4_t sum_rows(const int32x4_t v[QUAD])
{
    return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
}

/* Group `k` of the blocks, group g of the rows, with n tokens. */
ALWAYS_INLINE void gemv_group(struct quad *b, int k, const struct v4_act *x, size_t first, int n,
                              size_t g, struct format f, float32x4_t *acc)
{
    const int32x4_t zero = vdupq_n_s32(0);
    float32x4_t scale[2], min[2];
    UNROLL
    for (int p = 0; p <= f.pairs; p++) {
        scale[p] = of_rows(b->scale, (1 + f.pairs) * k + p);
        min[p] = f.mins ? of_rows(b->min, (1 + f.pairs) * k + p) : scale[p];
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        const size_t at = (first + (size_t)t) * (x->cols / V4_ACT_GROUP) + g;
        const int8x16_t lo = vld1q_s8(x->q + at * V4_ACT_GROUP);
        const int8x16_t hi = vld1q_s8(x->q + at * V4_ACT_GROUP + 16);
        int32x4_t dot[2][QUAD];
        UNROLL
        for (int r = 0; r < QUAD; r++) {
            const int8_t *w = b->q[r] + V4_ACT_GROUP * k;
            dot[0][r] = vdotq_s32(zero, vld1q_s8(w), lo);
            dot[1][r] = vdotq_s32(f.pairs ? zero : dot[0][r], vld1q_s8(w + 16), hi);
        }
        const int32x4_t dots[2] = {sum_rows(dot[1 - f.pairs]), sum_rows(dot[1])};
        acc[t] = add_scaled(acc[t], dots, scale, min, x->sum + 2 * at, x->d[at], f.pairs, f.mins);
    }
}

/* Four rows with n tokens. */
ALWAYS_INLINE void gemv_tile(const uint8_t *const rows[QUAD], size_t left, const struct v4_act *x,
                             size_t first, int n, struct format f, float *out, size_t out_stride)
{
    struct quad b;
    float32x4_t acc[TILE_TOKENS];
    UNROLL
    for (int t = 0; t < n; t++) {
        acc[t] = vdupq_n_f32(0);
    }
    const int groups = f.len / V4_ACT_GROUP;
    for (size_t block = 0; block < x->cols / (size_t)f.len; block++) {
        for (int r = 0; r < QUAD; r++) {
            f.decode(rows[r] + block * (size_t)f.bytes, b.q[r], b.scale[r], b.min[r]);
        }
        for (int k = 0; k < groups; k++) {
            gemv_group(&b, k, x, first, n, block * (size_t)groups + (size_t)k, f, acc);
        }
    }
    for (int t = 0; t < n; t++) {
        float four[QUAD];
        vst1q_f32(four, acc[t]);
        memcpy(out + (first + (size_t)t) * out_stride, four, (left < QUAD ? left : QUAD) * 4);
    }
}

ALWAYS_INLINE void gemv_blocks(const void *w, size_t row_bytes, size_t n_rows,
                               const struct v4_act *x, float *out, size_t out_stride,
                               struct format f)
{
    for (size_t r = 0; r < n_rows; r += QUAD) {
        const size_t left = n_rows - r;
        const uint8_t *rows[QUAD];
        for (size_t i = 0; i < QUAD; i++) {
            /* Rows beyond the last are read as the last and not written. */
            rows[i] = (const uint8_t *)w + (r + (i < left ? i : left - 1)) * row_bytes;
        }
        size_t t = 0;
        for (; t + TILE_TOKENS <= x->n_tokens; t += TILE_TOKENS) {
            gemv_tile(rows, left, x, t, TILE_TOKENS, f, out + r, out_stride);
        }
        for (; t < x->n_tokens; t++) {
            gemv_tile(rows, left, x, t, 1, f, out + r, out_stride);
        }
    }
}

/* ---- panels ---------------------------------------------------------------------------------- */

/* A panel is 32 rows, a group of 32 weights after another: for each four rows eight times (for four
 * weights each) the rows' four bytes, then scales, then minima, each [pair][32 rows]. */
enum { QUAD_BYTES = QUAD * V4_ACT_GROUP };

ALWAYS_INLINE size_t panel_group_bytes(int pairs, int mins)
{
    return V4_PANEL_ROWS * (V4_ACT_GROUP + sizeof(float) * (size_t)((1 + pairs) * (1 + mins)));
}

ALWAYS_INLINE void panel_blocks(const void *w, size_t row_bytes, size_t n_rows, size_t cols,
                                void *panel, struct format f)
{
    int8_t q[V4_MAX_BLOCK_LEN];
    float scale[V4_MAX_BLOCK_LEN / V4_SUM_GROUP], min[V4_MAX_BLOCK_LEN / V4_SUM_GROUP];
    const size_t bytes = panel_group_bytes(f.pairs, f.mins);
    for (size_t r = 0; r < V4_PANEL_ROWS; r++) {
        /* Rows beyond the last repeat it; gemm_i8 does not write what they give. */
        const uint8_t *row = (const uint8_t *)w + (r < n_rows ? r : n_rows - 1) * row_bytes;
        uint8_t *to = panel;
        for (size_t i = 0; i < cols; i += (size_t)f.len, row += f.bytes) {
            f.decode(row, q, scale, min);
            for (int k = 0; k < f.len / V4_ACT_GROUP; k++, to += bytes) {
                uint8_t *codes = to + r / QUAD * QUAD_BYTES + r % QUAD * 4;
                for (int j = 0; j < V4_ACT_GROUP / 4; j++) {
                    memcpy(codes + 4 * QUAD * j, q + V4_ACT_GROUP * k + 4 * j, 4);
                }
                float *scales = (float *)(void *)(to + V4_PANEL_ROWS * V4_ACT_GROUP) + r;
                float *mins = scales + (1 + f.pairs) * V4_PANEL_ROWS;
                for (int p = 0; p <= f.pairs; p++) {
                    scales[p * V4_PANEL_ROWS] = scale[(1 + f.pairs) * k + p];
                    if (f.mins) {
                        mins[p * V4_PANEL_ROWS] = min[(1 + f.pairs) * k + p];
                    }
                }
            }
        }
    }
}

/* Sixteen weights of four rows with sixteen activations. */
ALWAYS_INLINE int32x4_t dot_half(int32x4_t dot, const int8_t *codes, int8x16_t a)
{
    dot = vdotq_laneq_s32(dot, vld1q_s8(codes), a, 0);
    dot = vdotq_laneq_s32(dot, vld1q_s8(codes + 16), a, 1);
    dot = vdotq_laneq_s32(dot, vld1q_s8(codes + 32), a, 2);
    return vdotq_laneq_s32(dot, vld1q_s8(codes + 48), a, 3);
}

/* Four rows of a group with n tokens. `group` begins the group, `quad` says which rows. */
ALWAYS_INLINE void quad_group(const uint8_t *group, size_t quad, const struct v4_act *x,
                              size_t first, int n, size_t g, int pairs, int mins, float32x4_t *acc)
{
    const int8_t *codes = (const int8_t *)group + quad * QUAD_BYTES;
    const float *scale = (const float *)(const void *)(group + V4_PANEL_ROWS * V4_ACT_GROUP) +
                         quad * QUAD;
    const float *min = scale + (1 + pairs) * V4_PANEL_ROWS;
    float32x4_t scale4[2], min4[2];
    UNROLL
    for (int p = 0; p <= pairs; p++) {
        scale4[p] = vld1q_f32(scale + p * V4_PANEL_ROWS);
        min4[p] = mins ? vld1q_f32(min + p * V4_PANEL_ROWS) : scale4[p];
    }
    UNROLL
    for (int t = 0; t < n; t++) {
        const size_t at = (first + (size_t)t) * (x->cols / V4_ACT_GROUP) + g;
        int32x4_t dot[2];
        dot[0] = dot_half(vdupq_n_s32(0), codes, vld1q_s8(x->q + at * V4_ACT_GROUP));
        dot[1] = dot_half(pairs ? vdupq_n_s32(0) : dot[0], codes + QUAD_BYTES / 2,
                          vld1q_s8(x->q + at * V4_ACT_GROUP + 16));
        const int32x4_t dots[2] = {dot[1 - pairs], dot[1]};
        acc[t] = add_scaled(acc[t], dots, scale4, min4, x->sum + 2 * at, x->d[at], pairs, mins);
    }
}

/* Four rows with n tokens. */
ALWAYS_INLINE void quad_tile(const uint8_t *panel, size_t quad, size_t rows, const struct v4_act *x,
                             size_t first, int n, int pairs, int mins, float *out,
                             size_t out_stride)
{
    const size_t bytes = panel_group_bytes(pairs, mins);
    float32x4_t acc[TILE_TOKENS];
    UNROLL
    for (int t = 0; t < n; t++) {
        acc[t] = vdupq_n_f32(0);
    }
    for (size_t g = 0; g < x->cols / V4_ACT_GROUP; g++) {
        quad_group(panel + g * bytes, quad, x, first, n, g, pairs, mins, acc);
    }
    const size_t left = rows - quad * QUAD;
    for (int t = 0; t < n; t++) {
        float four[QUAD];
        vst1q_f32(four, acc[t]);
        memcpy(out + (first + (size_t)t) * out_stride + quad * QUAD, four,
               (left < QUAD ? left : QUAD) * sizeof *four);
    }
}

#define GEMM(name, pairs, mins)                                                                   \
    static void gemm_##name(const void *panel, size_t rows, const struct v4_act *x, float *out,   \
                            size_t out_stride)                                                    \
    {                                                                                             \
        for (size_t quad = 0; quad * QUAD < rows; quad++) {                                       \
            size_t t = 0;                                                                         \
            for (; t + TILE_TOKENS <= x->n_tokens; t += TILE_TOKENS) {                            \
                quad_tile(panel, quad, rows, x, t, TILE_TOKENS, pairs, mins, out, out_stride);    \
            }                                                                                     \
            for (; t < x->n_tokens; t++) {                                                        \
                quad_tile(panel, quad, rows, x, t, 1, pairs, mins, out, out_stride);              \
            }                                                                                     \
        }                                                                                         \
    }
GEMM(plain, 0, 0)
GEMM(mins, 0, 1)
GEMM(pairs, 1, 0)
GEMM(pairs_mins, 1, 1)

static size_t panel_bytes(uint32_t quant, size_t cols)
{
    const struct v4_quant_info *info = v4_quant_describe(quant);
    return cols / V4_ACT_GROUP * panel_group_bytes(info->group == 16, (int)info->has_min);
}

static void gemm_i8(uint32_t quant, const void *panel, size_t rows, const struct v4_act *x,
                    float *out, size_t out_stride)
{
    const struct v4_quant_info *info = v4_quant_describe(quant);
    if (info->group == 16) {
        (info->has_min ? gemm_pairs_mins : gemm_pairs)(panel, rows, x, out, out_stride);
    } else {
        (info->has_min ? gemm_mins : gemm_plain)(panel, rows, x, out, out_stride);
    }
}

/* Long decodes are called, and so compiled once. */
#define V4_QUANT(NAME, name, number, len, bytes, group, has_min)                                  \
    static __attribute__((noinline)) void decode_##name(const void *block, int8_t *q,             \
                                                        float *scale, float *min)                 \
    {                                                                                             \
        v4_##name##_decode_i8(block, q, scale, min);                                              \
    }                                                                                             \
    static const struct format format_##name = {decode_##name, len, bytes, (group) == 16,         \
                                                has_min};                                         \
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
V4_BLOCKS(V4_QUANT)
#undef V4_QUANT

/* ---- float weights --------------------------------------------------------------------------- */

ALWAYS_INLINE float32x4_t load_f32(const void *w, size_t i, size_t n)
{
    if (n >= LANES) {
        return vld1q_f32((const float *)w + i);
    }
    float part[LANES] = {0};
    memcpy(part, (const float *)w + i, n * sizeof *part);
    return vld1q_f32(part);
}

ALWAYS_INLINE uint16x4_t load_16(const void *w, size_t i, size_t n)
{
    if (n >= LANES) {
        return vld1_u16((const uint16_t *)w + i);
    }
    uint16_t part[LANES] = {0};
    memcpy(part, (const uint16_t *)w + i, n * sizeof *part);
    return vld1_u16(part);
}

ALWAYS_INLINE float32x4_t load_f16(const void *w, size_t i, size_t n)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(load_16(w, i, n)));
}

ALWAYS_INLINE float32x4_t load_bf16(const void *w, size_t i, size_t n)
{
    return vreinterpretq_f32_u32(vshll_n_u16(load_16(w, i, n), 16));
}

/* As v4_f32_of_e4m3, four at a time. */
ALWAYS_INLINE float32x4_t load_f8_e4m3(const void *w, size_t i, size_t n)
{
    uint32_t part = 0;
    memcpy(&part, (const uint8_t *)w + i, n < LANES ? n : LANES);
    const uint8x8_t codes = vcreate_u8(part);
    const uint16x4_t shifted = vget_low_u16(vshll_n_u8(codes, 7));
    const uint16x4_t largest = vdup_n_u16(0x3f80);
    const uint16x4_t is_nan = vceq_u16(vand_u16(shifted, largest), largest);
    const uint16x4_t halves = vadd_u16(shifted, vand_u16(shifted, vdup_n_u16(0x4000)));
    const uint16x4_t nan = vand_u16(is_nan, vdup_n_u16(0x7e00));
    return vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vorr_u16(halves, nan))), 0x1p8f);
}

ALWAYS_INLINE void store_f32(float *out, float32x4_t v, size_t n)
{
    if (n >= LANES) {
        vst1q_f32(out, v);
        return;
    }
    float part[LANES];
    vst1q_f32(part, v);
    memcpy(out, part, n * sizeof *part);
}

typedef float32x4_t load_floats_fn(const void *w, size_t i, size_t n);

/* Four rows with n tokens: four sums a pair, each over every fourth column, added up last. So
 * whatever the tile, a pair's sum is the same. */
ALWAYS_INLINE void float_tile(load_floats_fn *load, const char *w, size_t row_bytes, size_t n_rows,
                              const struct v4_act *x, size_t first, int n, float *out,
                              size_t out_stride)
{
    const char *rows[QUAD];
    float32x4_t acc[QUAD][TILE_TOKENS];
    UNROLL
    for (size_t r = 0; r < QUAD; r++) {
        rows[r] = w + (r < n_rows ? r : n_rows - 1) * row_bytes;
        UNROLL
        for (int t = 0; t < n; t++) {
            acc[r][t] = vdupq_n_f32(0);
        }
    }
    for (size_t i = 0; i < x->cols; i += LANES) {
        const size_t left = x->cols - i;
        float32x4_t a[TILE_TOKENS];
        UNROLL
        for (int t = 0; t < n; t++) {
            a[t] = load_f32(x->x + (first + (size_t)t) * x->cols, i, left);
        }
        UNROLL
        for (int r = 0; r < QUAD; r++) {
            const float32x4_t weights = load(rows[r], i, left);
            UNROLL
            for (int t = 0; t < n; t++) {
                acc[r][t] = vfmaq_f32(acc[r][t], weights, a[t]);
            }
        }
    }
    for (size_t r = 0; r < QUAD && r < n_rows; r++) {
        for (int t = 0; t < n; t++) {
            out[(first + (size_t)t) * out_stride + r] = vaddvq_f32(acc[r][t]);
        }
    }
}

ALWAYS_INLINE void float_product(load_floats_fn *load, const void *w, size_t row_bytes, size_t rows,
                                 const struct v4_act *x, float *out, size_t out_stride)
{
    for (size_t r = 0; r < rows; r += QUAD) {
        const char *from = (const char *)w + r * row_bytes;
        size_t t = 0;
        for (; t + TILE_TOKENS <= x->n_tokens; t += TILE_TOKENS) {
            float_tile(load, from, row_bytes, rows - r, x, t, TILE_TOKENS, out + r, out_stride);
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

static void gemm_f32(const float *w, size_t rows, const struct v4_act *x, float *out,
                     size_t out_stride)
{
    float_product(load_f32, w, x->cols * sizeof *w, rows, x, out, out_stride);
}

/* ---- activations and attention --------------------------------------------------------------- */

static void quantize(const float *x, size_t cols, int8_t *q, float *d, int16_t *sum)
{
    for (size_t g = 0; g < cols / V4_ACT_GROUP; g++) {
        float32x4_t v[8];
        int32x4_t largest = vdupq_n_s32(0);
        for (size_t i = 0; i < 8; i++) {
            v[i] = vld1q_f32(x + g * V4_ACT_GROUP + i * LANES);
            largest = vmaxq_s32(largest, vreinterpretq_s32_f32(vabsq_f32(v[i])));
        }
        const float inverse = v4_act_scale(vmaxvq_s32(largest), d + g);
        if (inverse == 0) {
            memset(q + g * V4_ACT_GROUP, 0, V4_ACT_GROUP);
            sum[2 * g] = sum[2 * g + 1] = 0;
            continue;
        }
        for (size_t half = 0; half < 2; half++) {
            int16x4_t part[4];
            for (size_t i = 0; i < 4; i++) {
                part[i] = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(v[4 * half + i], inverse)));
            }
            const int16x8_t lo = vcombine_s16(part[0], part[1]);
            const int16x8_t hi = vcombine_s16(part[2], part[3]);
            int8_t *to = q + g * V4_ACT_GROUP + 16 * half;
            vst1q_s8(to, vcombine_s8(vqmovn_s16(lo), vqmovn_s16(hi)));
            sum[2 * g + half] = vaddvq_s16(vaddq_s16(lo, hi));
        }
    }
}

/* Four numbers at `at`, of which n are read. */
ALWAYS_INLINE float32x4_t kv_load(enum v4_kv kind, const char *slab, size_t at, size_t n)
{
    return kind == V4_KV_F16 ? load_f16(slab, at, n) : load_bf16(slab, at, n);
}

enum { SLAB_VECTORS = V4_SLAB / LANES };

/* One slab's keys times n_q queries, four vectors of tokens a query. */
ALWAYS_INLINE void score_slab(enum v4_kv kind, const float *q, int n_q, const char *slab,
                              size_t head_dim, float factor, float *scores, size_t stride)
{
    float32x4_t acc[QUAD][SLAB_VECTORS], keys[SLAB_VECTORS];
    UNROLL
    for (int v = 0; v < SLAB_VECTORS; v++) {
        UNROLL
        for (int i = 0; i < n_q; i++) {
            acc[i][v] = vdupq_n_f32(0);
        }
    }
    for (size_t c = 0; c < head_dim; c++) {
        UNROLL
        for (size_t v = 0; v < SLAB_VECTORS; v++) {
            keys[v] = kv_load(kind, slab, c * V4_SLAB + v * LANES, LANES);
        }
        UNROLL
        for (int i = 0; i < n_q; i++) {
            const float value = q[(size_t)i * head_dim + c];
            UNROLL
            for (int v = 0; v < SLAB_VECTORS; v++) {
                acc[i][v] = vfmaq_n_f32(acc[i][v], keys[v], value);
            }
        }
    }
    UNROLL
    for (int i = 0; i < n_q; i++) {
        UNROLL
        for (int v = 0; v < SLAB_VECTORS; v++) {
            vst1q_f32(scores + (size_t)i * stride + (size_t)v * LANES,
                      vmulq_n_f32(acc[i][v], factor));
        }
    }
}

ALWAYS_INLINE void scores_of(enum v4_kv kind, const float *q, size_t n_q, const void *k,
                             size_t n_kv, size_t head_dim, float scale, float *scores,
                             size_t stride)
{
    const char *slab = k;
    for (size_t j = 0; j < n_kv; j += V4_SLAB, slab += v4_slab_bytes(kind, head_dim)) {
        size_t i = 0;
        for (; i + QUAD <= n_q; i += QUAD) {
            score_slab(kind, q + i * head_dim, QUAD, slab, head_dim, scale,
                       scores + i * stride + j, stride);
        }
        for (; i < n_q; i++) {
            score_slab(kind, q + i * head_dim, 1, slab, head_dim, scale, scores + i * stride + j,
                       stride);
        }
    }
}

/* Four columns of the values for n queries, or what there is of them. */
ALWAYS_INLINE void value_tile(enum v4_kv kind, const float *p, int n, size_t p_stride,
                              const char *v, size_t n_kv, size_t head_dim, size_t c, float *out)
{
    const size_t width = head_dim - c;
    float32x4_t acc[QUAD];
    UNROLL
    for (int i = 0; i < n; i++) {
        acc[i] = load_f32(out + (size_t)i * head_dim, 0, width);
    }
    for (size_t j = 0; j < n_kv; j++) {
        const char *slab = v + j / V4_SLAB * v4_slab_bytes(kind, head_dim);
        const size_t token = j % V4_SLAB;
        const float32x4_t value = kv_load(kind, slab, token * head_dim + c, width);
        UNROLL
        for (int i = 0; i < n; i++) {
            acc[i] = vfmaq_n_f32(acc[i], value, p[(size_t)i * p_stride + j]);
        }
    }
    UNROLL
    for (int i = 0; i < n; i++) {
        store_f32(out + (size_t)i * head_dim, acc[i], width);
    }
}

ALWAYS_INLINE void values_of(enum v4_kv kind, const float *p, size_t n_q, size_t p_stride,
                             const void *v, size_t n_kv, size_t head_dim, float *out)
{
    for (size_t c = 0; c < head_dim; c += LANES) {
        size_t i = 0;
        for (; i + QUAD <= n_q; i += QUAD) {
            value_tile(kind, p + i * p_stride, QUAD, p_stride, v, n_kv, head_dim, c,
                       out + i * head_dim + c);
        }
        for (; i < n_q; i++) {
            value_tile(kind, p + i * p_stride, 1, p_stride, v, n_kv, head_dim, c,
                       out + i * head_dim + c);
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

const struct v4_isa v4_isa_neon = {
    .name = "neon",
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
    .attn_scores = {attn_scores_f16, attn_scores_bf16},
    .attn_values = {attn_values_f16, attn_values_bf16},
};
