/* Which instruction sets there are, and the table of one of them. */
#include <string.h>

#include "../include/v4.h"

#if defined(__x86_64__)
#include <cpuid.h>
#define V4_HAS(feature) (__builtin_cpu_supports(feature) != 0)

/* Compilers differ in whether __builtin_cpu_supports knows this one. Leaf 1, ECX bit 29. */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

/* Leaf 7, subleaf 1, EAX bit 4. What it works on is that of AVX2, which is asked for beside it. */
static int has_avx_vnni(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#define V4_HWCAP(bit) ((getauxval(AT_HWCAP) & (bit)) != 0)
#else
#define V4_HWCAP(bit) 0
#endif

#define V4_ON_ANY(x) x
#if defined(__x86_64__)
#define V4_ON_X86_64(x) x
#else
#define V4_ON_X86_64(x)
#endif
#if defined(__aarch64__)
#define V4_ON_AARCH64(x) x
#else
#define V4_ON_AARCH64(x)
#endif

#define V4_ISA(name, arch, usable, flags) V4_ON_##arch(extern const struct v4_isa v4_isa_##name;)
#include "all.h"
#undef V4_ISA

struct entry {
    const struct v4_isa *isa;
    int (*usable)(void);
};

#define V4_ISA(name, arch, usable, flags)                                                        \
    V4_ON_##arch(static int usable_##name(void) { return usable; })
#include "all.h"
#undef V4_ISA

static const struct entry entries[] = {
#define V4_COMMA ,
#define V4_ISA(name, arch, usable, flags)                                                        \
    V4_ON_##arch({&v4_isa_##name V4_COMMA usable_##name} V4_COMMA)
#include "all.h"
#undef V4_ISA
};

static const size_t n_entries = sizeof entries / sizeof entries[0];

#define V4_QUANT(NAME, name, number, len, bytes, group, has_min)                                 \
    [number] = {#NAME, number, len, bytes, group, has_min},
static const struct v4_quant_info infos[V4_N_QUANTS] = {V4_QUANTS(V4_QUANT)};
#undef V4_QUANT

uint32_t v4_abi_version(void)
{
    return V4_ABI_VERSION;
}

const struct v4_quant_info *v4_quant_describe(uint32_t number)
{
    return number < V4_N_QUANTS && infos[number].name ? &infos[number] : NULL;
}

void v4_dequantize(uint32_t quant, const void *w, size_t n, float *out)
{
    entries[0].isa->dequant_row[quant](w, n, out);
}

const char *v4_isa_name(size_t i)
{
    return i < n_entries ? entries[i].isa->name : NULL;
}

enum v4_status v4_isa_usable(size_t i)
{
    if (i >= n_entries) {
        return V4_UNKNOWN_ISA;
    }
    return entries[i].usable() ? V4_OK : V4_UNUSABLE_ISA;
}

/* Sets each slot of `out` that `from` has. A table holds nothing but pointers and is taken as an
 * array of them, so that a new slot cannot be forgotten here. */
static void inherit(struct v4_isa *out, const struct v4_isa *from)
{
    typedef void (*slot)(void);
    _Static_assert(sizeof(char *) == sizeof(slot) && sizeof *out % sizeof(slot) == 0, "pointers");
    for (size_t at = 0; at < sizeof *out; at += sizeof(slot)) {
        slot own;
        memcpy(&own, (const char *)from + at, sizeof own);
        if (own) {
            memcpy((char *)out + at, &own, sizeof own);
        }
    }
}

enum v4_status v4_isa_open(size_t i, struct v4_isa *out)
{
    const enum v4_status status = v4_isa_usable(i);
    if (status != V4_OK) {
        return status;
    }
    *out = *entries[0].isa;
    for (size_t k = 1; k <= i; k++) {
        inherit(out, entries[k].isa);
    }
    return V4_OK;
}
