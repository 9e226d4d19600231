# Segments, what surrounds the rules in a step, and the stages that run over one tile. Part of engine.pyx.
# Segments are made in scalars.pxi and sums.pxi; run.pxi shares their tiles out over the threads.


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
    float* update           # what the rule would subtract at a learning rate of 1; NULL unless the ratio scales it
    Py_ssize_t first_block  # where its blocks start in Pipeline.norms
    float size              # learning rate times trust ratio: what the update is multiplied by


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


cdef inline void clip_nothing(Pipeline* pipeline) noexcept nogil:
    pipeline.clips = False
    pipeline.grad_scale = 1.0
    pipeline.clip_coefficient = 1.0
    pipeline.clip_value = INFINITY


cdef inline Py_ssize_t item_size(int storage) noexcept nogil:
    return 4 if storage == FLOAT32 else 2


cdef struct StateFormat:
    # How states are kept (a `Codec` in fastopt/_formats).
    int size        # bytes an element
    bint has_scales  # one for every CODE_BLOCK elements
    bint is_rounded  # with random bits, which depend on the element's index


cdef StateFormat FLOAT32_STATES
FLOAT32_STATES.size = 4
FLOAT32_STATES.has_scales = False
FLOAT32_STATES.is_rounded = False


cdef inline bint follows(const Segment* before, const Segment* after, const StateFormat* format) noexcept nogil:
    """Whether every array of `after` continues that of `before` in memory."""
    cdef int k
    if format.has_scales and before.n % CODE_BLOCK != 0:
        return False
    for k in range(after.n_states):
        if <char*>before.states[k] + before.n * format.size != <char*>after.states[k]:
            return False
        if format.has_scales and before.scales[k] + before.n // CODE_BLOCK != after.scales[k]:
            return False
    if after.p != NULL:
        if before.p + before.n != after.p:
            return False
    elif before.high + before.n != after.high or before.low + before.n != after.low:
        return False
    if format.is_rounded and before.context.index + before.n != after.context.index:
        return False
    if before.storage != after.storage or before.gradient + before.n * item_size(before.storage) != after.gradient:
        return False
    if after.ema != NULL and before.ema + before.n != after.ema:
        return False
    return after.copy == NULL or before.copy + before.n == after.copy


cdef inline void store_if_changed(Segment* target, const Segment* segment) noexcept nogil:
    """Write a segment unless it is there already: lines that nobody writes stay in every core's cache."""
    if memcmp(target, segment, sizeof(Segment)) != 0:
        target[0] = segment[0]


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
