"""What surrounds a rule on the device, the same for all: segments, gradients, averages, copies, norms, decisions.

Here are device functions and the hand-written kernels; `fastopt._codegen.cuda` generates the others.
"""

from __future__ import annotations

from typing import Any

from numba import cuda

from fastopt._codegen import cuda as codegen
from fastopt.backends.cuda import layout, operations
from fastopt.backends.cuda.codecs import (
    f32_of_stored,
    read4,
    read4_parameters,
    read4_stored,
    store4,
    store4_copy,
    store4_parameters,
    store4_u16,
)
from fastopt.backends.cuda.layout import (
    APPLIED,
    CHOICE,
    CLIP_VALUE,
    CLIPS,
    COEFFICIENT,
    COPY,
    COPY_STORAGE,
    COUNT,
    DECIDED,
    EMA,
    EMA_DECAY,
    EMA_WEIGHT,
    FLOAT32,
    GRAD_SCALE,
    GRADIENT,
    HEADER,
    LANES,
    LIMITS,
    LOW,
    MAX_NORM,
    NORM,
    RATIO,
    ROW,
    ROW_BYTES,
    SCALARS,
    SCALE,
    SKIPS,
    STORAGE,
    UPDATE,
    ZEROES,
    N,
    P,
)
from fastopt.backends.cuda.operations import (
    add,
    add64,
    device,
    flush,
    from_bits,
    int32,
    int64,
    load_f32,
    load_f64,
    load_i32,
    load_i64,
    mul,
    mul64,
    narrowed,
    shuffle_f64,
    sqrt64,
    store_f32,
    store_f64,
    store_i32,
    sub,
    uint32,
    widened,
)
from fastopt.backends.cuda.operations import float64 as as_float64
from fastopt.rules import gradient_stage

# --- Segments


@device("int64(int64, int64, int64, int64)")
def find(table, n_rows, word, value):
    """Address of the last row of the table whose `word` is at most `value`; the first has 0 there."""
    low = 0
    high = n_rows
    while low + 1 < high:
        middle = (low + high) // 2
        if load_i64(table + ROW * middle + word) <= value:
            low = middle
        else:
            high = middle
    return table + ROW * low


@device("Tuple((int64, int64, int64, boolean))(int64, int64, int64, int64, int64)")
def place(table, n_segments, tile, n_threads, thread):
    """Where a thread's four elements are.

    Address of their segment's row, elements of that segment, index of the first of the four in it, and whether all four
    exist and can be accessed at once.
    """
    segment = find(table, n_segments, layout.FIRST_TILE, tile)
    n = load_i64(segment + N)
    i = 4 * ((tile - load_i64(segment + layout.FIRST_TILE)) * n_threads + thread)
    return segment, n, i, load_i64(segment + layout.ALIGNED) != 0 and i + 4 <= n


@device("int64(int64, int64)")
def scalars_of(segment, numbers):
    """Address of the host scalars of a segment, in the row for the step count that turned out to be true."""
    row = load_i32(numbers + CHOICE) * load_i32(numbers + ROW_BYTES)
    return numbers + HEADER + row + load_i64(segment + SCALARS)


# --- Gradients


def _defined(text: str) -> Any:
    """The device function that a generated text defines."""
    scope = dict(vars(operations))
    before = set(scope)
    exec(text, scope)
    (name,) = scope.keys() - before - {"__builtins__"}
    return scope[name]


TEXTS = (
    codegen.clip_source(),
    codegen.host_function_source(gradient_stage.clip_coefficient),
    codegen.host_function_source(gradient_stage.clip_factors),
)
"""Generated device functions: the gradient stage's."""
clip, clip_coefficient, clip_factors = map(_defined, TEXTS)


@device("UniTuple(float32, 4)(int64, float32, float32, float32, float32)")
def clip4(numbers, a, b, c, d):
    """Four gradients, scaled and clipped if the step clips by value; otherwise the rule scales them."""
    if load_i32(numbers + CLIPS) != 0:
        scale, coefficient = load_f32(numbers + SCALE), load_f32(numbers + COEFFICIENT)
        bound = load_f32(numbers + CLIP_VALUE)
        return (
            clip(a, scale, coefficient, bound),
            clip(b, scale, coefficient, bound),
            clip(c, scale, coefficient, bound),
            clip(d, scale, coefficient, bound),
        )
    return a, b, c, d


@device("float32(int64, float32)")
def scaled_by_step(numbers, grad_scale):
    """The host scalar grad_scale times that of the step, unless `clip4` has applied the latter."""
    return grad_scale if load_i32(numbers + CLIPS) != 0 else mul(grad_scale, load_f32(numbers + SCALE))


