/* A tile of a kernel whose states are 8-bit codes: the blocks, and what they share. The rule itself comes in as two
 * generated functions; the codes are explained in state_codecs.h.
 */
#ifndef FASTOPT_CODED_TILE_H
#define FASTOPT_CODED_TILE_H

#include <string.h>

#include "prefetch.h"
#include "state_codecs.h"

/* One full block: decodes the states, applies the rule, writes the new states as values and as codes under the scales
 * they had, and into 16 words of `overflow` what the codes have above their range. */
typedef void (*block_function)(
    float *p, const float *g, void *const *codes, float *const *values, float *update, const block_code *code,
    const float *scalars, uint32_t *overflow, const code_masks *masks
);

typedef struct {
    block_function block;
    tile_function float32; /* the same rule on float32 states */
    int n_states;
    int is_signed[MAX_ROUNDED_STATES];
} coded_rule;

/* Encodes up to 64 values of every state, from element `at` of a tile on. */
static void encode_states(
    const coded_rule *rule, float (*values)[TILE_ELEMENTS], ptrdiff_t at, void *const *states,
    uint16_t *const *scales, ptrdiff_t start, ptrdiff_t n, const tile_context *context
) {
    int64_t first = context->index + start + at;
    uint64_t bits = dither_bits(context, first);
    int lowers = block_to_lower(context, first) == 0;
    for (int k = 0; k < rule->n_states; k++)
        encode_block(
            values[k] + at, n, rule->is_signed[k], dither_of_state(bits, k), lowers,
            scales[k] + (start + at) / CODE_BLOCK, (uint8_t *)states[k] + start + at
        );
}

static int may_be_lowered(const coded_rule *rule, void *const *states, uint16_t *const *scales, ptrdiff_t start) {
    for (int k = 0; k < rule->n_states; k++) {
        uint32_t smallest = rule->is_signed[k] ? SIGNED_SMALLEST_SCALE : UNSIGNED_SMALLEST_SCALE;
        uint64_t words_of_block[CODE_BLOCK / 8], any = 0;
        if (scales[k][start / CODE_BLOCK] == smallest)
            continue;
        memcpy(words_of_block, (const uint8_t *)states[k] + start, CODE_BLOCK);
        for (int i = 0; i < CODE_BLOCK / 8; i++)
            any |= words_of_block[i];
        if (!(any & (rule->is_signed[k] ? 0x4040404040404040u : 0x8080808080808080u)))
            return 1;
    }
    return 0;
}

/* A block that is flagged or short, from element `at` of the tile on: decoded, updated as float32, encoded. */
static void run_block_in_float32(
    const coded_rule *rule, float *p, const float *g, float (*values)[TILE_ELEMENTS], ptrdiff_t at,
    void *const *states, uint16_t *const *scales, ptrdiff_t start, ptrdiff_t n, const float *scalars,
    const tile_context *context
) {
    void *decoded[MAX_STATES + 1];
    float *update = (float *)states[rule->n_states];
    for (int k = 0; k < rule->n_states; k++) {
        const uint8_t *codes = (const uint8_t *)states[k] + start + at;
        decode_block(codes, n, rule->is_signed[k], scales[k][(start + at) / CODE_BLOCK], values[k] + at);
        decoded[k] = values[k] + at;
    }
    decoded[rule->n_states] = update == NULL ? NULL : update + start + at;
    rule->float32(p + at, g + at, decoded, NULL, 0, n, scalars, context);
    encode_states(rule, values, at, states, scales, start, n, context);
}

/* `start` is a multiple of 64, and so is `n` but at the end of a tensor. */
static void run_coded_tile(
    const coded_rule *rule, float *p, const float *g, void *const *states, uint16_t *const *scales, ptrdiff_t start,
    ptrdiff_t n, const float *scalars, const tile_context *context
) {
    float values[MAX_ROUNDED_STATES][TILE_ELEMENTS] ALIGNED_64;
    uint32_t overflow[TILE_ELEMENTS / CODE_BLOCK][CODE_WORDS] ALIGNED_64;
    uint32_t any[CODE_WORDS] ALIGNED_64 = {0}, overflows = 0;
    ptrdiff_t n_blocks = n / CODE_BLOCK;
    float *update = (float *)states[rule->n_states];
    for (ptrdiff_t block = 0; block < n_blocks; block++) {
        ptrdiff_t at = block * CODE_BLOCK;
        uint64_t bits = dither_bits(context, context->index + start + at);
        uint32_t flagged = 0;
        block_code code[MAX_ROUNDED_STATES];
        void *codes[MAX_ROUNDED_STATES];
        float *block_values[MAX_ROUNDED_STATES];
        prefetch_block(p + at, context->distance);
        prefetch_block(g + at, context->distance);
        for (int k = 0; k < rule->n_states; k++) {
            uint32_t scale = scales[k][(start + at) / CODE_BLOCK];
            uint32_t of_state = dither_of_state(bits, k);
            code[k] = rule->is_signed[k] ? signed_code(scale, of_state) : unsigned_code(scale, of_state);
            codes[k] = (uint8_t *)states[k] + start + at;
            block_values[k] = values[k] + at;
            flagged |= scale & FLAGGED;
            prefetch_codes((uint8_t *)codes[k], context->distance);
        }
        if (flagged) {
            run_block_in_float32(rule, p, g, values, at, states, scales, start, CODE_BLOCK, scalars, context);
            memset(overflow[block], 0, sizeof overflow[block]);
        } else {
            float *of_block = update == NULL ? NULL : update + start + at;
            rule->block(p + at, g + at, codes, block_values, of_block, code, scalars, overflow[block], &MASKS);
        }
    }
    if (n % CODE_BLOCK)
        run_block_in_float32(
            rule, p, g, values, n_blocks * CODE_BLOCK, states, scales, start, n % CODE_BLOCK, scalars, context
        );
    for (ptrdiff_t block = 0; block < n_blocks; block++)
        for (int i = 0; i < CODE_WORDS; i++)
            any[i] |= overflow[block][i];
    for (int i = 0; i < CODE_WORDS; i++)
        overflows |= any[i];
    if (overflows & OVERFLOW_BITS)
        for (ptrdiff_t block = 0; block < n_blocks; block++) {
            uint32_t over = 0;
            for (int i = 0; i < CODE_WORDS; i++)
                over |= overflow[block][i];
            if (over & OVERFLOW_BITS)
                encode_states(rule, values, block * CODE_BLOCK, states, scales, start, CODE_BLOCK, context);
        }
    ptrdiff_t looked_at = block_to_lower(context, context->index + start);
    if (looked_at < n_blocks && may_be_lowered(rule, states, scales, start + looked_at * CODE_BLOCK))
        encode_states(rule, values, looked_at * CODE_BLOCK, states, scales, start, CODE_BLOCK, context);
}

#endif
