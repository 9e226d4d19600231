# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The step: from gradients and param groups to tiles, on however many threads.

A `Plan` is what one optimizer needs for a step, prebuilt: pointers, lengths, step counts and the last seen
hyperparameters. `Plan.step` goes through five rooms, and writes only in the last:

1. groups     hyperparameters are compared with those last seen, by identity; what changed is validated
2. gather     every gradient is checked
3. norm       the global norm, if the step's options ask for it: one pass over the gradients
4. scalars    host scalars of every (group, step count); tensors become segments: pointers, length, scalars
5. run        segments are cut into tiles and shared out over the threads

An optimizer with a trust ratio (`trust`) takes room 5 in two passes: norms of every tensor, then the update.
`Plan.accumulate` takes rooms 2 and 5 alone: it adds gradients to float32 sums, which a step without gradients uses
and zeroes.

A tile stays in the cache while the stages that are on run over it: decode the gradient, clip it, the rule,
average the weights, copy them in low precision, zero the gradient. A stage that is off costs nothing.

What is refused is explained by Python code (`fastopt._buffers`); here it is only noticed. Compiled for the
baseline instruction set alone; the kernels come in as function pointers.
"""

from cpython.dict cimport PyDict_GetItem, PyDict_Next, PyDict_Size
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject, PyObject_GenericGetAttr, PyObject_GenericSetAttr
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from cython.parallel cimport parallel, threadid
from libc.math cimport INFINITY, isfinite, isinf, sqrt
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, qsort
from libc.string cimport memcmp, memcpy, memset

cimport numpy as cnp

import weakref

import numpy

from fastopt import _buffers

cnp.import_array()

cdef object ACCUMULATED = _buffers.ACCUMULATED

cdef extern from "kernel.h":
    enum: MAX_STATES
    enum: MAX_SCALARS
    enum: MAX_HYPERS
    enum: MAX_RUNNING
    enum: MAX_CODED_STATES
    enum: TILE_ELEMENTS
    enum: STATES_FLOAT32
    enum: STATES_BFLOAT16
    enum: STATES_8BIT
    ctypedef struct tile_context:
        uint64_t key
        int64_t index
        uint32_t step
        int distance
    ctypedef void (*tile_function)(
        float*, const float*, void* const*, uint16_t* const*, Py_ssize_t, Py_ssize_t, const float*, const tile_context*
    ) noexcept nogil
    ctypedef void (*scalars_function)(const double*, double, double*, float*) noexcept nogil
    ctypedef double (*trust_function)(const double*, double, double) noexcept nogil
    ctypedef struct kernel:
        tile_function tile[3]
        scalars_function scalars
        trust_function trust
        int n_scalars
    enum: LANES
    ctypedef struct tile_stages:
        void (*decode_bfloat16)(const uint16_t*, float*, Py_ssize_t) noexcept nogil
        void (*decode_float16)(const uint16_t*, float*, Py_ssize_t) noexcept nogil
        void (*encode_bfloat16)(const float*, uint16_t*, Py_ssize_t) noexcept nogil
        void (*encode_float16)(const float*, uint16_t*, Py_ssize_t) noexcept nogil
        void (*join)(const uint16_t*, const uint16_t*, float*, Py_ssize_t) noexcept nogil
        void (*split)(const float*, uint16_t*, uint16_t*, Py_ssize_t) noexcept nogil
        void (*clip)(const float*, float*, Py_ssize_t, float, float, float) noexcept nogil
        void (*apply)(float*, const float*, Py_ssize_t, float) noexcept nogil
        void (*average)(const float*, float*, Py_ssize_t, float, float) noexcept nogil
        void (*accumulate)(const float*, float*, Py_ssize_t) noexcept nogil
        void (*sum_squares)(const float*, Py_ssize_t, float, Py_ssize_t, double*) noexcept nogil

cdef extern from "prefetch.h":
    enum: FAR_DISTANCE
    enum: NEAR_DISTANCE
    enum: FAR_FROM

cdef extern from "control_word.h":
    ctypedef unsigned int control_word
    control_word enter_kernels() noexcept nogil
    control_word enter_host() noexcept nogil
    void leave_kernels(control_word) noexcept nogil
    control_word read_control_word() noexcept nogil

cdef extern from "team.h":
    enum: HAVE_OPENMP
    int team_size() noexcept nogil
    int affordable_team(int) noexcept nogil

cdef extern from "cpu_features.h":
    int x86_64_level() noexcept nogil

TILE = TILE_ELEMENTS
"""Elements of one call of a kernel. Threads own whole tiles of a tensor."""

cdef enum:
    CODE_BLOCK = 64      # elements of a tensor whose 8-bit states share a scale; divides a tile
    SEGMENT_WEIGHT = 64  # what starting a segment costs, in elements; balances many small tensors
    GIL_BELOW = 16384    # elements for which releasing the GIL costs more than it gives
    NORM_BLOCK = 16384   # elements of one partial sum of a norm; a multiple of a tile
    GRAD_SCALE = 0       # the gradient stage's first three host scalars (fastopt._stages)
    CLIP_COEFFICIENT = 1
    TRUST = 2
    LR = 0               # the first hyperparameter of every kernel

# How an array of gradients or copies holds its numbers.
cdef enum:
    FLOAT32, BFLOAT16, FLOAT16

# What a trust ratio per tensor scales.
cdef enum:
    NO_TRUST, TRUST_UPDATE, TRUST_GRADIENT

# What a pass over the tiles does: the whole step; of a step with a trust ratio its norms, or what comes after; or
# adding gradients to their sums.
cdef enum:
    WHOLE, MEASURE, FINISH, ACCUMULATE

OPENMP = bool(HAVE_OPENMP)

cdef double SMALLEST_NORMAL = 1.1754943508222875e-38  # of float32
cdef int64_t MAX_STEP = 1 << 53  # exact in float64

cdef Py_ssize_t serial_below = 32768
cdef int default_n_threads = 1
cdef bint forked = False
cdef int generation = 1  # of this process: one more than its parent's when a fork made it


def set_default_n_threads(int n_threads):
    """Threads of a step whose optimizer sets none."""
    global default_n_threads
    default_n_threads = n_threads


def set_serial_below(Py_ssize_t n):
    """Set the number of elements under which no parallel region is opened; return the one before."""
    global serial_below
    before, serial_below = serial_below, n
    return before


def mark_forked():
    """Run serially from now on: after a fork libgomp's threads are gone and it would wait for them."""
    global forked, generation
    forked = True
    generation += 1


def cpu_level():
    """The x86-64 level of this processor: 1 (baseline), 3 or 4."""
    return x86_64_level()


def control_word_now():
    """The calling thread's floating-point control word, exception flags included."""
    return read_control_word()


include "tensors.pxi"
include "transaction.pxi"


# --- Memory ranges ----------------------------------------------------------------------------------------

cdef struct Range:
    uintptr_t first
    uintptr_t end
    Py_ssize_t owner


cdef int compare_ranges(const void* a, const void* b) noexcept nogil:
    cdef uintptr_t x = (<Range*>a).first
    cdef uintptr_t y = (<Range*>b).first
    return (x > y) - (x < y)