@device("float32(int64, float32)")
def coefficient_of_step(numbers, clip_coefficient):
    """The host scalar clip_coefficient, replaced by that of the step unless `clip4` has applied it."""
    return clip_coefficient if load_i32(numbers + CLIPS) != 0 else load_f32(numbers + COEFFICIENT)


@device("void(int64, int64, int64, int64, boolean)")
def zero4(segment, numbers, i, n, whole):
    """Zero gradients if the step is to."""
    if load_i32(numbers + ZEROES) != 0:
        address = load_i64(segment + GRADIENT)
        if load_i64(segment + STORAGE) == FLOAT32:
            zero = from_bits(uint32(0))
            store4(address, i, n, whole, zero, zero, zero, zero)
        else:
            none = uint32(0)
            store4_u16(address, i, n, whole, none, none, none, none)


# --- What is kept beside the parameters


@device("float32(int64, float32, float32)")
def averaged(scalars, ema, p):
    return add(mul(load_f32(scalars + EMA_DECAY), ema), mul(load_f32(scalars + EMA_WEIGHT), p))


@device("UniTuple(float32, 4)(int64, int64, int64, boolean)")
def read4_if_there(address, i, n, whole):
    """As `read4`; zeros where there is no array."""
    if address != 0:
        return read4(address, i, n, whole)
    zero = from_bits(uint32(0))
    return zero, zero, zero, zero


@device(
    "void(int64, int64, int64, int64, int64, int64, boolean, float32, float32, float32, float32, "
    "float32, float32, float32, float32)"
)
def keep4(segment, numbers, scalars, ema, i, n, whole, a, b, c, d, e, f, g, h):
    """Average and copy of new parameters, where they are kept; `e` to `h` is the average as it was."""
    if ema != 0:
        e, f, g, h = flush(e), flush(f), flush(g), flush(h)
        e, f, g, h = averaged(scalars, e, a), averaged(scalars, f, b), averaged(scalars, g, c), averaged(scalars, h, d)
        store4(ema, i, n, whole, e, f, g, h)
    copy = load_i64(segment + COPY)
    if copy != 0:
        store4_copy(copy, load_i32(numbers + COPY_STORAGE), i, n, whole, a, b, c, d)


def apply_update(table, numbers, n_segments, n_tiles):
    """Kernel: parameters minus the update, scaled by a trust ratio; then averages, copies, zeroing, as after a rule."""
    tile = int64(cuda.blockIdx.x)
    while tile < n_tiles:
        segment, n, i, whole = place(table, n_segments, tile, cuda.blockDim.x, cuda.threadIdx.x)
        if i < n:
            if load_i32(numbers + APPLIED) != 0:
                p = load_i64(segment + P)
                low = load_i64(segment + LOW)
                ema = load_i64(segment + EMA)
                update = load_i64(segment + UPDATE)
                a, b, c, d = read4_parameters(p, low, i, n, whole)  # all loads before the first use
                e, f, g, h = read4(update, i, n, whole)
                q, r, s, t = read4_if_there(ema, i, n, whole)
                size = load_f32(segment + RATIO)
                a, b, c, d = flush(a), flush(b), flush(c), flush(d)
                e, f, g, h = flush(e), flush(f), flush(g), flush(h)
                a, b, c, d = sub(a, mul(size, e)), sub(b, mul(size, f)), sub(c, mul(size, g)), sub(d, mul(size, h))
                store4_parameters(p, low, i, n, whole, a, b, c, d)
                keep4(segment, numbers, scalars_of(segment, numbers), ema, i, n, whole, a, b, c, d, q, r, s, t)
            zero4(segment, numbers, i, n, whole)
        tile += cuda.gridDim.x


def accumulate_gradients(table, n_segments, n_tiles):
    """Kernel: gradients of any type are added to the float32 sums in the parameters' place."""
    tile = int64(cuda.blockIdx.x)
    while tile < n_tiles:
        segment, n, i, whole = place(table, n_segments, tile, cuda.blockDim.x, cuda.threadIdx.x)
        if i < n:
            sums = load_i64(segment + P)
            storage = load_i64(segment + STORAGE)
            q, r, s, t = read4_stored(load_i64(segment + GRADIENT), storage, i, n, whole)
            a, b, c, d = read4(sums, i, n, whole)
            e, f, g, h = f32_of_stored(storage, q, r, s, t)
            store4(sums, i, n, whole, add(a, e), add(b, f), add(c, g), add(d, h))
        tile += cuda.gridDim.x


