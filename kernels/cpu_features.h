/* Which of the x86-64 levels this processor and operating system can run. */
#ifndef FASTOPT_CPU_FEATURES_H
#define FASTOPT_CPU_FEATURES_H

/* 1 for baseline, 3 for x86-64-v3 (AVX2), 4 for x86-64-v4 (AVX-512). */
static inline int x86_64_level(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    /* The builtin looks at what the operating system saves, too. lzcnt and movbe have no name there in
     * older compilers; every processor with AVX2 and BMI2 has them. */
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
          __builtin_cpu_supports("bmi2")))
        return 1;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl")))
        return 3;
    return 4;
#else
    return 1;
#endif
}

#endif
