/* The instruction sets, worst first. A NULL slot of an entry inherits the one before it.
 *
 * To add one: write <name>.c beside this file, which defines `const struct v4_isa v4_isa_<name>`,
 * and add its entry here. build.rs reads the entries too: each starts on a line of its own, and
 * nothing stands between them.
 *
 *   name    of the file, of its table, and of `--isa`
 *   arch    ANY, X86_64 or AARCH64
 *   usable  whether this processor can run it: an expression of dispatch.c
 *   flags   of the compiler for that file, beside those of all files
 *
 * avx512 is tuned for the first processors that have all of it: of the compiler's own choices
 * some loops of avx512.c lose up to 14 %.
 */
V4_ISA(portable, ANY, 1, "")
V4_ISA(avx2, X86_64, V4_HAS("avx2") && V4_HAS("fma") && V4_HAS("bmi2") && has_f16c(),
       "-mavx2 -mfma -mf16c -mbmi2")
V4_ISA(avxvnni, X86_64,
       V4_HAS("avx2") && V4_HAS("fma") && V4_HAS("bmi2") && has_f16c() && has_avx_vnni(),
       "-mavxvnni -mavx2 -mfma -mf16c -mbmi2")
V4_ISA(avx512, X86_64,
       V4_HAS("avx512f") && V4_HAS("avx512bw") && V4_HAS("avx512vl") && V4_HAS("avx512dq") &&
           V4_HAS("avx512vnni") && V4_HAS("avx2") && V4_HAS("fma") && V4_HAS("bmi2") && has_f16c(),
       "-mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mbmi2 -mtune=icelake-server")
V4_ISA(neon, AARCH64, V4_HWCAP(1UL << 20), "-march=armv8.2-a+dotprod")