def exchange_averages(table, numbers, n_segments, n_tiles):  # noqa: ARG001  as the other kernels are called
    """Kernel: parameters and their averages change places."""
    tile = int64(cuda.blockIdx.x)
    while tile < n_tiles:
        segment, n, i, whole = place(table, n_segments, tile, cuda.blockDim.x, cuda.threadIdx.x)
        if i < n:
            p = load_i64(segment + P)
            low = load_i64(segment + LOW)
            ema = load_i64(segment + EMA)
            a, b, c, d = read4_parameters(p, low, i, n, whole)
            e, f, g, h = read4(ema, i, n, whole)
            store4_parameters(p, low, i, n, whole, e, f, g, h)
            store4(ema, i, n, whole, a, b, c, d)
        tile += cuda.gridDim.x


def copy_parameters(table, numbers, n_segments, n_tiles):
    """Kernel: parameters as they are into averages and copies, where rows have them."""
    tile = int64(cuda.blockIdx.x)
    while tile < n_tiles:
        segment, n, i, whole = place(table, n_segments, tile, cuda.blockDim.x, cuda.threadIdx.x)
        if i < n:
            a, b, c, d = read4_parameters(load_i64(segment + P), load_i64(segment + LOW), i, n, whole)
            ema = load_i64(segment + EMA)
            if ema != 0:
                store4(ema, i, n, whole, a, b, c, d)
            copy = load_i64(segment + COPY)
            if copy != 0:
                store4_copy(copy, load_i32(numbers + COPY_STORAGE), i, n, whole, a, b, c, d)
        tile += cuda.gridDim.x


def fill_words(address, n, word):
    """Kernel: `n` 4-byte words at an address become `word`."""
    i = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    while i < n:
        store_i32(address + 4 * i, int32(word))
        i += int64(cuda.gridDim.x) * cuda.blockDim.x


# --- Norms. Element i of a space goes to lane i % 32 of block i // 16384, in float64 and in order; lanes are added up
# as a fixed tree; blocks likewise, block b in lane b % 32. So does the CPU: the norm has the same bits on both. A warp
# is a block's.


@device("float64(float64, float32)")
def plus_square(total, x):
    value = widened(x)
    return add64(total, mul64(value, value))


@device("float64(float64)")
def fold(x):
    """The sum over the lanes of a warp."""
    x = add64(x, shuffle_f64(x, 16))
    x = add64(x, shuffle_f64(x, 8))
    x = add64(x, shuffle_f64(x, 4))
    x = add64(x, shuffle_f64(x, 2))
    return add64(x, shuffle_f64(x, 1))


@device("float64(int64, int64, int64)")
def sum_of_blocks(sums, n_blocks, lane):
    """The sum over blocks; every lane of a warp must call."""
    total = as_float64(0)
    block = lane
    while block + 3 * LANES < n_blocks:  # loads first: each takes hundreds of cycles
        at = sums + 8 * block
        a = load_f64(at)
        b = load_f64(at + 8 * LANES)
        c = load_f64(at + 16 * LANES)
        d = load_f64(at + 24 * LANES)
        total = add64(add64(add64(add64(total, a), b), c), d)
        block += 4 * LANES
    while block < n_blocks:
        total = add64(total, load_f64(sums + 8 * block))
        block += LANES
    return fold(total)


@device("boolean(float64)")
def is_finite(x):
    largest = 1.7976931348623157e308
    return x <= largest and x >= -largest


def decide(numbers, control, n_blocks, sums):
    """Kernel of one warp: the global norm, what it scales gradients by, and whether the step is applied."""
    lane = int64(cuda.threadIdx.x)
    total = sum_of_blocks(sums, n_blocks, lane)
    if lane == 0:
        norm = sqrt64(total)
        is_first = load_f64(numbers + NORM) == -1.0  # else a replay that nobody prepared
        applied = not (load_i32(numbers + SKIPS) != 0 and not (is_first and is_finite(norm)))
        scale = load_f64(numbers + GRAD_SCALE)
        coefficient = as_float64(1)
        if load_i32(numbers + LIMITS) != 0:
            scale, coefficient = clip_factors(scale, clip_coefficient(norm, load_f64(numbers + MAX_NORM)))
        store_f32(numbers + SCALE, narrowed(scale))
        store_f32(numbers + COEFFICIENT, narrowed(coefficient))
        if load_i32(numbers + SKIPS) != 0:
            count = load_i32(control + COUNT)
            choice = count - load_i32(numbers + DECIDED)
            if choice < 0 or choice >= load_i32(numbers + layout.ROWS):  # other steps came between
                applied = False
            store_i32(numbers + CHOICE, choice if applied else 0)
            store_i32(control + COUNT, count + 1 if applied else count)
        store_i32(numbers + APPLIED, 1 if applied else 0)
        if is_first:
            store_f64(numbers + NORM, norm)
            store_i32(numbers + layout.RESULT, 1 if applied else 0)


@device("float32(float64)")
def at_most_largest(x):
    """Round to float32, an overflow to the largest."""
    largest = from_bits(uint32(0x7F7FFFFF))
    return largest if x > widened(largest) else narrowed(x)
