/* Random bits of stochastic rounding: a hash of seed, step and element, made with SplitMix64's finalizer. Why these and
 * how they are used is in state_codecs.h; here is what the engine computes once a step, and kernels once a block.
 */
#ifndef FASTOPT_DITHER_H
#define FASTOPT_DITHER_H

#include "kernel.h"

static inline uint64_t splitmix_finalized(uint64_t x) {
    x = (x ^ (x >> 30)) * SPLITMIX_FACTOR_1;
    x = (x ^ (x >> 27)) * SPLITMIX_FACTOR_2;
    return x ^ (x >> 31);
}

/* What the rounding of one step draws its bits from. */
static inline uint64_t dither_key(uint64_t seed, int64_t step) {
    uint64_t hashed = splitmix_finalized(seed + SPLITMIX_INCREMENT);
    return splitmix_finalized((hashed ^ (uint64_t)step) + SPLITMIX_INCREMENT);
}

/* Random bits for the elements from `first` on, RANDOM_BITS for each of MAX_ROUNDED_STATES states. */
static inline uint64_t dither_bits(const tile_context *context, int64_t first) {
    return splitmix_finalized(context->key + (uint64_t)first * SPLITMIX_INCREMENT);
}

static inline uint32_t dither_of_state(uint64_t bits, int state) {
    return (uint32_t)(bits >> (RANDOM_BITS * state)) & ((1u << RANDOM_BITS) - 1u);
}

#endif
