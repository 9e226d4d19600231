/* Steps and software prefetch of the loops. */
#ifndef FASTOPT_PREFETCH_H
#define FASTOPT_PREFETCH_H

#include <stddef.h>

/* Elements of a kernel's loop: a constant trip count, and one cache line of each stream. A core has some 16 lines under
 * way at once, so fetches are spread evenly: four lines of each stream every 64 elements took 5% longer at 5e7
 * parameters and at 1e7. */
#define LINE 16
/* Elements between what is computed and what is fetched, where arrays come from memory, and where they are in a cache:
 * there a far fetch loses 8% at 1e5 parameters, much of it on the other thread's share. 384 was as good as 512 for
 * four streams, but cost three streams a quarter at 5e7. */
#define FAR_DISTANCE 512
#define NEAR_DISTANCE 64
/* Elements of a step from which arrays are taken to come from memory. */
#define FAR_FROM (1 << 20)

/* Elements of a stage's loop. */
#define STAGE_BLOCK 64
/* How far ahead a stage fetches. */
#define STAGE_DISTANCE 128

#if defined(__GNUC__)
#define FETCH(address, writes) __builtin_prefetch(address, writes, 3)
#else
#define FETCH(address, writes) ((void)(address))
#endif

static inline void prefetch_line(const float *line, ptrdiff_t distance) { FETCH(line + distance, 0); }

static inline void prefetch_block(const float *block, ptrdiff_t distance) {
    for (int line = 0; line < STAGE_BLOCK; line += 16)
        FETCH(block + distance + line, 0);
}

static inline void prefetch_bfloat16(const unsigned short *block, ptrdiff_t distance) {
    FETCH(block + distance, 0);
    FETCH(block + distance + 32, 0);
}

static inline void prefetch_codes(const unsigned char *block, ptrdiff_t distance) { FETCH(block + distance, 0); }

/* A stream of two bytes an element that is only written. */
static inline void prefetch_halves(const unsigned short *block) {
    FETCH(block + STAGE_DISTANCE, 1);
    FETCH(block + STAGE_DISTANCE + 32, 1);
}

/* One stream alone, read 32 elements at a time by a reduction: eight times as far ahead. */
static inline void prefetch_lane_group(const float *group) {
    FETCH(group + 8 * STAGE_DISTANCE, 0);
    FETCH(group + 8 * STAGE_DISTANCE + 16, 0);
}

#endif
