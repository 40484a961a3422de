/* The whole interface between Rust and C.
 *
 * C is leaf code: pure functions over the ranges they are given. No allocation, thread, input or
 * output, global state or exit. Rust checks every length and shape before the call; C does not.
 * All counts are in elements unless the name says bytes. All matrices are row-major. Memory that
 * Rust allocates (activations, outputs, panels) is aligned to V4_ALIGN bytes; weights lie where
 * the file has them, aligned to nothing.
 *
 * Changing this file: run `cargo xtask bindings`, which remakes src/ffi.rs.
 */
#ifndef V4_H
#define V4_H

#include <limits.h>
#include <stddef.h>
#include <stdint.h>

#include "../quant/all.h"

#define V4_ABI_VERSION 1u

/* Bytes: a cache line, and the widest vector register. */
#define V4_ALIGN 64
/* Weights of a quantised row that share a scale of the activations; cols is a multiple of it. */
#define V4_ACT_GROUP 32
/* Weights that share a sum of the activations. */
#define V4_SUM_GROUP 16
/* Tokens `gemv` takes at most: beyond, unpacking a panel costs less than it saves. */
#define V4_GEMV_TOKENS 8
/* Rows of a whole panel. The last one of a matrix may have fewer. */
#define V4_PANEL_ROWS 32
/* Tokens whose keys (or values) of a head lie together: see enum v4_kv. */
#define V4_SLAB 16
/* Codes of keys and values that share a scale. */
#define V4_KV_GROUP 32
/* Tokens whose bytes are summed as integers, at most: 256 x 127 x 32767 fits 31 bits. */
#define V4_KV_TOKENS 256

_Static_assert(CHAR_BIT == 8 && sizeof(float) == 4, "octets and IEEE single precision");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF blocks are read in place and are little-endian"
#endif

/* A weight format; the value is its number in GGUF. */
enum v4_quant {
#define V4_QUANT(NAME, name, number, len, bytes, group, min) V4_##NAME = number,
    V4_QUANTS(V4_QUANT)
#undef V4_QUANT
};

enum v4_status {
    V4_OK = 0,
    V4_UNKNOWN_ISA = 1,    /* no such entry in cpu/all.h for this architecture */
    V4_UNUSABLE_ISA = 2,   /* the entry exists, this processor lacks what it needs */
};

/* The functions of a gated feed-forward: device.rs `Activation`. */
enum v4_activation { V4_SILU = 0, V4_GELU_TANH = 1 };

/* How keys and values are kept: device.rs `KvType`. Those of one head lie in slabs of V4_SLAB
 * tokens, each slab whole, of v4_slab_bytes, and one after another:
 *   F16, BF16  keys [head_dim][V4_SLAB], values [V4_SLAB][head_dim]
 *   Q8_0       int8 codes in pairs that are multiplied together: keys [head_dim / 2][V4_SLAB][2],
 *              values [V4_SLAB / 2][head_dim][2]; then their scales in half precision,
 *              [head_dim / V4_KV_GROUP][V4_SLAB]. head_dim is a multiple of V4_KV_GROUP.
 * Keys are turned so that a vector holds the same columns of sixteen tokens, and no sum of theirs
 * runs across a vector. */
enum v4_kv { V4_KV_F16 = 0, V4_KV_BF16 = 1, V4_KV_Q8_0 = 2 };
#define V4_N_KV 3

/* Bytes of a slab. */
static inline size_t v4_slab_bytes(enum v4_kv kind, size_t head_dim)
{
    const size_t codes = V4_SLAB * head_dim;
    return kind == V4_KV_Q8_0 ? codes + codes / V4_KV_GROUP * 2 : 2 * codes;
}

/* What brings magnitudes up to `max` to fifteen bits, and the scale that undoes it; both are 0
 * where there is nothing to speak of. NaN stays NaN. */
static inline float v4_kv_inverse(float max, float *scale)
{
    const int nothing = max < 1e-30f;
    *scale = nothing ? 0 : max / 32767;
    return nothing ? 0 : 32767 / max;
}

/* What a rotary embedding turns together: device.rs `RopeKind`. */
enum v4_rope { V4_ROPE_ADJACENT = 0, V4_ROPE_HALVES = 1 };

/* A line of quant/all.h. */
struct v4_quant_info {
    const char *name; /* "Q4_0" */
    uint32_t number;
    uint32_t block_len;
    uint32_t block_bytes;
    uint32_t group;
    uint32_t has_min;
};

/* The input of products: n_tokens rows of cols values. `x` is set when the weights are floats; q, d
 * and sum are what `quantize` made of it and are set when they are blocks (group is not 0).
 * x[t][i] is about d[t][i / 32] * q[t][i]; |q| <= 127. */
