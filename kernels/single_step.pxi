# What runs without a plan: one step of one kernel over flat arrays (fastopt.functional), and rounding to 16 bits.
# Part of engine.pyx.


def run_once(
    object capsule, object stages, list arrays, tuple hyper, double step, running, str trust, int n_threads
):
    """One step of one kernel over the flat streams `arrays` (p, g, states, update), all checked by the caller.

    `running` is a writable float64 array or None; it is advanced. `trust` is as in `Spec`. Returns False, with
    nothing written, when a host scalar is not a finite float32.
    """
    cdef Planned tensor
    cdef Group group
    cdef Active active
    cdef Settings settings
    cdef Segment segment
    cdef Pipeline pipeline
    cdef float scalars[MAX_SCALARS]
    cdef int64_t before = <int64_t>step - 1
    cdef Py_ssize_t k
    cdef control_word caller
    memset(&tensor, 0, sizeof(tensor))
    memset(&group, 0, sizeof(group))
    memset(&active, 0, sizeof(active))
    memset(&settings, 0, sizeof(settings))
    memset(&segment, 0, sizeof(segment))
    memset(&pipeline, 0, sizeof(pipeline))
    pipeline.trust = trust_of(trust)
    pipeline.stages = <const tile_stages*>PyCapsule_GetPointer(stages, "fastopt.tile_stages")
    clip_nothing(&pipeline)
    tensor.data = data_of(arrays[0])
    tensor.n = cnp.PyArray_SIZE(<cnp.ndarray>arrays[0])
    tensor.step = &before
    active.gradient = <char*>data_of(arrays[1])
    group.kernel = <const kernel*>PyCapsule_GetPointer(capsule, "fastopt.kernel")
    group.n_states = <int>len(arrays) - 2
    if pipeline.trust == TRUST_UPDATE:
        tensor.update = <float*>data_of(arrays[len(arrays) - 1])
        group.n_states -= 1
    for k in range(group.n_states):
        tensor.states[k] = <char*>data_of(arrays[k + 2])
        group.states[k] = <int>k
    for k in range(len(hyper)):
        group.hyper[k] = hyper[k]
    settings.state_dtype = STATES_FLOAT32
    settings.format = FLOAT32_STATES
    settings.distance = prefetch_distance(tensor.n)
    if running is not None:
        memcpy(active.running, data_of(running), cnp.PyArray_NBYTES(<cnp.ndarray>running))
    caller = enter_host()
    try:
        if not compute_scalars(&group, pipeline.trust, step, active.running, scalars):
            return False
        describe(&segment, &tensor, &group, &active, &settings, pipeline.trust, scalars)
        if running is not None:
            memcpy(data_of(running), active.running, cnp.PyArray_NBYTES(<cnp.ndarray>running))
        if not n_threads:
            n_threads = default_n_threads
        if pipeline.trust == NO_TRUST:
            run_without_gil(&segment, 1, tensor.n, &pipeline, n_threads)
        else:
            norms = numpy.zeros(2 * (tensor.n // NORM_BLOCK + 1))
            pipeline.norms = <double*>data_of(norms)
            with nogil:
                run_trusted(&segment, 1, tensor.n, &pipeline, n_threads)
    finally:
        leave_kernels(caller)
    return True


def copy_array(object stages, cnp.ndarray source, cnp.ndarray out, bint as_bfloat16):
    """Round the float32 array `source` into `out`, an array of the same size with two bytes an element."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(out)
    if cnp.PyArray_NBYTES(source) != 4 * n or cnp.PyArray_NBYTES(out) != 2 * n:
        raise ValueError(
            f"expected {n} elements of 4 and of 2 bytes, got {cnp.PyArray_NBYTES(source)} and "
            f"{cnp.PyArray_NBYTES(out)} bytes"
        )
    cdef const tile_stages* tile = <const tile_stages*>PyCapsule_GetPointer(stages, "fastopt.tile_stages")
    cdef const float* values = <const float*>cnp.PyArray_DATA(source)
    cdef uint16_t* halves = <uint16_t*>cnp.PyArray_DATA(out)
    cdef control_word caller = enter_kernels()
    if as_bfloat16:
        tile.encode_bfloat16(values, halves, n)
    else:
        tile.encode_float16(values, halves, n)
    leave_kernels(caller)
