/* OpenMP, where the compiler has it; one thread where it does not. */
#ifndef FASTOPT_TEAM_H
#define FASTOPT_TEAM_H

#ifdef _OPENMP
#include <omp.h>
#define HAVE_OPENMP 1
static inline int team_size(void) { return omp_get_num_threads(); }
#else
#define HAVE_OPENMP 0
static inline int team_size(void) { return 1; }
#endif

#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
#include <pthread.h>
#include <stdlib.h>

/* Stack of OpenMP's threads in bytes, from OMP_STACKSIZE ("512k", "16 M"; kilobytes without a letter); 0: not set. */
static size_t stack_size(void) {
    const char *text = getenv("OMP_STACKSIZE");
    char *end;
    double size = text ? strtod(text, &end) : 0;
    if (!(size > 0)) return 0;
    while (*end == ' ') end++;
    switch (*end) {
    case 'b': case 'B': return (size_t)size;
    case 'm': case 'M': return (size_t)(size * 1048576.0);
    case 'g': case 'G': return (size_t)(size * 1073741824.0);
    default: return (size_t)(size * 1024.0);
    }
}

static void *wait_at(void *gate) {
    pthread_mutex_lock((pthread_mutex_t *)gate);
    pthread_mutex_unlock((pthread_mutex_t *)gate);
    return NULL;
}

#define MOST_THREADS 4096

/* How many threads, at most `team`, the system gives to the calling thread. libgomp ends the process where it cannot
 * start a thread, so a larger team than ever before is tried out first: its threads are started and ended again. */
static int affordable_team(int team) {
    static __thread int proven = 1;  /* OpenMP has a pool for each thread that opens parallel regions */
    static __thread int refused = MOST_THREADS + 1;
    pthread_t *started;
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_attr_t attributes;
    int n = 0, k;
    if (team <= proven) return team;
    if (team >= refused) return proven;
    started = (pthread_t *)malloc(sizeof(pthread_t) * (size_t)team);
    if (started == NULL || pthread_attr_init(&attributes) != 0) {
        free(started);
        return proven;
    }
    if (stack_size()) pthread_attr_setstacksize(&attributes, stack_size());
    pthread_mutex_lock(&gate);
    while (n < team - 1 && pthread_create(&started[n], &attributes, wait_at, &gate) == 0) n++;
    pthread_mutex_unlock(&gate);
    for (k = 0; k < n; k++) pthread_join(started[k], NULL);
    pthread_attr_destroy(&attributes);
    free(started);
    if (n < team - 1) refused = n + 2;
    if (n + 1 > proven) proven = n + 1;
    return n + 1 < team ? n + 1 : team;
}
#else
static inline int affordable_team(int team) { return team; }
#endif

#endif
