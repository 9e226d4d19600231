"""Elements in 8 and 16 bits on the device: what `kernels/codecs.h` and `kernels/state_codecs.h` are on the CPU.

The formats, and why they are as they are, are explained there. Four neighbours are one thread's.
"""

from __future__ import annotations

from fastopt._formats.constants import (
    CODE_BLOCK,
    CODE_SHIFT,
    FLAGGED,
    LARGEST_SCALE,
    LOWERED_EVERY,
    RANDOM_BITS,
    SIGNED_BINADES,
    SIGNED_HEADROOM,
    SIGNED_LARGEST_CODE,
    SIGNED_SMALLEST_SCALE,
    SPLITMIX_FACTOR_1,
    SPLITMIX_FACTOR_2,
    SPLITMIX_INCREMENT,
    UNSIGNED_BINADES,
    UNSIGNED_HEADROOM,
    UNSIGNED_LARGEST_CODE,
    UNSIGNED_SMALLEST_SCALE,
)
from fastopt.backends.cuda.layout import BFLOAT16, FLOAT16, FLOAT32
from fastopt.backends.cuda.operations import (
    add,
    bits,
    device,
    flush,
    from_bits,
    load_f32,
    load_f32x4,
    load_u8,
    load_u16,
    load_u16x4,
    load_u32x2,
    load_u32x4,
    mul,
    reverse,
    shuffle_u32,
    store_f32,
    store_f32x4,
    store_u8,
    store_u16,
    store_u16x4,
    store_u32x4,
    sub,
    uint32,
    uint64,
)

# --- float32


@device("UniTuple(float32, 4)(int64, int64, int64, boolean)")
def read4(address, i, n, whole):
    """Elements [i, i + 4) of an array of `n`, as they are; zeros behind its end."""
    if whole:
        return load_f32x4(address + 4 * i)
    zero = from_bits(uint32(0))
    return (
        load_f32(address + 4 * i) if i < n else zero,
        load_f32(address + 4 * i + 4) if i + 1 < n else zero,
        load_f32(address + 4 * i + 8) if i + 2 < n else zero,
        load_f32(address + 4 * i + 12) if i + 3 < n else zero,
    )


@device("void(int64, int64, int64, boolean, float32, float32, float32, float32)")
def store4(address, i, n, whole, a, b, c, d):
    if whole:
        store_f32x4(address + 4 * i, a, b, c, d)
    else:
        if i < n:
            store_f32(address + 4 * i, a)
        if i + 1 < n:
            store_f32(address + 4 * i + 4, b)
        if i + 2 < n:
            store_f32(address + 4 * i + 8, c)
        if i + 3 < n:
            store_f32(address + 4 * i + 12, d)


# --- 16 bits


@device("UniTuple(uint32, 4)(int64, int64, int64, boolean)")
def load4_u16(address, i, n, whole):
    if whole:
        return load_u16x4(address + 2 * i)
    zero = uint32(0)
    return (
        load_u16(address + 2 * i) if i < n else zero,
        load_u16(address + 2 * i + 2) if i + 1 < n else zero,
        load_u16(address + 2 * i + 4) if i + 2 < n else zero,
        load_u16(address + 2 * i + 6) if i + 3 < n else zero,
    )


@device("void(int64, int64, int64, boolean, uint32, uint32, uint32, uint32)")
def store4_u16(address, i, n, whole, a, b, c, d):
    if whole:
        store_u16x4(address + 2 * i, a, b, c, d)
    else:
        if i < n:
            store_u16(address + 2 * i, a)
        if i + 1 < n:
            store_u16(address + 2 * i + 2, b)
        if i + 2 < n:
            store_u16(address + 2 * i + 4, c)
        if i + 3 < n:
            store_u16(address + 2 * i + 6, d)


@device("float32(uint32)")
def bfloat16_to_f32(half):
    return flush(from_bits(uint32(half << 16)))