struct v4_act {
    const float *x;     /* [n_tokens][cols] */
    const int8_t *q;    /* [n_tokens][cols] */
    const float *d;     /* [n_tokens][cols / V4_ACT_GROUP] */
    const int16_t *sum; /* [n_tokens][cols / V4_SUM_GROUP]: sums of q */
    size_t n_tokens;
    size_t cols;
};

/* A row of weights to floats, exactly as the format defines.
 *   w    [cols / block_len] blocks
 *   out  [cols] */
typedef void v4_dequant_row_fn(const void *w, size_t cols, float *out);

/* Products straight from the file's blocks: out[t][r] = sum over i of w[r][i] * x[t][i].
 * n_tokens <= V4_GEMV_TOKENS; the weights are read once for all tokens. A row's result does not
 * depend on the other rows nor on the other tokens.
 *
 * For blocks every entry, here and in gemm_i8, rounds alike, so that all give the same bits: for
 * each scale group of a row in order,
 *     v = dot * scale   [v = fma(-min, sum, v)]   acc = fma(v, d, acc)
 * with dot and sum the exact integers as floats, and fma rounding once. Weights are decode_i8's q,
 * scale and min; d is the scale of the activations that the group falls in.
 *   w    [rows] rows, row_bytes apart
 *   out  [n_tokens][rows], token rows out_stride floats apart */
typedef void v4_gemv_fn(const void *w, size_t row_bytes, size_t rows, const struct v4_act *x,
                        float *out, size_t out_stride);

/* Unpacks rows of blocks to a panel of int8 with a scale (and minimum) a group.
 * The panel's layout is the entry's own: only the same entry's `gemm_i8` reads it.
 *   w      [rows] rows of cols weights, row_bytes apart; rows <= V4_PANEL_ROWS
 *   panel  [panel_bytes(quant, cols)], aligned to V4_ALIGN */
typedef void v4_panel_fn(const void *w, size_t row_bytes, size_t rows, size_t cols, void *panel);

/* scores[i][j] = scale * sum over c of q[i][c] * k[j][c]; q[i] are the query heads that share the
 * KV head, of one row or of several. A sum runs over c in order, so a score does not depend on what
 * else is computed with it.
 *
 * Q8_0 takes what attn_query made of the queries. For each group of columns in order,
 *     sum = fma(dot, scale of k * scale of q, sum)
 * with dot the exact integer as a float.
 *   q       [n_q][head_dim]
 *   k       slabs that hold the keys of n_kv tokens
 *   scores  [n_q][n_kv], rows score_stride floats apart; n_kv up to the next multiple of V4_SLAB is
 *           written, from what is there in the last slab
 *   next    slabs that will be read next, as many: they are brought nearer. NULL for none. */
typedef void v4_attn_scores_fn(const float *q, size_t n_q, const void *k, size_t n_kv,
                               size_t head_dim, float scale, float *scores, size_t score_stride,
                               const void *next);

/* out[i][c] += sum over j of p[i][j] * v[j][c], in the order of j.
 *
 * For Q8_0 n_kv is V4_KV_TOKENS at most. For each group of columns, p times the scales of v is
 * brought to fifteen bits as a query is, and
 *     out = fma(dot, scale, out)
 * with dot the exact integer as a float. A p of 0 changes nothing.
 *   p     [n_q][n_kv], rows p_stride floats apart
 *   v     slabs that hold the values of n_kv tokens
 *   out   [n_q][head_dim]
 *   next  as for scores */
typedef void v4_attn_values_fn(const float *p, size_t n_q, size_t p_stride, const void *v,
                               size_t n_kv, size_t head_dim, float *out, const void *next);

/* An instruction set: what it does well. A NULL slot inherits the entry before it in cpu/all.h;
 * portable has all. v4_isa_open gives tables without NULL, but for the float formats' `panel`. */
struct v4_isa {
    const char *name;

    /* Indexed by enum v4_quant; NULL at numbers the list does not have. */
    v4_dequant_row_fn *dequant_row[V4_N_QUANTS];
    v4_gemv_fn *gemv[V4_N_QUANTS];
    v4_panel_fn *panel[V4_N_QUANTS]; /* blocks only */

    /* An entry that sets any of panel, panel_bytes, gemm_i8 sets all three. */
    size_t (*panel_bytes)(uint32_t quant, size_t cols);

    /* out[t][r] = sum over i of panel[r][i] * x[t][i], for any number of tokens.
     *   panel  made by panel[quant] of `rows` rows of x->cols weights; quant says group and min
     *   out    [x->n_tokens][rows], token rows out_stride floats apart */
    void (*gemm_i8)(uint32_t quant, const void *panel, size_t rows, const struct v4_act *x,
                    float *out, size_t out_stride);