cdef class Ranges:
    """Sorted memory ranges of arrays, empty ones left out: finds overlaps in O(log n).

    Parameters
    ----------
    arrays
        Arrays, and None, which counts for nothing.
    gap : int
        Arrays that follow each other in this list and in memory become one range, with so many bytes between them at
        most where they are of one allocation. -1 keeps every array apart.
    """

    cdef Range* ranges
    cdef Py_ssize_t n

    def __cinit__(self, list arrays, int gap=-1):
        cdef Py_ssize_t i
        cdef cnp.ndarray array
        cdef Range* last = NULL
        cdef PyObject* allocation = NULL
        cdef uintptr_t first
        self.ranges = <Range*>calloc(len(arrays) + 1, sizeof(Range))
        if self.ranges == NULL:
            raise MemoryError
        for i in range(len(arrays)):
            array = arrays[i]
            if array is None or not cnp.PyArray_SIZE(array):
                continue
            first = <uintptr_t>cnp.PyArray_DATA(array)
            if gap >= 0 and last != NULL and (
                first == last.end
                or (allocation == cnp.PyArray_BASE(array) and last.end < first <= last.end + <uintptr_t>gap)
            ):
                last.end = first + <uintptr_t>cnp.PyArray_NBYTES(array)
                continue
            last = &self.ranges[self.n]
            last.first = first
            last.end = first + <uintptr_t>cnp.PyArray_NBYTES(array)
            last.owner = i
            allocation = cnp.PyArray_BASE(array)
            self.n += 1
        qsort(self.ranges, self.n, sizeof(Range), compare_ranges)

    def plus(self, Ranges others):
        """The ranges of both, in a new object."""
        cdef Ranges made = Ranges.__new__(Ranges, [])
        cdef Range* ranges = <Range*>calloc(self.n + others.n + 1, sizeof(Range))
        cdef Py_ssize_t i = 0, k = 0
        if ranges == NULL:
            raise MemoryError
        free(made.ranges)
        made.ranges = ranges
        made.n = self.n + others.n
        while i + k < made.n:
            if k == others.n or (i < self.n and self.ranges[i].first <= others.ranges[k].first):
                ranges[i + k] = self.ranges[i]
                i += 1
            else:
                ranges[i + k] = others.ranges[k]
                k += 1
        return made

    def __dealloc__(self):
        free(self.ranges)

    def first_overlap(self):
        """Positions of two arrays that overlap each other, or None."""
        cdef Py_ssize_t k
        for k in range(1, self.n):
            if self.ranges[k].first < self.ranges[k - 1].end:
                return tuple(sorted((self.ranges[k - 1].owner, self.ranges[k].owner)))
        return None

    def overlapping(self, list arrays):
        """Positions of the arrays that overlap one of the ranges, which must not overlap each other."""
        cdef Py_ssize_t k
        cdef cnp.ndarray array
        cdef list found = []
        for k in range(len(arrays)):
            array = arrays[k]
            first = <uintptr_t>cnp.PyArray_DATA(array)
            if self.find(first, first + <uintptr_t>cnp.PyArray_NBYTES(array)) >= 0:
                found.append(k)
        return found

    cdef Py_ssize_t find(self, uintptr_t first, uintptr_t end) noexcept nogil:
        """Position of an array that overlaps [first, end), or -1. The ranges must not overlap each other."""
        cdef Py_ssize_t low = 0
        cdef Py_ssize_t high = self.n
        cdef Py_ssize_t middle
        if first == end:
            return -1
        while low < high:  # the first range that ends after `first`
            middle = (low + high) // 2
            if self.ranges[middle].end <= first:
                low = middle + 1
            else:
                high = middle
        if low < self.n and self.ranges[low].first < end:
            return self.ranges[low].owner
        return -1


# --- Running segments -------------------------------------------------------------------------------------

cdef struct Segment:
    float* p                     # NULL where parameters are split; the sums where gradients are added up
    uint16_t* high               # the halves of split parameters
    uint16_t* low
    void* states[MAX_STATES + 1]  # those that the kernel uses, and the update if it gives one
    uint16_t* scales[MAX_STATES]  # of states in 8 bits
    int n_states
    Py_ssize_t n
    tile_function tile
    const float* scalars
    tile_context context
    char* gradient  # as the caller holds it
    int storage     # of the gradient
    float ema_decay
    float ema_weight
    float* ema      # NULL unless weights are averaged
    uint16_t* copy  # NULL unless a copy is kept
    # With a trust ratio:
    const kernel* kernel
    const double* hyper
    float* update           # what the rule subtracts, where the ratio scales that
    Py_ssize_t first_block  # of its norms
    float size              # factor on the update


cdef struct Pipeline:
    # What surrounds the rules in this step.
    const tile_stages* stages
    bint clips
    bint zeroes
    float grad_scale
    float clip_coefficient
    float clip_value
    int copy_storage
    int trust
    int phase
    double* norms  # sums of squares of p and of the update or gradient, two numbers a block


cdef inline Py_ssize_t item_size(int storage) noexcept nogil:
    return 4 if storage == FLOAT32 else 2


cdef inline bint is_bare(const Segment* segment, const Pipeline* pipeline) noexcept nogil:
    """Whether nothing surrounds the rule."""
    return (
        segment.storage == FLOAT32 and segment.p != NULL and segment.ema == NULL and segment.copy == NULL
        and not pipeline.clips and not pipeline.zeroes and pipeline.phase == WHOLE
    )


cdef void decode(
    const tile_stages* stages, const char* source, int storage, Py_ssize_t at, float* out, Py_ssize_t n
) noexcept nogil:
    """Elements [at, at + n) of a bfloat16 or float16 array as float32."""
    if storage == BFLOAT16:
        stages.decode_bfloat16(<const uint16_t*>source + at, out, n)
    else:
        stages.decode_float16(<const uint16_t*>source + at, out, n)


cdef inline float* joined(
    const Segment* segment, Py_ssize_t at, Py_ssize_t n, const tile_stages* stages, float* out
) noexcept nogil:
    """Parameters [at, at + n) as float32: in place, or put together in `out`."""
    if segment.p != NULL:
        return segment.p + at
    stages.join(segment.high + at, segment.low + at, out, n)
    return out


cdef inline const float* clipped_gradient(
    const Segment* segment, Py_ssize_t at, Py_ssize_t n, const Pipeline* pipeline, bint clips, float* out
) noexcept nogil:
    """Gradients [at, at + n) as the rule takes them: in place, or decoded and, if asked, clipped in `out`."""
    cdef const float* g = <const float*>segment.gradient + at
    if segment.storage != FLOAT32:
        decode(pipeline.stages, segment.gradient, segment.storage, at, out, n)
        g = out
    if clips:
        pipeline.stages.clip(g, out, n, pipeline.grad_scale, pipeline.clip_coefficient, pipeline.clip_value)
        g = out
    return g


cdef void run_surrounded_tile(
    const Segment* segment, Py_ssize_t at, Py_ssize_t n, const Pipeline* pipeline
) noexcept nogil:
    """Every stage that is on, over elements [at, at + n)."""
    cdef float gradient[TILE_ELEMENTS]
    cdef float parameters[TILE_ELEMENTS]
    cdef const tile_stages* stages = pipeline.stages
    cdef float* p = NULL
    if segment.tile != NULL:
        p = joined(segment, at, n, stages, parameters)
        if pipeline.phase == FINISH and pipeline.trust == TRUST_UPDATE:
            stages.apply(p, segment.update + at, n, segment.size)
        else:
            segment.tile(
                p, clipped_gradient(segment, at, n, pipeline, pipeline.clips, gradient), segment.states,
                segment.scales, at, n, segment.scalars, &segment.context
            )
        if segment.p == NULL:
            stages.split(p, segment.high + at, segment.low + at, n)
    if segment.tile != NULL and segment.ema != NULL:
        stages.average(p, segment.ema + at, n, segment.ema_decay, segment.ema_weight)
    if segment.tile != NULL and segment.copy != NULL:
        if pipeline.copy_storage == BFLOAT16:
            stages.encode_bfloat16(p, segment.copy + at, n)
        else:
            stages.encode_float16(p, segment.copy + at, n)
    if pipeline.zeroes:
        memset(segment.gradient + at * item_size(segment.storage), 0, n * item_size(segment.storage))


cdef void accumulate_tile(
    const Segment* segment, Py_ssize_t at, Py_ssize_t n, const Pipeline* pipeline
) noexcept nogil:
    """Add gradients [at, at + n) to their sums."""
    cdef float gradient[TILE_ELEMENTS]
    cdef const float* g = clipped_gradient(segment, at, n, pipeline, False, gradient)
    pipeline.stages.accumulate(g, segment.p + at, n)


