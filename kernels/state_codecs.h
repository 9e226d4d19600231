/* Optimizer states in 16 and 8 bits: float32 -> code with stochastic rounding, code -> float32.
 *
 * Design
 * ------
 * Why stochastic. A moving average moves by (1 - beta) of a difference: with beta2 = 0.999 that is below half a unit
 * of any format with fewer than 10 bits of fraction, so rounding to nearest would stall it. Here x is rounded up with
 * the probability of its distance to the lower neighbour: the expected value of what is stored is x. (Exceptions: the
 * floor of unsigned codes below, and a block that outgrows its scale, in that one step: what tells is the same random
 * bits.)
 *
 * Randomness. No generator is carried along: the number for element e of state k is
 *
 *     r(e, k) = stratum[e % 64] ^ (20 bits of hash(seed, step, e / 64), other ones for every k)
 *
 * (in 8 bits counted from the block's first element, which stands for e / 64)
 *
 * with stratum[j] = the 6 bits of j reversed, times 2^14. Each element's r is uniform and independent from step to step;
 * the 64 elements of a block get 64 different strata of [0, 1) (a digital net under a random digital shift), so
 * their errors cancel better than independent ones would. A hash for 64 elements and one xor an element: a hash
 * per element (7 instructions with two multiplications) made bfloat16 steps 15% slower. Results depend on the seed,
 * the step and the element, never on threads, vector width or tiles.
 *
 * bfloat16. Add 16 random bits, drop 16 bits.
 *
 * 8 bits. Blocks of 64 elements of one tensor with a common scale, an exponent. The code is an integer shift of the
 * float's own bits: exponent and 3 bits of fraction of |x| + delta, counted from delta's. Adding delta makes the
 * steps linear below it, down to 0, without a branch. States with a sign: sign and 7 bits, 16 binades, delta is
 * 2^-15 of the block's top binade. States without: 8 bits, 32 binades, so that the ratio of a first moment to the
 * root of a second keeps its range. Where a second moment rounded to 0 under a first moment that did not, the step
 * would be divided by eps alone; so in a block that is not all 0 their smallest value is 2^-35 of the top, not 0.
 *   Tried: linear int8 (an element 100 times smaller than its neighbours gets steps 100 times too large, rarely);
 * bitsandbytes' dynamic map (a search in a table per element) and FlashOptim's companding (a division, a root) cost
 * more than the rule; a format without scales (6 bits of exponent) is a power of two wrong for losses summed instead
 * of averaged.
 *
 * The scale stays as long as every code fits under it, and is lowered only when the block's largest code has lost its
 * top bit (a factor of 256 or 65,536): so the usual block is encoded in the loop of the rule, without knowing
 * its maximum. Overflow is noticed by or-ing what is encoded; then the block is coded once more, with a new scale.
 * Each block is looked at for lowering every 16th step.
 *
 * Inf and NaN survive: a block that holds any is flagged in its scale and has two codes for them; its finite values
 * keep their precision. Flagged blocks, and the last block of a tensor if it is shorter, are
 * decoded into float32 arrays, updated there and encoded.
 *
 * Layout. Byte 4 * i + j of a full block is element 16 * j + i: 16 little-endian words of four codes, taken apart and
 * put together by shifts of whole vectors (bytes in their natural order cost a third more instructions, for shuffles).
 * A short block is in natural order.
 */
#ifndef FASTOPT_STATE_CODECS_H
#define FASTOPT_STATE_CODECS_H

#include <string.h>

#include "codecs.h"
#include "dither.h"
#include "kernel.h"

/* Beside what formats.h has: */
#define CODE_WORDS 16                                              /* words of four codes in a block */
#define OVERFLOW_BITS (~0u << CODE_SHIFT << 7)                     /* above a code of 7 bits */
#define TOP_BIT ((SIGNED_LARGEST_CODE + 1u) / 2u << CODE_SHIFT)    /* of a code of 7 bits */

/* --- Randomness */