    /* The same for float weights, already converted by dequant_row.
     *   w  [rows][x->cols] */
    void (*gemm_f32)(const float *w, size_t rows, const struct v4_act *x, float *out,
                     size_t out_stride);

    /* A row of activations to int8: in each group d = max|x| / 127 and q = x * (127 / max|x|), to
     * nearest, ties to even. Where 127 / max|x| is beyond a float all q are 0. So they are where an
     * x is NaN or infinite; d is NaN then, and with it the products.
     *   x [cols], q [cols], d [cols / V4_ACT_GROUP], sum [cols / V4_SUM_GROUP] */
    void (*quantize)(const float *x, size_t cols, int8_t *q, float *d, int16_t *sum);

    /* out = x / sqrt(mean(x^2) + eps) * weight, one row; out may be x.
     *   x, weight, out  [n] */
    void (*rms_norm)(const float *x, const float *weight, size_t n, float eps, float *out);

    /* Turns the first 2 * n_pairs values of each head of one position.
     *   x         [n_heads][head_dim]
     *   cos, sin  [n_pairs], the angle of each pair at this position */
    void (*rope)(enum v4_rope kind, float *x, size_t n_heads, size_t head_dim, const float *cos,
                 const float *sin, size_t n_pairs);

    /* Queries for keys in bytes: each group of V4_KV_GROUP columns in fifteen bits with a scale,
     * x about code * scale, to nearest.
     *   q    [n_q][head_dim]
     *   out  [n_q][head_dim]: int16 [head_dim], then float [head_dim / V4_KV_GROUP] from the
     *        middle of the row */
    void (*attn_query)(const float *q, size_t n_q, size_t head_dim, float *out);

    /* Indexed by enum v4_kv. */
    v4_attn_scores_fn *attn_scores[V4_N_KV];
    v4_attn_values_fn *attn_values[V4_N_KV];

    /* x = e^(x - max x) in place, and what a softmax over several tiles needs beside it. A tile of
     * nothing but -infinity becomes zeros, with sum 0 and max -infinity. NaN stays NaN, makes the
     * sum NaN, and is no maximum.
     *   x         [n], n > 0
     *   max, sum  [1] the largest x, the sum of the results */
    void (*softmax_tile)(float *x, size_t n, float *max, float *sum);

    /* x = a * x + b * y: joins two tiles.
     *   x, y  [n] */
    void (*join)(float *x, float a, const float *y, float b, size_t n);

    /* gate = activation(gate) * up.
     *   gate, up  [n] */
    void (*gated)(enum v4_activation kind, float *gate, const float *up, size_t n);

    /* x = cap * tanh(x / cap).
     *   x  [n] */
    void (*soft_cap)(float *x, size_t n, float cap);

    /* x += y.
     *   x, y  [n] */
    void (*add)(float *x, const float *y, size_t n);

    /* Half precision, rounded to nearest even. NaN stays NaN.
     *   x, out  [n] */
    void (*f16_from_f32)(const float *x, size_t n, uint16_t *out);
    void (*f32_from_f16)(const uint16_t *x, size_t n, float *out);
};

/* V4_ABI_VERSION of the compiled C. */
uint32_t v4_abi_version(void);

/* The line of quant/all.h with this number; NULL if there is none. Static memory. */
const struct v4_quant_info *v4_quant_describe(uint32_t number);

/* Weights to floats by the reference, whatever the processor.
 *   w    [n / block_len] blocks of format `quant`, which is in the list
 *   out  [n] */
void v4_dequantize(uint32_t quant, const void *w, size_t n, float *out);

/* The name of entry i of cpu/all.h on this architecture, portable first; NULL after the last. */
const char *v4_isa_name(size_t i);

/* Whether this processor can run entry i: V4_OK, V4_UNUSABLE_ISA or V4_UNKNOWN_ISA. */
enum v4_status v4_isa_usable(size_t i);

/* Entry i with its NULL slots filled by those before it.
 *   out  [1], written only when the answer is V4_OK */
enum v4_status v4_isa_open(size_t i, struct v4_isa *out);

/* For measurements: the sum of x, read as fast as this processor reads.
 *   x  [n], n a multiple of 64 */
uint64_t v4_probe_read(const uint64_t *x, size_t n);

/* What v4_probe_multiply multiplies: int8 into int32, bfloat16 into single precision, single
 * precision. */
enum v4_probe { V4_PROBE_INT8 = 0, V4_PROBE_BF16 = 1, V4_PROBE_F32 = 2 };

/* For measurements: rounds of products and sums in registers, as many at a time as this processor
 * makes. Gives how many it made, a product and a sum counted as two; 0 where the processor has no
 * instruction for them.
 *   sink  [1] read and written, so that none is left out */
uint64_t v4_probe_multiply(enum v4_probe kind, uint64_t rounds, int32_t *sink);

#endif