cdef void measure_block(const Segment* segment, Py_ssize_t block, const Pipeline* pipeline) noexcept nogil:
    """First pass of a trust ratio over one block: states and update if that is scaled, and the norms' sums."""
    cdef float gradient[TILE_ELEMENTS]
    cdef float parameters[TILE_ELEMENTS]
    cdef double p_lanes[LANES]
    cdef double other_lanes[LANES]
    cdef const tile_stages* stages = pipeline.stages
    cdef Py_ssize_t at = block * NORM_BLOCK
    cdef Py_ssize_t end = min(at + NORM_BLOCK, segment.n)
    cdef Py_ssize_t n
    cdef float* p
    cdef const float* g
    memset(p_lanes, 0, sizeof(p_lanes))
    memset(other_lanes, 0, sizeof(other_lanes))
    while at < end:
        n = min(end - at, <Py_ssize_t>TILE_ELEMENTS)
        p = joined(segment, at, n, stages, parameters)
        g = clipped_gradient(
            segment, at, n, pipeline, pipeline.clips or pipeline.trust == TRUST_GRADIENT, gradient
        )
        stages.sum_squares(p, n, 1.0, at % LANES, p_lanes)
        if pipeline.trust == TRUST_UPDATE:
            segment.tile(p, g, segment.states, segment.scales, at, n, segment.scalars, &segment.context)
            stages.sum_squares(segment.update + at, n, 1.0, at % LANES, other_lanes)
        else:
            stages.sum_squares(g, n, 1.0, at % LANES, other_lanes)
        at += n
    pipeline.norms[2 * (segment.first_block + block)] = fold(p_lanes)
    pipeline.norms[2 * (segment.first_block + block) + 1] = fold(other_lanes)


cdef double fold(double* lanes) noexcept nogil:
    """Sum of the lanes, as a fixed tree."""
    cdef int width = LANES // 2
    cdef int k
    while width:
        for k in range(width):
            lanes[k] += lanes[k + width]
        width //= 2
    return lanes[0]


cdef double sum_of_blocks(const double* sums, Py_ssize_t n_blocks, Py_ssize_t stride) noexcept nogil:
    """Sum over blocks, every `stride`-th number: block b in lane b % LANES, so that a GPU's warp does the same."""
    cdef double lanes[LANES]
    cdef Py_ssize_t block
    memset(lanes, 0, sizeof(lanes))
    for block in range(n_blocks):
        lanes[block % LANES] += sums[block * stride]
    return fold(lanes)


cdef struct Position:
    Py_ssize_t segment
    Py_ssize_t element