/* The strata of a block's elements. */
#define STRATUM(j) \
    ((((j) & 1u) << 5 | ((j) & 2u) << 3 | ((j) & 4u) << 1 | ((j) & 8u) >> 1 | ((j) & 16u) >> 3 | ((j) & 32u) >> 5))
#define STRATA_4(j, shift) \
    STRATUM(j) << (shift), STRATUM(j + 1u) << (shift), STRATUM(j + 2u) << (shift), STRATUM(j + 3u) << (shift)
#define STRATA_16(j, shift) \
    STRATA_4(j, shift), STRATA_4(j + 4u, shift), STRATA_4(j + 8u, shift), STRATA_4(j + 12u, shift)
#define STRATA_64(shift) STRATA_16(0u, shift), STRATA_16(16u, shift), STRATA_16(32u, shift), STRATA_16(48u, shift)

static const uint32_t STRATA_OF_20_BITS[CODE_BLOCK] = {STRATA_64(RANDOM_BITS - 6)};
static const uint32_t STRATA_OF_16_BITS[CODE_BLOCK] = {STRATA_64(16 - 6)};

/* --- bfloat16 */

static inline uint16_t f32_to_bfloat16_dithered(float x, uint32_t random) {
    uint32_t rounded = (float_bits(x) + random) >> 16;
    return (uint16_t)(x != x ? 0x7fc0u : rounded);
}

/* --- 8 bits: one element */

/* What a block's scale means for its elements. */
typedef struct {
    uint32_t base;   /* bits of delta: its exponent, no fraction */
    uint32_t random; /* the block's random bits, and -base: what is added to the bits of |x| + delta */
    float delta;     /* subtracted from what a code's bits say */
    float floor;     /* states without sign: least |x| + delta */
} block_code;

/* In memory rather than in the text: an operand that is broadcast as it is loaded costs no instruction. */
typedef struct {
    uint32_t sign;
    uint32_t signed_bits; /* of a code in the bits of a float */
    uint32_t unsigned_bits;
    uint32_t magnitude_byte[4];
    uint32_t sign_byte[4];
    uint32_t whole_byte[4];
} code_masks;

static const code_masks MASKS = {
    0x80000000u,
    (uint32_t)SIGNED_LARGEST_CODE << CODE_SHIFT,
    (uint32_t)UNSIGNED_LARGEST_CODE << CODE_SHIFT,
    {0x7fu, 0x7f00u, 0x7f0000u, 0x7f000000u},
    {0x80u, 0x8000u, 0x800000u, 0x80000000u},
    {0xffu, 0xff00u, 0xff0000u, 0xff000000u},
};

static inline block_code signed_code(uint32_t scale, uint32_t random) {
    uint32_t base = (scale - SIGNED_BINADES) << 23;
    block_code code = {base, (0u - base) ^ random, bits_float(base), 0.0f};
    return code;
}

/* delta is 15/16 of the unit, so that code 0 stands for 1/16: small, not 0. In the smallest block that is subnormal,
 * and flushed. */
static inline block_code unsigned_code(uint32_t scale, uint32_t random) {
    uint32_t base = (scale - UNSIGNED_BINADES) << 23;
    block_code code = {base, (0u - base) ^ random, bits_float(base) * 0.9375f, bits_float(base)};
    return code;
}

static inline uint32_t shift_left(uint32_t x, int by) { return by >= 0 ? x << by : x >> -by; }

/* Value of byte j of a word of codes. */
static inline float decode_signed(uint32_t word, int j, const block_code *code, const code_masks *masks) {
    float y = bits_float((shift_left(word, CODE_SHIFT - 8 * j) & masks->signed_bits) + code->base) - code->delta;
    return bits_float(float_bits(y) | (shift_left(word, 24 - 8 * j) & masks->sign));
}

static inline float decode_unsigned(uint32_t word, int j, const block_code *code, const code_masks *masks) {
    return bits_float((shift_left(word, CODE_SHIFT - 8 * j) & masks->unsigned_bits) + code->base) - code->delta;
}

