/* All block formats, and for each its sizes, V4_<NAME>_GROUP and
 *
 *   void v4_<name>_decode_f32(const struct v4_block_<name> *b, float *out);
 *
 * which follows from decode_i8 without loss: a scale has at most 18 significant bits and q at most
 * 7, so scale x q is exact and only the subtraction of a minimum rounds, as it does by
 * definition. */
#ifndef V4_QUANT_BLOCKS_H
#define V4_QUANT_BLOCKS_H

#include "all.h"
#include "floats.h"
#include "iq1_m.h"
#include "iq1_s.h"
#include "iq2_s.h"
#include "iq2_xs.h"
#include "iq2_xxs.h"
#include "iq3_s.h"
#include "iq3_xxs.h"
#include "iq4_nl.h"
#include "iq4_xs.h"
#include "mxfp4.h"
#include "nvfp4.h"
#include "q2_k.h"
#include "q3_k.h"
#include "q4_0.h"
#include "q4_1.h"
#include "q4_k.h"
#include "q5_0.h"
#include "q5_1.h"
#include "q5_k.h"
#include "q6_k.h"
#include "q8_0.h"
#include "tq1_0.h"
#include "tq2_0.h"

/* Weights of the longest block. */
#define V4_MAX_BLOCK_LEN 256

#define V4_QUANT(NAME, name, number, len, bytes, group, min)                                     \
    enum { V4_##NAME##_GROUP = group };                                                          \
    _Static_assert(sizeof(struct v4_block_##name) == (bytes), #NAME " has no padding");          \
    _Static_assert((number) < V4_N_QUANTS && (len) <= V4_MAX_BLOCK_LEN, #NAME " fits its tables");
V4_QUANTS(V4_QUANT)
#undef V4_QUANT

#define V4_QUANT(NAME, name, number, len, bytes, group, has_min)                                 \
    V4_INLINE void v4_##name##_decode_f32(const struct v4_block_##name *b, float *out)           \
    {                                                                                            \
        int8_t q[len];                                                                           \
        float scale[(len) / (group)], min[(len) / (group)];                                      \
        v4_##name##_decode_i8(b, q, scale, min);                                                 \
        for (int i = 0; i < (len); i++) {                                                        \
            out[i] = scale[i / (group)] * (float)q[i];                                           \
            if (has_min) {                                                                       \
                out[i] -= min[i / (group)];                                                      \
            }                                                                                    \
        }                                                                                        \
    }
V4_BLOCKS(V4_QUANT)
#undef V4_QUANT

#endif
