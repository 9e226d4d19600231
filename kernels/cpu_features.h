/* Which features this processor and operating system have, by the names that fastopt/_instruction_sets.py uses. */
#ifndef FASTOPT_CPU_FEATURES_H
#define FASTOPT_CPU_FEATURES_H

#include <string.h>

typedef struct {
    const char *name;
    int supported;
} cpu_feature;

#define MAX_CPU_FEATURES 32

#if defined(__x86_64__) && defined(__GNUC__)
/* The builtin looks at what the operating system saves, too. */
#define ASK(feature) {feature, __builtin_cpu_supports(feature) != 0}
static inline int cpu_features(cpu_feature *answers) {
    __builtin_cpu_init();
    const cpu_feature asked[] = {
        ASK("avx2"), ASK("bmi"), ASK("bmi2"), ASK("fma"),
        ASK("avx512f"), ASK("avx512bw"), ASK("avx512cd"), ASK("avx512dq"), ASK("avx512vl"),
    };
    memcpy(answers, asked, sizeof asked);
    return sizeof asked / sizeof *asked;
}
#undef ASK
#else
/* Nothing is asked for here: the baseline runs. */
static inline int cpu_features(cpu_feature *answers) {
    (void)answers;
    return 0;
}
#endif

#endif