/* Bits of |x| + delta above the base, dithered: the code is from bit 20 on, and fits if nothing is above bit 26. */
static inline uint32_t encode_signed(float x, uint32_t stratum, const block_code *code, const code_masks *masks) {
    float y = bits_float(float_bits(x) & ~masks->sign) + code->delta;
    return float_bits(y) + (stratum ^ code->random);
}

/* The same, up to bit 27. A NaN passes the maximum. */
static inline uint32_t encode_unsigned(float x, uint32_t stratum, const block_code *code) {
    float y = x + code->delta;
    y = code->floor > y ? code->floor : y;
    return float_bits(y) + (stratum ^ code->random);
}

/* The code as byte j of a word. */
static inline uint32_t signed_byte(uint32_t encoded, float x, int j, const code_masks *masks) {
    return (shift_left(encoded, 8 * j - CODE_SHIFT) & masks->magnitude_byte[j]) |
           (shift_left(float_bits(x), 8 * j - 24) & masks->sign_byte[j]);
}

static inline uint32_t unsigned_byte(uint32_t encoded, int j, const code_masks *masks) {
    return shift_left(encoded, 8 * j - CODE_SHIFT) & masks->whole_byte[j];
}

/* --- 8 bits: whole blocks, decoded into float32 arrays and encoded from them. `is_signed` is a constant in each copy
 * of these functions, and every loop does one thing: so they vectorize. */

static inline void take_apart(const uint8_t *codes, ptrdiff_t n, uint32_t *bytes) {
    if (n < CODE_BLOCK) {
        for (ptrdiff_t i = 0; i < n; i++)
            bytes[i] = codes[i];
        return;
    }
    for (int i = 0; i < CODE_WORDS; i++)
        for (int j = 0; j < 4; j++)
            bytes[16 * j + i] = codes[4 * i + j];
}

static inline void put_together(const uint32_t *__restrict bytes, ptrdiff_t n, uint8_t *__restrict codes) {
    if (n < CODE_BLOCK) {
        for (ptrdiff_t i = 0; i < n; i++)
            codes[i] = (uint8_t)bytes[i];
        return;
    }
    uint32_t words_of_block[CODE_WORDS];
    for (int i = 0; i < CODE_WORDS; i++)
        words_of_block[i] = bytes[i] | bytes[16 + i] << 8 | bytes[32 + i] << 16 | bytes[48 + i] << 24;
    memcpy(codes, words_of_block, CODE_BLOCK);
}

static inline void decode_block_of(
    int is_signed, const uint8_t *codes, ptrdiff_t n, uint32_t scale, float *__restrict values
) {
    block_code code = is_signed ? signed_code(scale & 0xffu, 0) : unsigned_code(scale & 0xffu, 0);
    uint32_t special = scale & FLAGGED ? (is_signed ? SIGNED_LARGEST_CODE : UNSIGNED_LARGEST_CODE) - 1u : 256u;
    uint32_t bytes[CODE_BLOCK];
    take_apart(codes, n, bytes);
    for (ptrdiff_t i = 0; i < n; i++) {
        uint32_t magnitude = is_signed ? bytes[i] & 0x7fu : bytes[i];
        float value = is_signed ? decode_signed(bytes[i], 0, &code, &MASKS) : decode_unsigned(bytes[i], 0, &code, &MASKS);
        uint32_t not_finite = magnitude == special ? 0x7f800000u : 0x7fc00000u;
        not_finite |= is_signed ? (bytes[i] & 0x80u) << 24 : 0u;
        values[i] = bits_float(magnitude >= special ? not_finite : float_bits(value));
    }
}

static void decode_block(const uint8_t *codes, ptrdiff_t n, int is_signed, uint32_t scale, float *values) {
    if (is_signed)
        decode_block_of(1, codes, n, scale, values);
    else
        decode_block_of(0, codes, n, scale, values);
}

static inline uint32_t encoded_bits(int is_signed, float x, ptrdiff_t i, const block_code *code) {
    return is_signed ? encode_signed(x, STRATA_OF_20_BITS[i], code, &MASKS)
                     : encode_unsigned(x, STRATA_OF_20_BITS[i], code) >> 1;
}

