/* float32 <-> bfloat16, float16 and pairs of halves, one element, in integer arithmetic that vectorizes.
 *
 * Encoding rounds to nearest, ties to even; overflow becomes infinity, NaN stays NaN. Exact for every input,
 * and independent of the flush-to-zero mode that kernels run under.
 */
#ifndef FASTOPT_CODECS_H
#define FASTOPT_CODECS_H

#include <stdint.h>
#include <string.h>

static inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* bfloat16 is the upper half of float32. */
static inline float bfloat16_to_f32(uint16_t half) { return bits_float((uint32_t)half << 16); }

static inline uint16_t f32_to_bfloat16(float x) {
    uint32_t bits = float_bits(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uint32_t quiet_nan = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

/* A float32 as the nearest bfloat16 and the 16 bits that it lacks: their signed difference. Halfway cases go away from
 * zero, so that the difference fits. A NaN becomes the one whose difference is 0. */
static inline uint16_t high_of_f32(float x) {
    return (uint16_t)(x != x ? 0x7fc0u : (float_bits(x) + 0x8000u) >> 16);
}
static inline uint16_t low_of_f32(float x) { return (uint16_t)(x != x ? 0u : float_bits(x)); }
static inline float f32_of_halves(uint16_t high, uint16_t low) {
    return bits_float(((uint32_t)high << 16) + (uint32_t)(int32_t)(int16_t)low);
}

/* float16 has 5 exponent bits, biased by 15, and 10 bits of fraction: shifted by 13 into float32's place, the
 * exponent is short by 127 - 15 = 112. Its subnormals are the fraction in units of 2^-24, which the subtraction
 * of 2^-14 leaves exactly. */
static inline float float16_to_f32(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t magnitude = (uint32_t)(half & 0x7fffu) << 13;
    uint32_t normal = magnitude + (112u << 23);
    uint32_t special = magnitude + (224u << 23); /* infinity and NaN: exponent 31 becomes 255 */
    uint32_t subnormal = float_bits(bits_float(magnitude + (113u << 23)) - bits_float(113u << 23));
    uint32_t bits = magnitude >= (0x7c00u << 13) ? special : (magnitude < (0x0400u << 13) ? subnormal : normal);
    return bits_float(bits | sign);
}

/* Below 2^-14 the sum with 2^-1 has an ulp of 2^-24, so that the addition itself rounds to float16's subnormals. */
static inline uint16_t f32_to_float16(float x) {
    uint32_t bits = float_bits(x);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t subnormal = float_bits(bits_float(magnitude < (113u << 23) ? magnitude : 0u) + 0.5f) - float_bits(0.5f);
    uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    uint32_t half = magnitude >= (143u << 23) ? overflow : (magnitude < (113u << 23) ? subnormal : normal);
    return (uint16_t)(half | sign);
}

#endif
