# Gradients added up over micro-batches, in float32: their memory and their segments. Part of engine.pyx.


cdef int make_sums(Plan plan) except -1:
    cdef Py_ssize_t i
    cdef list arrays = plan.optimizer()._arrays.state_arrays(plan.arrays)
    for i in range(plan.n_tensors):
        plan.tensors[i].sums = <float*>cnp.PyArray_DATA(<cnp.ndarray?>arrays[i])
    plan.sum_arrays = arrays
    return 0


cdef void forget_sums(Plan plan) noexcept:
    cdef Py_ssize_t i
    for i in range(plan.n_tensors):
        plan.tensors[i].has_sums = False
    plan.n_accumulated = 0


cdef Py_ssize_t make_sum_segments(Plan plan, Py_ssize_t* total) noexcept:
    """Turn gathered gradients whose sums are neighbours in memory, and themselves are, into one segment."""
    cdef Py_ssize_t k, n_segments = 0
    cdef Planned* t
    cdef Segment segment    # so far, with the neighbours that were joined to it
    cdef Segment following  # the next tensor's, which may be joined to it
    memset(&segment, 0, sizeof(segment))
    memset(&following, 0, sizeof(following))
    total[0] = 0
    for k in range(plan.n_active):
        t = &plan.tensors[plan.active[k].tensor]
        if t.n == 0:
            continue
        following.p = t.sums
        following.n = t.n
        following.gradient = plan.active[k].gradient
        following.storage = plan.active[k].storage
        total[0] += t.n
        if segment.n and follows(&segment, &following, &FLOAT32_STATES):
            segment.n += t.n
            continue
        if segment.n:
            store_if_changed(&plan.segments[n_segments], &segment)
            n_segments += 1
        segment = following
    if segment.n:
        store_if_changed(&plan.segments[n_segments], &segment)
        n_segments += 1
    return n_segments