static inline void encode_block_of(
    int is_signed, const float *__restrict values, ptrdiff_t n, uint32_t random, int lowers, uint16_t *scale,
    uint8_t *__restrict codes
) {
    uint32_t smallest = is_signed ? SIGNED_SMALLEST_SCALE : UNSIGNED_SMALLEST_SCALE;
    uint32_t headroom = is_signed ? SIGNED_HEADROOM : UNSIGNED_HEADROOM;
    uint32_t chosen = *scale & 0xffu;
    uint32_t flagged = *scale & FLAGGED;
    uint32_t any = 0, largest = 0, special = 0;
    uint32_t bytes[CODE_BLOCK];
    block_code code = is_signed ? signed_code(chosen, random) : unsigned_code(chosen, random);
    for (ptrdiff_t i = 0; i < n; i++)
        any |= encoded_bits(is_signed, values[i], i, &code);
    if (!flagged && !(any & OVERFLOW_BITS) && !(lowers && !(any & TOP_BIT) && chosen > smallest)) {
        for (ptrdiff_t i = 0; i < n; i++) {
            uint32_t sign = is_signed ? (float_bits(values[i]) >> 24) & 0x80u : 0u;
            bytes[i] = encoded_bits(is_signed, values[i], i, &code) >> (is_signed ? CODE_SHIFT : CODE_SHIFT - 1) | sign;
        }
        put_together(bytes, n, codes);
        return;
    }
    for (ptrdiff_t i = 0; i < n; i++) {
        uint32_t bits = float_bits(values[i]) & 0x7fffffffu;
        uint32_t counted = bits >= 0x7f800000u || (!is_signed && float_bits(values[i]) >> 31) ? 0u : bits;
        special |= bits >= 0x7f800000u ? 1u : 0u;
        largest = counted > largest ? counted : largest;
    }
    chosen = ((largest + 0x3fffffu) >> 23) + headroom;
    chosen = chosen < smallest ? smallest : chosen > LARGEST_SCALE ? LARGEST_SCALE : chosen;
    code = is_signed ? signed_code(chosen, random) : unsigned_code(chosen, random);
    uint32_t limit = (is_signed ? SIGNED_LARGEST_CODE : UNSIGNED_LARGEST_CODE) - 2u * special;
    for (ptrdiff_t i = 0; i < n; i++) {
        uint32_t bits = float_bits(values[i]);
        uint32_t infinite = (is_signed ? bits & 0x7fffffffu : bits) == 0x7f800000u; /* without a sign, -inf is NaN */
        uint32_t encoded = encoded_bits(is_signed, values[i], i, &code) >> (is_signed ? CODE_SHIFT : CODE_SHIFT - 1);
        uint32_t magnitude = encoded > limit ? limit : encoded;
        magnitude = (bits & 0x7fffffffu) >= 0x7f800000u ? limit + 2u - infinite : magnitude;
        bytes[i] = magnitude | (is_signed ? (bits >> 24) & 0x80u : 0u);
    }
    put_together(bytes, n, codes);
    *scale = (uint16_t)(chosen | special * FLAGGED);
}

/* Encodes a block of up to 64 values. `lowers`: whether this step may lower the scale. */
static void encode_block(
    const float *values, ptrdiff_t n, int is_signed, uint32_t random, int lowers, uint16_t *scale, uint8_t *codes
) {
    if (is_signed)
        encode_block_of(1, values, n, random, lowers, scale, codes);
    else
        encode_block_of(0, values, n, random, lowers, scale, codes);
}

/* Which of 16 blocks in a row, the first of which starts at element `first`, this step looks at for a lower scale. */
static inline ptrdiff_t block_to_lower(const tile_context *context, int64_t first) {
    return (ptrdiff_t)(0u - ((uint32_t)((uint64_t)first / CODE_BLOCK) + context->step)) & (LOWERED_EVERY - 1);
}

#endif
