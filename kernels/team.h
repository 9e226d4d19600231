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

#endif