cdef inline uint64_t dither_key(uint64_t seed, int64_t step) noexcept nogil:
    """What the rounding of one step draws its bits from: two rounds of SplitMix64's finalizer."""
    cdef uint64_t x = seed
    cdef int k
    for k in range(2):
        x += <uint64_t>0x9E3779B97F4A7C15
        x = (x ^ (x >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * <uint64_t>0x94D049BB133111EB
        x ^= x >> 31
        if k == 0:
            x ^= <uint64_t>step
    return x


cdef inline double warmed_up(double decay, double step) noexcept nogil:
    """The average's decay in step number `step` (1 is the first): its first steps forget the initial weights."""
    cdef double ramp = (1.0 + step) / (10.0 + step)
    return ramp if ramp < decay else decay


cdef inline void put(Segment* at, const Segment* made) noexcept nogil:
    """Write a segment unless it is there already: lines that nobody writes stay in every core's cache."""
    if memcmp(at, made, sizeof(Segment)) != 0:
        at[0] = made[0]


cdef Position share_start(
    const Segment* segments, Py_ssize_t n_segments, Py_ssize_t total, Py_ssize_t part, int thread, int n_threads
) noexcept nogil:
    """Where the share of `thread` starts, and that of the thread before ends: a part's start, or the end."""
    cdef Position at
    cdef Py_ssize_t weight = total + n_segments * SEGMENT_WEIGHT
    cdef Py_ssize_t left = weight // n_threads * thread + weight % n_threads * thread // n_threads
    at.segment = 0
    at.element = 0
    if thread == 0:
        return at
    if thread == n_threads:
        at.segment = n_segments
        return at
    while at.segment < n_segments and left >= segments[at.segment].n + SEGMENT_WEIGHT:
        left -= segments[at.segment].n + SEGMENT_WEIGHT
        at.segment += 1
    if at.segment < n_segments:
        at.element = min(left // part * part, segments[at.segment].n)
    return at


cdef void run_share(
    const Segment* segments,
    Py_ssize_t n_segments,
    Py_ssize_t total,
    const Pipeline* pipeline,
    int thread,
    int n_threads,
) noexcept nogil:
    """Update the elements that belong to `thread`."""
    cdef Py_ssize_t part = NORM_BLOCK if pipeline.phase == MEASURE else TILE_ELEMENTS
    cdef Position first = share_start(segments, n_segments, total, part, thread, n_threads)
    cdef Position end = share_start(segments, n_segments, total, part, thread + 1, n_threads)
    cdef Py_ssize_t k = first.segment
    cdef Py_ssize_t at = first.element
    cdef Py_ssize_t stop
    cdef control_word caller = enter_kernels()
    while k < n_segments and k <= end.segment:
        stop = segments[k].n if k < end.segment else end.element
        if pipeline.phase == MEASURE:
            while at < stop:
                measure_block(&segments[k], at // NORM_BLOCK, pipeline)
                at += NORM_BLOCK
        elif is_bare(&segments[k], pipeline):
            while at < stop:
                segments[k].tile(
                    segments[k].p + at, <const float*>segments[k].gradient + at, segments[k].states,
                    segments[k].scales, at, min(<Py_ssize_t>TILE_ELEMENTS, stop - at), segments[k].scalars,
                    &segments[k].context
                )
                at += TILE_ELEMENTS
        elif pipeline.phase == ACCUMULATE:
            while at < stop:
                accumulate_tile(&segments[k], at, min(<Py_ssize_t>TILE_ELEMENTS, stop - at), pipeline)
                at += TILE_ELEMENTS
        else:
            while at < stop:
                run_surrounded_tile(&segments[k], at, min(<Py_ssize_t>TILE_ELEMENTS, stop - at), pipeline)
                at += TILE_ELEMENTS
        at = 0
        k += 1
    leave_kernels(caller)


cdef int team_for(Py_ssize_t total, Py_ssize_t n_parts, int n_threads) noexcept nogil:
    """Threads to share out `total` elements in `n_parts` parts over, at most `n_threads`."""
    if total < serial_below or forked:
        return 1
    return affordable_team(<int>min(<Py_ssize_t>n_threads, n_parts))


cdef void run(
    const Segment* segments, Py_ssize_t n_segments, Py_ssize_t total, const Pipeline* pipeline, int n_threads
) noexcept nogil:
    """Update every element of `segments`, `total` of them, on at most `n_threads` threads."""
    cdef int team = team_for(total, total // TILE_ELEMENTS + n_segments, n_threads)
    if team <= 1:
        run_share(segments, n_segments, total, pipeline, 0, 1)
    else:
        with nogil, parallel(num_threads=team):
            run_share(segments, n_segments, total, pipeline, threadid(), team_size())


cdef void run_trusted(
    Segment* segments, Py_ssize_t n_segments, Py_ssize_t total, Pipeline* pipeline, int n_threads
) noexcept nogil:
    """The same for an optimizer with a trust ratio: norms of every segment (a tensor each), ratios, the rest."""
    cdef Py_ssize_t k, n_blocks
    cdef double p_sum, other_sum, ratio
    cdef const double* norms
    cdef float* scalars
    pipeline.phase = MEASURE
    run(segments, n_segments, total, pipeline, n_threads)
    for k in range(n_segments):
        n_blocks = (segments[k].n + NORM_BLOCK - 1) // NORM_BLOCK
        norms = pipeline.norms + 2 * segments[k].first_block
        p_sum = sum_of_blocks(norms, n_blocks, 2)
        other_sum = sum_of_blocks(norms + 1, n_blocks, 2)
        ratio = segments[k].kernel.trust(segments[k].hyper, sqrt(p_sum), sqrt(other_sum))
        if pipeline.trust == TRUST_UPDATE:
            segments[k].size = float32_at_most(segments[k].hyper[LR] * ratio)
        else:
            scalars = <float*>segments[k].scalars
            scalars[TRUST] = float32_at_most(ratio)
    pipeline.phase = FINISH
    run(segments, n_segments, total, pipeline, n_threads)
    pipeline.phase = WHOLE


cdef inline float float32_at_most(double x) noexcept nogil:
    """Round to float32, an overflow to the largest."""
    return 3.4028234663852886e38 if x > 3.4028234663852886e38 else <float>x


# --- Norms ------------------------------------------------------------------------------------------------
#
# The sum of squares of an index space has the same bits whatever the threads, the vector width and the split
# into tensors: element i goes to lane i % LANES of block i // NORM_BLOCK, in float64 and in order; lanes are added
# up as a fixed tree, and so are blocks, block b in lane b % LANES.

cdef struct Piece:
    const char* data
    int storage
    Py_ssize_t start  # in the index space
    Py_ssize_t n


cdef double sum_block(
    const Piece* pieces, Py_ssize_t n_pieces, Py_ssize_t block, float scale, const tile_stages* stages
) noexcept nogil:
    """Sum of squares of (scale * x) over one block."""
    cdef double lanes[LANES]
    cdef float decoded[TILE_ELEMENTS]
    cdef Py_ssize_t at = block * NORM_BLOCK
    cdef Py_ssize_t end = at + NORM_BLOCK
    cdef Py_ssize_t low = 0
    cdef Py_ssize_t high = n_pieces
    cdef Py_ssize_t middle, n, inside
    memset(lanes, 0, sizeof(lanes))
    while low < high:  # the first piece that ends after `at`
        middle = (low + high) // 2
        if pieces[middle].start + pieces[middle].n <= at:
            low = middle + 1
        else:
            high = middle
    while low < n_pieces and at < end:
        inside = at - pieces[low].start
        n = min(pieces[low].n - inside, end - at)
        if pieces[low].storage == FLOAT32:
            stages.sum_squares(<const float*>pieces[low].data + inside, n, scale, at % LANES, lanes)
        else:
            n = min(n, <Py_ssize_t>TILE_ELEMENTS)
            decode(stages, pieces[low].data, pieces[low].storage, inside, decoded, n)
            stages.sum_squares(decoded, n, scale, at % LANES, lanes)
        at += n
        if inside + n == pieces[low].n:
            low += 1
    return fold(lanes)


cdef void sum_share(
    const Piece* pieces,
    Py_ssize_t n_pieces,
    Py_ssize_t n_blocks,
    float scale,
    const tile_stages* stages,
    double* sums,
    int thread,
    int n_threads,
) noexcept nogil:
    cdef Py_ssize_t block
    cdef control_word caller = enter_kernels()
    for block in range(n_blocks * thread // n_threads, n_blocks * (thread + 1) // n_threads):
        sums[block] = sum_block(pieces, n_pieces, block, scale, stages)
    leave_kernels(caller)


cdef double sum_squares(
    const Piece* pieces,
    Py_ssize_t n_pieces,
    Py_ssize_t total,
    float scale,
    const tile_stages* stages,
    double* sums,
    int n_threads,
) noexcept nogil:
    """Sum of squares of (scale * x) over `total` elements; `sums` has room for a number per block."""
    cdef Py_ssize_t n_blocks = (total + NORM_BLOCK - 1) // NORM_BLOCK
    cdef int team = team_for(total, n_blocks, n_threads)
    if team <= 1:
        sum_share(pieces, n_pieces, n_blocks, scale, stages, sums, 0, 1)
    else:
        with nogil, parallel(num_threads=team):
            sum_share(pieces, n_pieces, n_blocks, scale, stages, sums, threadid(), team_size())
    return sum_of_blocks(sums, n_blocks, 1)


# --- The plan ---------------------------------------------------------------------------------------------

cdef struct Planned:
    # A tensor as the step sees it.
    void* data                   # of the parameter, or of its upper half
    int type_number              # NumPy's, of the parameter
    uint16_t* low                # its lower half where parameters are split
    char* states[MAX_STATES]     # in the order of the optimizer's states; NULL where it keeps none
    uint16_t* scales[MAX_STATES]
    Py_ssize_t n
    int64_t index                # of its first element among all of the optimizer's
    int n_dims
    # A copy: the array's own lies beside its data, in a cache line that another thread writes at every step.
    const cnp.npy_intp* shape
    int group
    int64_t* step
    double* running
    float* ema
    uint16_t* copy
    float* update
    float* sums                   # of gradients; NULL before any were accumulated
    bint has_sums                 # whether a gradient was added to them since the last step
    const void* checked_gradient  # data of the last gradient that was found not to overlap anything written
    int checked_storage


cdef struct Group:
    const kernel* kernel
    int n_states
    int states[MAX_STATES]  # positions in Tensor.states of the states that the kernel uses
    double hyper[MAX_HYPERS]


cdef struct Active:
    Py_ssize_t tensor
    double running[MAX_RUNNING]  # after the step
    char* gradient
    int storage
    PyObject* array  # the gradient; held by the plan for the length of the step


cdef inline bint follows(const Segment* before, const Segment* after, int state_size) noexcept nogil:
    """Whether every array of `after` continues that of `before` in memory; `state_size` is in bytes an element."""
    cdef int k
    if state_size == 1 and before.n % CODE_BLOCK != 0:
        return False
    for k in range(after.n_states):
        if <char*>before.states[k] + before.n * state_size != <char*>after.states[k]:
            return False
        if after.scales[k] != NULL and before.scales[k] + before.n // CODE_BLOCK != after.scales[k]:
            return False
    if after.p != NULL:
        if before.p + before.n != after.p:
            return False
    elif before.high + before.n != after.high or before.low + before.n != after.low:
        return False
    if state_size != 4 and before.context.index + before.n != after.context.index:
        return False
    if before.storage != after.storage or before.gradient + before.n * item_size(before.storage) != after.gradient:
        return False
    if after.ema != NULL and before.ema + before.n != after.ema:
        return False
    return after.copy == NULL or before.copy + before.n == after.copy


cdef enum:
    SINGLE, SEQUENCE, MAPPING


cdef inline bint is_gradient_for(object gradient, const Planned* t, int type_number):
    """Whether `gradient` is a C-contiguous array of this NumPy type and of the shape of `t`."""
    cdef int k
    if not cnp.PyArray_CheckExact(gradient):
        return False
    cdef cnp.ndarray g = <cnp.ndarray>gradient
    if cnp.PyArray_TYPE(g) != type_number or not cnp.PyArray_ISCARRAY_RO(g):
        return False
    if cnp.PyArray_NDIM(g) != t.n_dims:
        return False
    for k in range(t.n_dims):
        if cnp.PyArray_DIM(g, k) != t.shape[k]:
            return False
    return True


cdef inline bint is_as_planned(cnp.ndarray p, const Planned* t):
    """Whether a parameter is where the plan has it."""
    # Not the shape's numbers: they lie beside the data, which other threads write.
    return (
        cnp.PyArray_ISWRITEABLE(p)
        and cnp.PyArray_DATA(p) == t.data
        and cnp.PyArray_TYPE(p) == t.type_number
        and cnp.PyArray_NDIM(p) == t.n_dims
    )


cdef class Plan:
    """The prebuilt step of one optimizer.

    Parameters
    ----------
    optimizer
        What the plan reads: `_tensors` (a list of `Tensor`), `_groups` (a tuple of the dicts in the live list
        `param_groups`), `_guard`, `_ranges` (the memory that a step writes), `_structure`, and `_read_group(k)`, which
        validates the hyperparameters of group k and returns the kernel's name and its float64 hyperparameters.
    kernels : dict or None
        A kernel module's KERNELS; None when another backend computes and only `gather` is wanted.
    stages : capsule or None
        That module's STAGES.
    """

    cdef object optimizer_reference  # weak: in a cycle, large states would wait for the garbage collector
    cdef dict kernels
    cdef list arrays
    cdef Ranges ranges
    cdef Guard guard
    cdef Planned* tensors
    cdef cnp.npy_intp* shapes
    cdef Py_ssize_t n_tensors
    cdef Group* groups
    cdef Py_ssize_t n_groups
    cdef list param_groups
    cdef tuple group_dicts
    cdef list group_values
    cdef tuple hyper_names
    cdef tuple state_names
    cdef int structure
    cdef tuple names
    cdef int n_running
    cdef int n_scalars
    cdef Active* active
    cdef Py_ssize_t n_active
    cdef Segment* segments
    cdef float* scalars
    cdef list held  # the gradients, so that nobody can free them while threads read them
    cdef list sum_arrays  # of gradients, one for each tensor, or None
    cdef readonly Py_ssize_t n_accumulated
    """Calls of `accumulate` whose gradients no step has used."""
    cdef Pipeline pipeline
    cdef Piece* pieces
    cdef double* sums
    cdef double* norms
    cdef double ema_decay
    cdef bint ema_warmup
    cdef int bfloat16_type  # NumPy's number of the bfloat16 type last seen, or -1
    cdef int state_dtype     # STATES_FLOAT32, ...: which of a kernel's tile functions runs
    cdef int state_size      # bytes of an element of a state
    cdef uint64_t seed
    cdef int distance        # of prefetches
    cdef Active* zeroable   # the gradients that were last found to be disjoint
    cdef Py_ssize_t n_zeroable
    cdef public int n_threads
    """Threads at most; 0 for the process-wide number."""

    def __cinit__(self, optimizer, dict kernels, stages=None):
        cdef Py_ssize_t i, k
        cdef Planned* t
        cdef cnp.ndarray array
        cdef Tensor tensor
        cdef list tensors = optimizer._tensors
        spec = optimizer.spec
        self.optimizer_reference = weakref.ref(optimizer)
        self.kernels = kernels
        self.param_groups = optimizer.param_groups
        self.group_dicts = optimizer._groups
        self.guard = optimizer._guard
        self.hyper_names = ("params", *spec.hypers)
        self.state_names = tuple(spec.states)
        self.n_running = len(spec.running)
        self.names = optimizer._names or ()
        self.structure = {"single": SINGLE, "sequence": SEQUENCE, "mapping": MAPPING}[optimizer._structure]
        self.n_tensors = len(tensors)
        self.n_groups = len(self.group_dicts)
        self.tensors = <Planned*>calloc(self.n_tensors + 1, sizeof(Planned))
        self.groups = <Group*>calloc(self.n_groups + 1, sizeof(Group))
        self.active = <Active*>calloc(self.n_tensors + 1, sizeof(Active))
        self.segments = <Segment*>calloc(self.n_tensors + 1, sizeof(Segment))
        self.scalars = <float*>calloc((self.n_tensors + 1) * MAX_SCALARS, sizeof(float))
        self.pieces = <Piece*>calloc(self.n_tensors + 1, sizeof(Piece))
        cdef Py_ssize_t total = 0, n_dims = 0
        for tensor in tensors:
            total += tensor.size
            n_dims += len(tensor.shape)
        self.distance = FAR_DISTANCE if total >= FAR_FROM else NEAR_DISTANCE
        self.sums = <double*>calloc(total // NORM_BLOCK + 1, sizeof(double))
        if not (self.tensors and self.groups and self.active and self.segments and self.scalars):
            raise MemoryError
        self.norms = <double*>calloc(2 * (total // NORM_BLOCK + self.n_tensors + 1), sizeof(double))
        self.zeroable = <Active*>calloc(self.n_tensors + 1, sizeof(Active))
        if not (self.pieces and self.sums and self.norms and self.zeroable):
            raise MemoryError
        memset(&self.pipeline, 0, sizeof(self.pipeline))
        self.pipeline.trust = {None: NO_TRUST, "update": TRUST_UPDATE, "gradient": TRUST_GRADIENT}[spec.trust]
        self.pipeline.norms = self.norms
        if stages is not None:
            self.pipeline.stages = <const tile_stages*>PyCapsule_GetPointer(stages, "fastopt.tile_stages")
        self.ema_decay = optimizer.ema_decay or 0.0
        self.ema_warmup = optimizer.ema_warmup
        self.pipeline.copy_storage = FLOAT16 if optimizer.copy_dtype == "float16" else BFLOAT16
        self.bfloat16_type = cnp.NPY_UINT16 if optimizer.grad_dtype == "bfloat16" else -1
        self.seed = optimizer.seed
        self.state_dtype = {
            "float32": STATES_FLOAT32, "bfloat16": STATES_BFLOAT16, "8bit": STATES_8BIT
        }[optimizer.state_dtype]
        self.state_size = 4
        self.arrays = [tensor.array for tensor in tensors]
        self.ranges = optimizer._ranges
        self.shapes = <cnp.npy_intp*>calloc(n_dims + 1, sizeof(cnp.npy_intp))
        if self.shapes == NULL:
            raise MemoryError
        cdef cnp.npy_intp* shape = self.shapes
        for i in range(self.n_tensors):
            t = &self.tensors[i]
            tensor = tensors[i]
            array = tensor.array
            t.type_number = cnp.PyArray_TYPE(array)
            t.data = cnp.PyArray_DATA(array)
            t.n = tensor.size
            t.index = tensor.index
            t.n_dims = cnp.PyArray_NDIM(array)
            if cnp.PyArray_SIZE(array) != t.n or t.n_dims != len(tensor.shape):
                raise ValueError(f"{self.guard.owner}: {tensor.label} was resized")
            t.shape = shape
            for k in range(t.n_dims):
                shape[k] = cnp.PyArray_DIM(array, k)
            shape += t.n_dims
            t.group = tensor.group
            t.step = <int64_t*>data_of(tensor.step)
            t.running = <double*>data_of(tensor.running)
            t.low = <uint16_t*>data_of(tensor.low)
            t.ema = <float*>data_of(tensor.ema)
            t.copy = <uint16_t*>data_of(tensor.copy)
            t.update = <float*>data_of(tensor.update)
            for k in range(len(self.state_names)):
                kept = tensor.states.get(self.state_names[k])
                if kept is not None:
                    t.states[k] = <char*>data_of(kept)
                    self.state_size = <int>cnp.PyArray_ITEMSIZE(<cnp.ndarray>kept)
                t.scales[k] = <uint16_t*>data_of(tensor.scales.get(self.state_names[k]))
        self.group_values = [None] * self.n_groups

    def __dealloc__(self):
        free(self.tensors)
        free(self.shapes)
        free(self.groups)
        free(self.active)
        free(self.segments)
        free(self.scalars)
        free(self.pieces)
        free(self.sums)
        free(self.norms)
        free(self.zeroable)

    cdef object optimizer(self):
        return self.optimizer_reference()

    # --- 1. groups

    cdef int check_groups(self) except -1:
        """See that the kernels and hyperparameters are those that the param groups ask for now."""
        cdef Py_ssize_t k
        for k in range(self.n_groups):
            if not self.group_is_unchanged(k):
                self.read_group(k)
        if PyList_GET_SIZE(self.param_groups) != self.n_groups:  # last: reading can run code of the user's
            self.optimizer()._refuse_regrouping()
        for k in range(self.n_groups):
            if PyList_GET_ITEM(self.param_groups, k) != PyTuple_GET_ITEM(self.group_dicts, k):
                self.optimizer()._refuse_regrouping()
        return 0

    cdef bint group_is_unchanged(self, Py_ssize_t k):
        cdef object values = <object>PyList_GET_ITEM(self.group_values, k)
        cdef object group = <object>PyTuple_GET_ITEM(self.group_dicts, k)
        cdef Py_ssize_t i
        if values is None or PyDict_Size(group) != PyTuple_GET_SIZE(values):
            return False
        for i in range(PyTuple_GET_SIZE(self.hyper_names)):
            if PyDict_GetItem(group, <object>PyTuple_GET_ITEM(self.hyper_names, i)) != PyTuple_GET_ITEM(values, i):
                return False
        return True

    cdef int read_group(self, Py_ssize_t k) except -1:
        cdef Group* group = &self.groups[k]
        name, hyper = self.optimizer()._read_group(k)
        live = self.group_dicts[k]
        if self.kernels is not None:
            capsule, states, n_scalars = self.kernels[name]
            if len(hyper) > MAX_HYPERS or len(states) > MAX_STATES or self.n_running > MAX_RUNNING:
                raise OverflowError(f"{name}: more hyperparameters, states or running scalars than kernel.h allows")
            if n_scalars > MAX_SCALARS:
                raise OverflowError(f"{name}: more host scalars than kernel.h allows")
            group.kernel = <const kernel*>PyCapsule_GetPointer(capsule, "fastopt.kernel")
            group.n_states = <int>len(states)
            for i, state in enumerate(states):
                group.states[i] = self.state_names.index(state)
            for i, value in enumerate(hyper):
                group.hyper[i] = value
        # Values that no kernel reads (such as initial_lr) stand behind the others: only their number counts.
        values = [live[key] for key in self.hyper_names]
        values += [live[key] for key in live if key not in self.hyper_names]
        self.group_values[k] = tuple(values)
        return 0

    # --- 2. gather

    cdef int gather_all(self, object gradients) except -1:
        """Check every gradient and note the tensors that have one."""
        cdef Py_ssize_t i, at = 0
        cdef PyObject* key
        cdef PyObject* item
        self.n_active = 0
        if self.structure == SINGLE:
            self.held = [gradients]
        elif self.structure == MAPPING:
            if type(gradients) is not dict:
                gradients = _buffers.gradient_mapping(self.optimizer(), gradients)
            if PyDict_Size(gradients) != self.n_tensors:
                _buffers.refuse_gradient_names(self.optimizer(), gradients)
            self.held = [None] * self.n_tensors
            for i in range(self.n_tensors):
                # In the usual order of names the next entry is the one; its key need not be hashed.
                if not PyDict_Next(gradients, &at, &key, &item) or key != PyTuple_GET_ITEM(self.names, i):
                    item = PyDict_GetItem(gradients, <object>PyTuple_GET_ITEM(self.names, i))
                if item == NULL:
                    _buffers.refuse_gradient_names(self.optimizer(), gradients)
                self.held[i] = <object>item
        else:
            if type(gradients) is not list:
                gradients = _buffers.gradient_list(self.optimizer(), gradients)
            self.held = list(<list>gradients)
            if PyList_GET_SIZE(self.held) != self.n_tensors:
                _buffers.refuse_gradient_count(self.optimizer(), self.held)
        for i in range(self.n_tensors):
            self.gather_one(i, <object>PyList_GET_ITEM(self.held, i))
        return 0

    cdef int gather_any(self, object gradients) except -1:
        """Gather gradients, or the sums of those that were accumulated."""
        if gradients is ACCUMULATED:
            return self.gather_sums()
        if self.n_accumulated:
            _buffers.refuse_pending_gradients(self.optimizer(), "step(grads)")
        return self.gather_all(gradients)

    cdef int gather_one(self, Py_ssize_t i, object gradient) except -1:
        cdef Planned* t = &self.tensors[i]
        cdef cnp.ndarray p = <cnp.ndarray>PyList_GET_ITEM(self.arrays, i)
        cdef const void* data
        cdef uintptr_t end
        cdef int storage = FLOAT32
        if gradient is None:
            return 0
        if not is_gradient_for(gradient, t, cnp.NPY_FLOAT32):
            if is_gradient_for(gradient, t, cnp.NPY_FLOAT16):
                storage = FLOAT16
            elif self.bfloat16_type >= 0 and is_gradient_for(gradient, t, self.bfloat16_type):
                storage = BFLOAT16
            else:
                gradient, name = _buffers.check_gradient(self.optimizer(), i, gradient)
                storage = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}[name]
                self.held[i] = gradient
                if storage == BFLOAT16:
                    self.bfloat16_type = cnp.PyArray_TYPE(<cnp.ndarray>gradient)
        if not is_as_planned(p, t):
            _buffers.refuse_changed_parameter(self.optimizer(), i)
        data = cnp.PyArray_DATA(<cnp.ndarray>gradient)
        if data != t.checked_gradient or storage != t.checked_storage:
            end = <uintptr_t>data + <uintptr_t>(t.n * item_size(storage))
            if self.ranges.find(<uintptr_t>data, end) >= 0:
                _buffers.refuse_overlapping_gradient(self.optimizer(), i, gradient)
            t.checked_gradient = data
            t.checked_storage = storage
        if t.step[0] < 0 or t.step[0] >= MAX_STEP:
            _buffers.refuse_step(self.optimizer(), i, t.step[0])
        self.active[self.n_active].tensor = i
        self.active[self.n_active].gradient = <char*>data
        self.active[self.n_active].storage = storage
        self.active[self.n_active].array = <PyObject*>gradient
        self.n_active += 1
        return 0

    cdef int gather_sums(self) except -1:
        """Take the sums of gradients for gradients."""
        cdef Py_ssize_t i
        cdef Planned* t
        if not self.n_accumulated:
            _buffers.refuse_missing_gradients(self.optimizer())
        self.n_active = 0
        for i in range(self.n_tensors):
            t = &self.tensors[i]
            if not t.has_sums:
                continue
            if not is_as_planned(<cnp.ndarray>PyList_GET_ITEM(self.arrays, i), t):
                _buffers.refuse_changed_parameter(self.optimizer(), i)
            if t.step[0] < 0 or t.step[0] >= MAX_STEP:
                _buffers.refuse_step(self.optimizer(), i, t.step[0])
            self.active[self.n_active].tensor = i
            self.active[self.n_active].gradient = <char*>t.sums
            self.active[self.n_active].storage = FLOAT32
            self.n_active += 1
        return 0

    cdef int check_zeroable(self) except -1:
        """See that every gathered gradient can be zeroed without touching another."""
        cdef Py_ssize_t k
        cdef bint same = self.n_active == self.n_zeroable
        for k in range(self.n_active):
            if not cnp.PyArray_ISWRITEABLE(<cnp.ndarray>self.active[k].array):
                _buffers.refuse_read_only_gradient(self.optimizer(), self.active[k].tensor)
            same = (
                same
                and self.zeroable[k].gradient == self.active[k].gradient
                and self.zeroable[k].storage == self.active[k].storage
                and self.zeroable[k].tensor == self.active[k].tensor
            )
        if not same:
            gathered = self.gathered()
            overlap = Ranges([gradient for _, gradient in gathered]).first_overlap()
            if overlap is not None:
                _buffers.refuse_shared_gradients(self.optimizer(), *[gathered[k][0] for k in overlap])
            for k in range(self.n_active):
                self.zeroable[k] = self.active[k]
            self.n_zeroable = self.n_active
        return 0

    cdef list gathered(self):
        """[(index of a tensor, its gradient), ...]"""
        cdef Py_ssize_t k
        return [(self.active[k].tensor, <object>self.active[k].array) for k in range(self.n_active)]

    # --- 3. norm

    cdef double gradient_norm(self, double grad_scale, int n_threads):
        """Global L2 norm of the gathered gradients, scaled."""
        cdef Py_ssize_t k, total = 0
        cdef Active* active
        cdef Piece piece
        cdef double result
        memset(&piece, 0, sizeof(piece))
        for k in range(self.n_active):
            active = &self.active[k]
            piece.data = active.gradient
            piece.storage = active.storage
            piece.start = total
            piece.n = self.tensors[active.tensor].n
            if memcmp(&self.pieces[k], &piece, sizeof(Piece)) != 0:
                self.pieces[k] = piece
            total += piece.n
        with nogil:
            result = sum_squares(
                self.pieces, self.n_active, total, <float>grad_scale, self.pipeline.stages, self.sums, n_threads
            )
        return sqrt(result)

    # --- 4. scalars

    cdef Py_ssize_t make_segments(self, Py_ssize_t* total, float grad_scale, float clip_coefficient) except -1:
        """Compute the scalars of every gathered tensor and turn neighbours in memory into one segment.

        Scale and coefficient go into the rule's scalars, or, where gradients are clipped element by element,
        into that stage.
        """
        cdef bint clips = self.pipeline.clips
        cdef int trust = self.pipeline.trust
        cdef Py_ssize_t first_block = 0
        cdef double hyper[MAX_HYPERS]
        cdef double ema_decay = self.ema_decay
        cdef Py_ssize_t k, previous, j, at = -1, n_segments = 0
        cdef Planned* t
        cdef Planned* before
        cdef Group* group
        cdef Segment made
        cdef Segment next_one
        cdef float* scalars = NULL
        cdef bint same
        memset(&made, 0, sizeof(made))
        memset(&next_one, 0, sizeof(next_one))
        total[0] = 0
        previous = -1
        for k in range(self.n_active):
            t = &self.tensors[self.active[k].tensor]
            group = &self.groups[t.group]
            same = previous >= 0
            if same:
                before = &self.tensors[self.active[previous].tensor]
                same = before.group == t.group and before.step[0] == t.step[0]
                for j in range(self.n_running):
                    same = same and before.running[j] == t.running[j]
            if same:
                memcpy(self.active[k].running, self.active[previous].running, sizeof(self.active[k].running))
                if trust == TRUST_GRADIENT:  # every tensor has a ratio of its own in there
                    memcpy(scalars + MAX_SCALARS, scalars, MAX_SCALARS * sizeof(float))
                    at += 1
                    scalars += MAX_SCALARS
            else:
                at += 1
                scalars = self.scalars + at * MAX_SCALARS
                memcpy(self.active[k].running, t.running, self.n_running * sizeof(double))
                memcpy(hyper, group.hyper, sizeof(hyper))
                if trust == TRUST_UPDATE:
                    hyper[LR] = 1.0  # the rule gives the direction; the engine scales it
                group.kernel.scalars(hyper, <double>(t.step[0] + 1), self.active[k].running, scalars)
                for j in range(group.kernel.n_scalars):
                    if not isfinite(scalars[j]):
                        _buffers.refuse_scalars(self.optimizer(), self.active[k].tensor, t.step[0] + 1)
                if not clips:
                    scalars[GRAD_SCALE] *= grad_scale
                    scalars[CLIP_COEFFICIENT] = clip_coefficient
                if self.ema_warmup:
                    ema_decay = warmed_up(self.ema_decay, <double>(t.step[0] + 1))
            previous = k
            if t.n == 0:
                continue
            if t.low == NULL:
                next_one.p = <float*>t.data
            else:
                next_one.high = <uint16_t*>t.data
                next_one.low = t.low
            next_one.gradient = self.active[k].gradient
            next_one.storage = self.active[k].storage
            for j in range(group.n_states):
                next_one.states[j] = t.states[group.states[j]]
                next_one.scales[j] = t.scales[group.states[j]]
            next_one.states[group.n_states] = NULL
            next_one.n_states = group.n_states
            next_one.n = t.n
            next_one.context.distance = self.distance
            if self.state_dtype != STATES_FLOAT32:
                next_one.context.step = <uint32_t>(t.step[0] + 1)
                next_one.context.key = dither_key(self.seed, t.step[0] + 1)
                next_one.context.index = t.index
            next_one.ema = t.ema
            next_one.ema_decay = <float>ema_decay
            next_one.ema_weight = <float>(1.0 - ema_decay)
            next_one.copy = t.copy
            next_one.tile = group.kernel.tile[self.state_dtype]
            if trust != NO_TRUST:
                next_one.kernel = group.kernel
                next_one.hyper = group.hyper
                next_one.first_block = first_block
                next_one.update = t.update
                first_block += (t.n + NORM_BLOCK - 1) // NORM_BLOCK
                if trust == TRUST_UPDATE:
                    next_one.states[group.n_states] = t.update
            next_one.scalars = scalars
            total[0] += t.n
            same = trust == NO_TRUST and made.n > 0 and made.scalars == scalars
            if same and follows(&made, &next_one, self.state_size):
                made.n += t.n
                continue
            if made.n:
                put(&self.segments[n_segments], &made)
                n_segments += 1
            made = next_one
        if made.n:
            put(&self.segments[n_segments], &made)
            n_segments += 1
        return n_segments

    # --- 5. run

    cdef void count_steps(self) noexcept:
        cdef Py_ssize_t k
        cdef Planned* t
        for k in range(self.n_active):
            t = &self.tensors[self.active[k].tensor]
            t.step[0] += 1
            memcpy(t.running, self.active[k].running, self.n_running * sizeof(double))

    def step(self, gradients, tuple options=None):
        """Check everything, then update every tensor that has a gradient, in place.

        Parameters
        ----------
        gradients
            As for `Optimizer.step`.
        options
            None, or (grad_scale, max_norm or None, clip_value or None, skip_nonfinite, zero_grads), checked.

        Returns
        -------
        (bool, float or None) or None
            Whether the step was applied, and the gradients' norm if it was computed; None without options.
        """
        self.guard.enter("step()")
        try:
            return self.step_held(gradients, options)
        finally:
            self.guard.leave()

    cpdef object step_held(self, gradients, tuple options=None):
        """The same for a caller that has taken the optimizer's guard."""
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t n_segments
        cdef int n_threads = self.n_threads if self.n_threads else default_n_threads
        cdef control_word caller = enter_host()
        try:
            if options is not None:
                return self.step_with(gradients, options, n_threads)
            self.pipeline.clips = False
            self.pipeline.zeroes = gradients is ACCUMULATED
            self.pipeline.grad_scale = 1.0
            self.pipeline.clip_coefficient = 1.0
            self.pipeline.clip_value = INFINITY
            self.check_groups()
            self.gather_any(gradients)
            n_segments = self.make_segments(&total, 1.0, 1.0)
            self.count_steps()
            self.run_segments(n_segments, total, True, n_threads)
            self.guard.steps += 1
        finally:
            leave_kernels(caller)
            self.held = None

    cdef object step_with(self, object gradients, tuple options, int n_threads):
        cdef double grad_scale, coefficient = 1.0, norm = 0.0
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t n_segments
        cdef bint needs_norm
        grad_scale, max_norm, clip_value, skip_nonfinite, zero_grads = options
        needs_norm = max_norm is not None or skip_nonfinite
        self.pipeline.clips = clip_value is not None
        self.pipeline.zeroes = zero_grads or gradients is ACCUMULATED
        self.check_groups()
        self.gather_any(gradients)
        if zero_grads and gradients is not ACCUMULATED:
            self.check_zeroable()
        if needs_norm:
            norm = self.gradient_norm(grad_scale, n_threads)
        applied = not (skip_nonfinite and not isfinite(norm))
        if max_norm is not None and not isinf(<double>max_norm):
            coefficient = <double>max_norm / (norm + 1e-6)
            if coefficient > 1.0:  # NaN stays NaN
                coefficient = 1.0
            if 0.0 < coefficient < SMALLEST_NORMAL:  # would count as zero: let the scale, exactly, take a part of it
                coefficient *= 18446744073709551616.0
                grad_scale /= 18446744073709551616.0
        self.pipeline.grad_scale = <float>grad_scale
        self.pipeline.clip_coefficient = <float>coefficient
        self.pipeline.clip_value = <float>(<double>clip_value) if self.pipeline.clips else INFINITY
        n_segments = self.make_segments(&total, <float>grad_scale, <float>coefficient)
        if applied:
            self.count_steps()
        else:
            self.drop_rules(n_segments)
        if applied or self.pipeline.zeroes:
            self.run_segments(n_segments, total, applied, n_threads)
        self.guard.steps += 1
        return applied, norm if needs_norm else None

    cdef void drop_rules(self, Py_ssize_t n_segments) noexcept:
        """Leave nothing of the segments but the zeroing of gradients."""
        cdef Py_ssize_t k
        for k in range(n_segments):
            self.segments[k].tile = NULL

    cdef void run_segments(self, Py_ssize_t n_segments, Py_ssize_t total, bint applied, int n_threads) noexcept:
        if self.n_accumulated:
            self.forget_sums()  # zeroed in this pass
        if applied and self.pipeline.trust != NO_TRUST:
            with nogil:
                run_trusted(self.segments, n_segments, total, &self.pipeline, n_threads)
        elif total < GIL_BELOW:
            run(self.segments, n_segments, total, &self.pipeline, n_threads)
        else:
            with nogil:
                run(self.segments, n_segments, total, &self.pipeline, n_threads)

    # --- Sums of gradients

    def accumulate(self, gradients):
        """Check every gradient, then add it to its tensor's float32 sums. The caller has taken the optimizer's guard.

        Parameters
        ----------
        gradients
            As for `Optimizer.accumulate`.
        """
        cdef Py_ssize_t k, n_segments, total = 0
        cdef int n_threads = self.n_threads if self.n_threads else default_n_threads
        try:
            self.gather_all(gradients)
            if self.sum_arrays is None:
                self.make_sums()
            n_segments = self.make_sum_segments(&total)
            self.pipeline.phase = ACCUMULATE
            if total < GIL_BELOW:
                run(self.segments, n_segments, total, &self.pipeline, n_threads)
            else:
                with nogil:
                    run(self.segments, n_segments, total, &self.pipeline, n_threads)
            self.pipeline.phase = WHOLE
            for k in range(self.n_active):
                self.tensors[self.active[k].tensor].has_sums = True
            self.n_accumulated += 1
        finally:
            self.held = None

    def discard(self):
        """Drop the sums. The caller has taken the optimizer's guard."""
        self.forget_sums()
        self.sum_arrays = None

    cdef int make_sums(self) except -1:
        cdef Py_ssize_t i
        cdef list arrays = self.optimizer()._arrays.state_arrays(self.arrays)
        for i in range(self.n_tensors):
            self.tensors[i].sums = <float*>cnp.PyArray_DATA(<cnp.ndarray?>arrays[i])
        self.sum_arrays = arrays
        return 0

    cdef void forget_sums(self) noexcept:
        cdef Py_ssize_t i
        for i in range(self.n_tensors):
            self.tensors[i].has_sums = False
        self.n_accumulated = 0

    cdef Py_ssize_t make_sum_segments(self, Py_ssize_t* total) noexcept:
        """Turn gathered gradients whose sums are neighbours in memory, and themselves are, into one segment."""
        cdef Py_ssize_t k, n_segments = 0
        cdef Planned* t
        cdef Segment made
        cdef Segment next_one
        memset(&made, 0, sizeof(made))
        memset(&next_one, 0, sizeof(next_one))
        total[0] = 0
        for k in range(self.n_active):
            t = &self.tensors[self.active[k].tensor]
            if t.n == 0:
                continue
            next_one.p = t.sums
            next_one.n = t.n
            next_one.gradient = self.active[k].gradient
            next_one.storage = self.active[k].storage
            total[0] += t.n
            if made.n and follows(&made, &next_one, 4):
                made.n += t.n
                continue
            if made.n:
                put(&self.segments[n_segments], &made)
                n_segments += 1
            made = next_one
        if made.n:
            put(&self.segments[n_segments], &made)
            n_segments += 1
        return n_segments

    def gather(self, gradients, bint zero_grads=False):
        """Check everything; return [(index of a tensor, its gradient), ...]. For backends in Python."""
        self.check_groups()
        self.gather_all(gradients)
        if zero_grads:
            self.check_zeroable()
        try:
            return self.gathered()
        finally:
            self.held = None


cdef inline void* data_of(object kept):
    """Where an array of the optimizer's is, NULL for None."""
    return NULL if kept is None else cnp.PyArray_DATA(<cnp.ndarray?>kept)


def copy_array(object stages, cnp.ndarray source, cnp.ndarray out, bint as_bfloat16):
    """Round the float32 array `source` into `out`, an array of the same size with two bytes an element."""
    cdef const tile_stages* made = <const tile_stages*>PyCapsule_GetPointer(stages, "fastopt.tile_stages")
    cdef const float* values = <const float*>cnp.PyArray_DATA(source)
    cdef uint16_t* halves = <uint16_t*>cnp.PyArray_DATA(out)
    cdef control_word caller = enter_kernels()
    if as_bfloat16:
        made.encode_bfloat16(values, halves, cnp.PyArray_SIZE(source))
    else:
        made.encode_float16(values, halves, cnp.PyArray_SIZE(source))
    leave_kernels(caller)


def run_once(
    object capsule, object stages, list arrays, tuple hyper, double step, running, str trust, int n_threads
):
    """One step of one kernel over the flat streams `arrays` (p, g, states, update), all checked by the caller.

    `running` is a writable float64 array or None; it is advanced. `trust` is as in `Spec`. Returns False, with
    nothing written, when a host scalar is not a finite float32.
    """
    cdef const kernel* chosen = <const kernel*>PyCapsule_GetPointer(capsule, "fastopt.kernel")
    cdef Segment segment
    cdef Pipeline pipeline
    cdef float scalars[MAX_SCALARS]
    cdef double values[MAX_HYPERS]
    cdef double advanced[MAX_RUNNING]
    cdef cnp.ndarray array
    cdef control_word caller
    cdef Py_ssize_t k, n_running = 0
    cdef Py_ssize_t n = cnp.PyArray_SIZE(<cnp.ndarray>arrays[0])
    memset(&segment, 0, sizeof(segment))
    memset(&pipeline, 0, sizeof(pipeline))
    for k in range(len(hyper)):
        values[k] = hyper[k]
    if trust == "update":
        values[LR] = 1.0
    if running is not None:
        array = running
        n_running = cnp.PyArray_SIZE(array)
        memcpy(advanced, cnp.PyArray_DATA(array), n_running * sizeof(double))
    caller = enter_host()
    chosen.scalars(values, step, advanced, scalars)
    leave_kernels(caller)
    values[LR] = hyper[LR]
    for k in range(chosen.n_scalars):
        if not isfinite(scalars[k]):
            return False
    for k in range(2, len(arrays)):
        array = arrays[k]
        segment.states[k - 2] = cnp.PyArray_DATA(array)
    segment.n_states = <int>len(arrays) - 2
    array = arrays[0]
    segment.p = <float*>cnp.PyArray_DATA(array)
    array = arrays[1]
    segment.gradient = <char*>cnp.PyArray_DATA(array)
    segment.n = n
    segment.tile = chosen.tile[STATES_FLOAT32]
    segment.context.distance = FAR_DISTANCE if n >= FAR_FROM else NEAR_DISTANCE
    segment.scalars = scalars
    segment.kernel = chosen
    segment.hyper = values
    if trust == "update":
        segment.update = <float*>segment.states[segment.n_states - 1]
    pipeline.stages = <const tile_stages*>PyCapsule_GetPointer(stages, "fastopt.tile_stages")
    pipeline.trust = {None: NO_TRUST, "update": TRUST_UPDATE, "gradient": TRUST_GRADIENT}[trust]
    pipeline.grad_scale = 1.0
    pipeline.clip_coefficient = 1.0
    pipeline.clip_value = INFINITY
    if running is not None:
        array = running
        memcpy(cnp.PyArray_DATA(array), advanced, n_running * sizeof(double))
    if not n_threads:
        n_threads = default_n_threads
    if pipeline.trust == NO_TRUST or n == 0:
        with nogil:
            run(&segment, 1, n, &pipeline, n_threads)
        return True
    caller = enter_host()
    norms = numpy.zeros(2 * (n // NORM_BLOCK + 1))
    array = norms
    pipeline.norms = <double*>cnp.PyArray_DATA(array)
    with nogil:
        run_trusted(&segment, 1, n, &pipeline, n_threads)
    leave_kernels(caller)
    return True
