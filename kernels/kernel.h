/* What a compiled kernel is, and the scalar float32 operations that rules are made of.
 *
 * Included by the engine and by every kernel module. No loops here, and nothing that needs more than the
 * baseline instruction set: the engine is compiled for that.
 */
#ifndef FASTOPT_KERNEL_H
#define FASTOPT_KERNEL_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "formats.h"

/* Bounds of one kernel's numbers, beside those in formats.h. */
#define MAX_HYPERS 32
#define MAX_RUNNING 4

/* Elements of one call of a kernel at most. */
#define TILE_ELEMENTS 1024

/* What a tile has to know of its step: where the rounding of low-precision states takes its random bits from
 * (state_codecs.h), and how far ahead streams are fetched (prefetch.h). */
typedef struct {
    uint64_t key;  /* hash of seed and step */
    int64_t index; /* of a segment's first element among all of the optimizer's */
    uint32_t step;
    int32_t distance; /* elements */
} tile_context;

/* Updates `n` parameters at `p`, whose gradients are at `g`, and elements [start, start + n) of the states, which are
 * float32, bfloat16 or codes with `scales`. A kernel that gives its update writes it into the float32 stream behind
 * the states. */
typedef void (*tile_function)(
    float *p, const float *g, void *const *states, uint16_t *const *scales, ptrdiff_t start, ptrdiff_t n,
    const float *scalars, const tile_context *context
);

/* Computes the scalars of step number `step` (1 is the first) and advances the running ones. */
typedef void (*scalars_function)(const double *hyper, double step, double *running, float *scalars);

/* Trust ratio of one tensor, from the norm of its parameters and that of its update or gradient. */
typedef double (*trust_function)(const double *hyper, double p_norm, double other_norm);

typedef struct {
    tile_function tile[N_STATE_DTYPES]; /* in the order of the enum in formats.h */
    scalars_function scalars;
    trust_function trust; /* NULL: none */
    int n_scalars;
} kernel;

/* The stages that surround a rule, one tile at a time. Gradients and copies in low precision are uint16. */
typedef struct {
    void (*decode_bfloat16)(const unsigned short *from, float *to, ptrdiff_t n);
    void (*decode_float16)(const unsigned short *from, float *to, ptrdiff_t n);
    void (*encode_bfloat16)(const float *from, unsigned short *to, ptrdiff_t n);
    void (*encode_float16)(const float *from, unsigned short *to, ptrdiff_t n);
    /* a float32 in two halves: bfloat16, rounded, and the 16 bits that it lacks */
    void (*join)(const unsigned short *high, const unsigned short *low, float *to, ptrdiff_t n);
    void (*split)(const float *from, unsigned short *high, unsigned short *low, ptrdiff_t n);
    /* `scale` and `clamp` of the gradient stage (fastopt/rules/gradient_stage.py); from may be to */
    void (*clip)(
        const float *from, float *to, ptrdiff_t n, float grad_scale, float clip_coefficient, float clip_value
    );
    /* p = p - size * update */
    void (*apply)(float *p, const float *update, ptrdiff_t n, float size);
    /* ema = decay * ema + weight * p */
    void (*average)(const float *p, float *ema, ptrdiff_t n, float decay, float weight);
    /* sums = sums + x */
    void (*accumulate)(const float *x, float *sums, ptrdiff_t n);
    /* sums[(lane + i) % LANES] += (scale * x[i])^2 in float64, for i in order */
    void (*sum_squares)(const float *x, ptrdiff_t n, float scale, ptrdiff_t lane, double *sums);
} tile_stages;

#if defined(__GNUC__)
#define ALIGNED_64 __attribute__((aligned(64)))
#else
#define ALIGNED_64
#endif

/* A pointer that no other pointer of the loop aliases: the engine refuses overlapping arrays. */
typedef float *__restrict stream;
typedef unsigned short *__restrict halves;
typedef uint32_t *__restrict words;

/* NaN must come out of these as NaN, and sign(-0) is +0, as in NumPy. Written so that GCC makes selections
 * of them and no branches, alone and inside one another (`tests/codegen/test_vectorized.py`). */
static inline float sqrt_f32(float x) { return sqrtf(x); }
static inline float fabs_f32(float x) { return fabsf(x); }
static inline float copysign_f32(float x, float y) { return copysignf(x, y); }
static inline float select_f32(int condition, float x, float y) { return condition ? x : y; }
static inline float sign_f32(float x) { return select_f32(x != x, x, (float)((x > 0.0f) - (x < 0.0f))); }
static inline float maximum_f32(float x, float y) {
    float result = x < y ? y : x;
    return y != y ? y : result;
}
static inline float minimum_f32(float x, float y) {
    float result = x > y ? y : x;
    return y != y ? y : result;
}

#endif
