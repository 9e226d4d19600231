# Room 5: segments are cut into tiles and shared out over the threads; the only room that writes parameters and states.
# Part of engine.pyx.


cdef struct Position:
    Py_ssize_t segment
    Py_ssize_t element


cdef Position share_start(
    const Segment* segments, Py_ssize_t n_segments, Py_ssize_t total, Py_ssize_t part, int thread, int n_threads
) noexcept nogil:
    """The first element of the share of `thread`, where the share of the thread before it ends.

    Shares are cut at multiples of `part` elements of a segment. For thread number `n_threads`, which is one more than
    there are, it is the end of all segments.
    """
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


cdef inline void run_without_gil(
    const Segment* segments, Py_ssize_t n_segments, Py_ssize_t total, const Pipeline* pipeline, int n_threads
) noexcept:
    """The same; other Python threads may go on meanwhile, unless it is over sooner than they could."""
    if total < GIL_BELOW:
        run(segments, n_segments, total, pipeline, n_threads)
    else:
        with nogil:
            run(segments, n_segments, total, pipeline, n_threads)


cdef void run_trusted(
    Segment* segments, Py_ssize_t n_segments, Py_ssize_t total, Pipeline* pipeline, int n_threads
) noexcept nogil:
    """The same for an optimizer with a trust ratio, in two passes; every segment is one tensor.

    The first computes norms. From them comes the ratio of each tensor, which the second applies.
    """
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
            segments[k].size = float32_at_most(segments[k].hyper[HYPER_LR] * ratio)
        else:
            scalars = <float*>segments[k].scalars
            scalars[SCALAR_TRUST] = float32_at_most(ratio)
    pipeline.phase = FINISH
    run(segments, n_segments, total, pipeline, n_threads)
    pipeline.phase = WHOLE


cdef inline float float32_at_most(double x) noexcept nogil:
    """Round to float32, an overflow to the largest."""
    return 3.4028234663852886e38 if x > 3.4028234663852886e38 else <float>x


cdef void count_steps(Plan plan) noexcept:
    cdef Py_ssize_t k
    cdef Planned* t
    for k in range(plan.n_active):
        t = &plan.tensors[plan.active[k].tensor]
        t.step[0] += 1
        memcpy(t.running, plan.active[k].running, plan.n_running * sizeof(double))


cdef void drop_rules(Plan plan, Py_ssize_t n_segments) noexcept:
    """Make the pass over the segments of a skipped step zero gradients and change nothing else."""
    cdef Py_ssize_t k
    for k in range(n_segments):
        plan.segments[k].tile = NULL


cdef void run_segments(Plan plan, Py_ssize_t n_segments, Py_ssize_t total, bint applied, int n_threads) noexcept:
    if plan.n_accumulated:
        forget_sums(plan)  # zeroed in this pass
    if applied and plan.pipeline.trust != NO_TRUST:
        with nogil:
            run_trusted(plan.segments, n_segments, total, &plan.pipeline, n_threads)
    else:
        run_without_gil(plan.segments, n_segments, total, &plan.pipeline, n_threads)
