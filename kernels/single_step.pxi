# What runs without a plan: one step of one kernel over flat arrays (fastopt.functional), and rounding to 16 bits.
# Part of engine.pyx.


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
        values[HYPER_LR] = 1.0
    if running is not None:
        array = running
        n_running = cnp.PyArray_SIZE(array)
        memcpy(advanced, cnp.PyArray_DATA(array), n_running * sizeof(double))
    caller = enter_host()
    chosen.scalars(values, step, advanced, scalars)
    leave_kernels(caller)
    values[HYPER_LR] = hyper[HYPER_LR]
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