@device("uint32(float32)")
def f32_to_bfloat16(x):
    pattern = bits(x)
    rounded = uint32(pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
    quiet_nan = (pattern >> 16) | 0x40
    return uint32(quiet_nan if x != x else rounded)


@device("float32(uint32)")
def float16_to_f32(half):
    sign = uint32((half & 0x8000) << 16)
    magnitude = uint32((half & 0x7FFF) << 13)
    subnormal = bits(sub(from_bits(uint32(magnitude + (113 << 23))), from_bits(uint32(113 << 23))))
    pattern = uint32(magnitude + (112 << 23))
    if magnitude < (0x0400 << 13):
        pattern = subnormal
    if magnitude >= (0x7C00 << 13):
        pattern = uint32(magnitude + (224 << 23))
    return from_bits(uint32(pattern | sign))


@device("uint32(float32)")
def f32_to_float16(x):
    pattern = bits(x)
    magnitude = uint32(pattern & 0x7FFFFFFF)
    if magnitude >= (143 << 23):
        half = uint32(0x7E00 if magnitude > 0x7F800000 else 0x7C00)
    elif magnitude < (113 << 23):
        one_half = from_bits(uint32(126 << 23))  # whose ulp is that of float16's subnormals
        half = uint32(bits(add(from_bits(magnitude), one_half)) - (126 << 23))
    else:
        half = uint32(uint32(magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13)
    return uint32(half | ((pattern >> 16) & 0x8000))


@device("float32(uint32, uint32)")
def f32_of_halves(high, low):
    """The float32 whose nearest bfloat16 is `high`, and `low` the signed rest."""
    below = uint32(0xFFFF0000 | low) if low >= 0x8000 else low
    return from_bits(uint32((high << 16) + below))


@device("uint32(float32)")
def high_of_f32(x):
    return uint32(0x7FC0 if x != x else uint32(bits(x) + 0x8000) >> 16)


@device("uint32(float32)")
def low_of_f32(x):
    return uint32(0 if x != x else bits(x) & 0xFFFF)


@device("void(int64, int32, int64, int64, boolean, float32, float32, float32, float32)")
def store4_copy(address, storage, i, n, whole, a, b, c, d):
    """Round to bfloat16 or float16."""
    if storage == FLOAT16:
        store4_u16(address, i, n, whole, f32_to_float16(a), f32_to_float16(b), f32_to_float16(c), f32_to_float16(d))
    else:
        store4_u16(address, i, n, whole, f32_to_bfloat16(a), f32_to_bfloat16(b), f32_to_bfloat16(c), f32_to_bfloat16(d))


@device("UniTuple(float32, 4)(int64, int64, int64, int64, boolean)")
def read4_parameters(p, low, i, n, whole):
    """Parameters in float32 as they are, put together from their halves where `low` is not 0."""
    if low == 0:
        return read4(p, i, n, whole)
    a, b, c, d = load4_u16(p, i, n, whole)
    e, f, g, h = load4_u16(low, i, n, whole)
    return f32_of_halves(a, e), f32_of_halves(b, f), f32_of_halves(c, g), f32_of_halves(d, h)


@device("void(int64, int64, int64, int64, boolean, float32, float32, float32, float32)")
def store4_parameters(p, low, i, n, whole, a, b, c, d):
    if low == 0:
        store4(p, i, n, whole, a, b, c, d)
    else:
        store4_u16(p, i, n, whole, high_of_f32(a), high_of_f32(b), high_of_f32(c), high_of_f32(d))
        store4_u16(low, i, n, whole, low_of_f32(a), low_of_f32(b), low_of_f32(c), low_of_f32(d))


# --- States in 16 and 8 bits: random numbers


@device("uint64(uint64, int64)")
def dither_bits(key, first):
    """Random bits for the elements from `first` on, `RANDOM_BITS` for each state."""
    x = uint64(key + uint64(uint64(first) * uint64(SPLITMIX_INCREMENT)))
    x = uint64((x ^ (x >> uint64(30))) * uint64(SPLITMIX_FACTOR_1))
    x = uint64((x ^ (x >> uint64(27))) * uint64(SPLITMIX_FACTOR_2))
    return uint64(x ^ (x >> uint64(31)))


@device("uint32(uint64, int64)")
def dither_of_state(random, state):
    return uint32((random >> uint64(RANDOM_BITS * state)) & uint64((1 << RANDOM_BITS) - 1))


@device("uint32(int64)")
def stratum(place):
    """What an element's random bits are xored with: the 6 bits of its place in its block, reversed."""
    return uint32((reverse(uint32(place)) >> 26) << (RANDOM_BITS - 6))


@device("uint32(float32, uint32)")
def f32_to_bfloat16_dithered(x, random):
    return uint32(0x7FC0 if x != x else uint32(bits(x) + random) >> 16)


@device("UniTuple(uint32, 2)(int64, int64, int64, boolean)")
def read4_halves(address, i, n, whole):
    """Four elements of 2 bytes as two words, the first in the lower half of the first."""
    if whole:
        return load_u32x2(address + 2 * i)
    a, b, c, d = load4_u16(address, i, n, whole)
    return uint32(a | (b << 16)), uint32(c | (d << 16))


@device("UniTuple(float32, 4)(uint32, uint32)")
def bfloat16_of_words(low, high):
    """Four elements of bfloat16 as `read4_halves` has them."""
    return (
        bfloat16_to_f32(uint32(low & 0xFFFF)),
        bfloat16_to_f32(uint32(low >> 16)),
        bfloat16_to_f32(uint32(high & 0xFFFF)),
        bfloat16_to_f32(uint32(high >> 16)),
    )


@device("UniTuple(uint32, 4)(int64, int64, int64, int64, boolean)")
def read4_stored(address, storage, i, n, whole):
    """The words of four elements of float32, bfloat16 or float16, in two words where these are 2 bytes long."""
    if storage == FLOAT32:
        if whole:
            return load_u32x4(address + 4 * i)
        a, b, c, d = read4(address, i, n, whole)
        return bits(a), bits(b), bits(c), bits(d)
    low, high = read4_halves(address, i, n, whole)
    none = uint32(0)
    return low, high, none, none


@device("UniTuple(float32, 4)(int64, uint32, uint32, uint32, uint32)")
def f32_of_stored(storage, a, b, c, d):
    """What `read4_stored` read, in float32, subnormals as zero."""
    if storage == FLOAT32:
        return flush(from_bits(a)), flush(from_bits(b)), flush(from_bits(c)), flush(from_bits(d))
    if storage == BFLOAT16:
        return bfloat16_of_words(a, b)
    return (
        float16_to_f32(uint32(a & 0xFFFF)),
        float16_to_f32(uint32(a >> 16)),
        float16_to_f32(uint32(b & 0xFFFF)),
        float16_to_f32(uint32(b >> 16)),
    )


@device("uint32(float32, uint64, uint64, int64, int64, int64)")
def _dithered(x, random, next_random, first, element, state):
    """One of four neighbours, the first of which is `first`: `next_random` is for those of the block behind."""
    chosen = next_random if element // CODE_BLOCK != first // CODE_BLOCK else random
    random_bits = stratum(element % CODE_BLOCK) ^ dither_of_state(chosen, state)
    return f32_to_bfloat16_dithered(x, uint32(random_bits >> (RANDOM_BITS - 16)))


@device("void(int64, int64, int64, boolean, uint64, int64, int64, float32, float32, float32, float32)")
def store4_bfloat16(address, i, n, whole, key, index, state, a, b, c, d):
    """Rounded stochastically; `index` is the optimizer's of the array's first element."""
    first = index + i
    random = dither_bits(key, first - first % CODE_BLOCK)
    next_random = random
    if (first + 3) // CODE_BLOCK != first // CODE_BLOCK:
        next_random = dither_bits(key, first + 3 - (first + 3) % CODE_BLOCK)
    store4_u16(
        address,
        i,
        n,
        whole,
        _dithered(a, random, next_random, first, first, state),
        _dithered(b, random, next_random, first, first + 1, state),
        _dithered(c, random, next_random, first, first + 2, state),
        _dithered(d, random, next_random, first, first + 3, state),
    )


# --- 8 bits. A block of 64 elements is 16 threads', of which number t has elements 4 t to 4 t + 3. Byte 4 i + j of a
# full block is element 16 j + i, so those four are byte t / 4 of words 4 (t % 4) and after: 16 bytes. A short block
# is in natural order.

_OVERFLOW_BITS = 0xFFFFFFFF << (CODE_SHIFT + 7) & 0xFFFFFFFF
_TOP_BIT = (SIGNED_LARGEST_CODE + 1) // 2 << CODE_SHIFT
"""Above a code of 7 bits, and its highest bit, where a code starts in a float."""


@device("int64(int64)")
def shift_of_code(i):
    return 8 * (i // 16 % 4)


@device("UniTuple(uint32, 4)(int64, int64, int64)")
def read4_codes(address, i, n):
    """Words with the codes of elements [i, i + 4), with i a multiple of 4: at bit `shift_of_code(i)` of each."""
    start = i - i % CODE_BLOCK
    if start + CODE_BLOCK <= n:
        return load_u32x4(address + start + 16 * (i // 4 % 4))
    zero = uint32(0)
    shift = shift_of_code(i)
    return (
        uint32(load_u8(address + i) << shift) if i < n else zero,
        uint32(load_u8(address + i + 1) << shift) if i + 1 < n else zero,
        uint32(load_u8(address + i + 2) << shift) if i + 2 < n else zero,
        uint32(load_u8(address + i + 3) << shift) if i + 3 < n else zero,
    )


@device("uint32(uint32)")
def _joined(word):
    """What the four threads that share words of codes have, together."""
    word = uint32(word | shuffle_u32(word, 4))
    return uint32(word | shuffle_u32(word, 8))


@device("void(int64, int64, int64, uint32, uint32, uint32, uint32)")
def store4_codes(address, i, n, a, b, c, d):
    """Every thread of the warp must call."""
    start = i - i % CODE_BLOCK
    shift = 8 * (i // 16 % 4)
    first = _joined(uint32(a << shift))
    second = _joined(uint32(b << shift))
    third = _joined(uint32(c << shift))
    fourth = _joined(uint32(d << shift))
    if start + CODE_BLOCK <= n:
        if shift == 0:
            store_u32x4(address + start + 16 * (i // 4 % 4), first, second, third, fourth)
    else:
        if i < n:
            store_u8(address + i, a)
        if i + 1 < n:
            store_u8(address + i + 1, b)
        if i + 2 < n:
            store_u8(address + i + 2, c)
        if i + 3 < n:
            store_u8(address + i + 3, d)


@device("uint32(uint32, boolean)")
def _base(scale, is_signed):
    """Bits of delta's exponent."""
    return uint32(uint32((scale & 0xFF) - (SIGNED_BINADES if is_signed else UNSIGNED_BINADES)) << 23)


@device("float32(uint32, boolean)")
def _delta(base, is_signed):
    """15/16 of the unit for codes without a sign, so that code 0 is small, not 0."""
    unit = from_bits(base)
    return unit if is_signed else mul(unit, from_bits(uint32(0x3F700000)))


@device("float32(uint32, uint32, boolean)")
def decode_code(code, scale, is_signed):
    """The number that a code stands for under its block's scale."""
    base = _base(scale, is_signed)
    largest = SIGNED_LARGEST_CODE if is_signed else UNSIGNED_LARGEST_CODE
    magnitude = code & largest
    value = bits(sub(from_bits(uint32((magnitude << CODE_SHIFT) + base)), _delta(base, is_signed)))
    if (scale & FLAGGED) != 0 and magnitude >= largest - 1:
        value = uint32(0x7F800000 if magnitude == largest - 1 else 0x7FC00000)
    sign = uint32((code & 0x80) << 24) if is_signed else uint32(0)
    return from_bits(uint32(value | sign))


@device("uint32(float32, uint32, uint32, boolean)")
def _encoded(x, scale, random, is_signed):
    """Code, from bit `CODE_SHIFT` on, in the bits of a float counted from delta's; too large where it does not fit."""
    base = _base(scale, is_signed)
    if is_signed:
        y = add(from_bits(uint32(bits(x) & 0x7FFFFFFF)), from_bits(base))
    else:
        y = add(x, _delta(base, is_signed))
        least = from_bits(base)
        y = least if least > y else y
    return uint32(bits(y) + random - base)


@device("uint32(float32, boolean)")
def _counted(x, is_signed):
    """Bits of the magnitude that a block's scale must hold; 0 for what is not finite, or negative without a sign."""
    magnitude = uint32(bits(x) & 0x7FFFFFFF)
    excluded = magnitude >= 0x7F800000 or (not is_signed and bits(x) >= 0x80000000)
    return uint32(0) if excluded else magnitude


@device("uint32(float32, uint32, uint32, uint32, boolean)")
def _code(x, scale, random, limit, is_signed):
    """The code of `x`: at most `limit`, above which are those of infinity and NaN."""
    encoded = _encoded(x, scale, random, is_signed) >> CODE_SHIFT
    magnitude = uint32(limit if encoded > limit else encoded)
    pattern = bits(x) & 0x7FFFFFFF if is_signed else bits(x)
    if (bits(x) & 0x7FFFFFFF) >= 0x7F800000:
        magnitude = uint32(limit + 1 if pattern == 0x7F800000 else limit + 2)
    return uint32(magnitude | ((bits(x) >> 24) & 0x80)) if is_signed else magnitude


@device("uint32(uint32)")
def _any(x):
    """The or over the 16 threads of a block."""
    x = uint32(x | shuffle_u32(x, 1))
    x = uint32(x | shuffle_u32(x, 2))
    x = uint32(x | shuffle_u32(x, 4))
    return uint32(x | shuffle_u32(x, 8))


@device("uint32(uint32, uint32)")
def _larger(x, y):
    return uint32(y if y > x else x)


@device("uint32(uint32)")
def _largest(x):
    """The maximum over the 16 threads of a block."""
    x = _larger(x, shuffle_u32(x, 1))
    x = _larger(x, shuffle_u32(x, 2))
    x = _larger(x, shuffle_u32(x, 4))
    return _larger(x, shuffle_u32(x, 8))


@device(
    "void(int64, int64, int64, int64, uint64, int64, int32, int64, boolean, uint32, float32, float32, float32, float32)"
)
def store4_coded(codes, scales, i, n, key, index, step, state, is_signed, scale, a, b, c, d):
    """Encode a block, 4 elements in each of 16 threads; every thread of the warp must call, those behind n with 0.

    `scale` is the block's before the step; it stays unless a code does not fit, a value is not finite, or it is
    this block's turn to be looked at and its largest code has lost the top bit.
    """
    start = i - i % CODE_BLOCK
    random = dither_of_state(dither_bits(key, index + start), state)
    place = i % CODE_BLOCK
    ra, rb = uint32(stratum(place) ^ random), uint32(stratum(place + 1) ^ random)
    rc, rd = uint32(stratum(place + 2) ^ random), uint32(stratum(place + 3) ^ random)
    kept = uint32(scale & 0xFF)
    encoded = uint32(
        _encoded(a, kept, ra, is_signed)
        | _encoded(b, kept, rb, is_signed)
        | _encoded(c, kept, rc, is_signed)
        | _encoded(d, kept, rd, is_signed)
    )
    encoded = _any(encoded if is_signed else uint32(encoded >> 1))
    largest = _larger(
        _larger(_counted(a, is_signed), _counted(b, is_signed)), _larger(_counted(c, is_signed), _counted(d, is_signed))
    )
    largest = _largest(largest)
    special = _largest(
        _larger(
            _larger(uint32(bits(a) & 0x7FFFFFFF), uint32(bits(b) & 0x7FFFFFFF)),
            _larger(uint32(bits(c) & 0x7FFFFFFF), uint32(bits(d) & 0x7FFFFFFF)),
        )
    )
    smallest = uint32(SIGNED_SMALLEST_SCALE if is_signed else UNSIGNED_SMALLEST_SCALE)
    lowers = ((index + start) // CODE_BLOCK + step) % LOWERED_EVERY == 0
    fits = (scale & FLAGGED) == 0 and (encoded & _OVERFLOW_BITS) == 0
    falls = lowers and (encoded & _TOP_BIT) == 0 and kept > smallest
    limit = uint32(SIGNED_LARGEST_CODE if is_signed else UNSIGNED_LARGEST_CODE)
    chosen = kept
    flag = uint32(0)
    if not fits or falls:
        chosen = uint32((uint32(largest + 0x3FFFFF) >> 23) + (SIGNED_HEADROOM if is_signed else UNSIGNED_HEADROOM))
        chosen = smallest if chosen < smallest else chosen
        chosen = uint32(LARGEST_SCALE if chosen > LARGEST_SCALE else chosen)
        if special >= 0x7F800000:
            flag = uint32(FLAGGED)
            limit = uint32(limit - 2)
    store4_codes(
        codes,
        i,
        n,
        _code(a, chosen, ra, limit, is_signed),
        _code(b, chosen, rb, limit, is_signed),
        _code(c, chosen, rc, limit, is_signed),
        _code(d, chosen, rd, limit, is_signed),
    )
    if i == start and i < n:
        store_u16(scales + 2 * (i // CODE_BLOCK), uint32(chosen | flag))
