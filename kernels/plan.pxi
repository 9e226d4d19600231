# The plan: what one optimizer needs for a step, and the way of a step through the rooms. Part of engine.pyx.
# The rooms are functions of a plan, in the files that engine.pyx lists.


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


cdef struct Settings:
    # What all tensors of an optimizer have in common.
    int state_dtype  # STATES_FLOAT32, ...: which of a kernel's tile functions runs
    StateFormat format
    uint64_t seed    # of stochastic rounding
    int distance     # of prefetches, in elements


cdef inline int prefetch_distance(Py_ssize_t total) noexcept nogil:
    """How far ahead arrays of `total` elements together are fetched."""
    return FAR_DISTANCE if total >= FAR_FROM else NEAR_DISTANCE


cdef inline int trust_of(object trust):
    """What a trust ratio scales, as `Spec.trust` says it."""
    return {None: NO_TRUST, "update": TRUST_UPDATE, "gradient": TRUST_GRADIENT}[trust]


cdef struct Active:
    Py_ssize_t tensor
    double running[MAX_RUNNING]  # after the step
    char* gradient
    int storage
    PyObject* array  # the gradient; held by the plan for the length of the step


cdef enum:
    SINGLE, SEQUENCE, MAPPING


cdef inline void* data_of(object kept):
    """Where an array of the optimizer's is, NULL for None."""
    return NULL if kept is None else cnp.PyArray_DATA(<cnp.ndarray?>kept)


cdef class Plan:
    """The prebuilt step of one optimizer.

    Parameters
    ----------
    optimizer
        A `fastopt._core.record.Record`.
    kernels : dict or None
        A kernel module's KERNELS; None when another backend computes and only `gather` is wanted.
    stages : capsule or None
        That module's STAGES.
    """

    cdef object optimizer_reference  # weak: in a cycle, large states would wait for the garbage collector
    cdef object identity  # what the guard knows this plan by
    cdef list kept        # the tensors, whose memory the pointers below lead to
    cdef dict kernels
    cdef list arrays
    cdef Ranges ranges
    cdef Guard guard
    cdef object reduce_sum  # None, or turns the sum of squares of this process into that of all
    cdef Planned* tensors
    cdef cnp.npy_intp* shapes
    cdef Py_ssize_t n_tensors
    cdef Group* groups
    cdef Py_ssize_t n_groups
    cdef list param_groups
    cdef tuple group_dicts
    cdef list group_values
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
    cdef Settings settings
    cdef Active* zeroable   # the gradients that were last found to be disjoint
    cdef Py_ssize_t n_zeroable
    cdef public int n_threads
    """Threads at most; 0 for the process-wide number."""

    def __cinit__(self, optimizer, dict kernels, stages=None):
        cdef Py_ssize_t i, k
        cdef Planned* t
        cdef cnp.ndarray array
        cdef Tensor tensor
        cdef list tensors = list(optimizer._tensors)
        self.kept = tensors
        spec = optimizer.spec
        self.optimizer_reference = weakref.ref(optimizer)
        self.kernels = kernels
        self.param_groups = optimizer.param_groups
        self.group_dicts = optimizer._groups
        self.guard = optimizer._guard
        self.reduce_sum = optimizer._reduce_sum
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
        self.settings.distance = prefetch_distance(total)
        self.sums = <double*>calloc(total // NORM_BLOCK + 1, sizeof(double))
        if not (self.tensors and self.groups and self.active and self.segments and self.scalars):
            raise MemoryError
        self.norms = <double*>calloc(2 * (total // NORM_BLOCK + self.n_tensors + 1), sizeof(double))
        self.zeroable = <Active*>calloc(self.n_tensors + 1, sizeof(Active))
        if not (self.pieces and self.sums and self.norms and self.zeroable):
            raise MemoryError
        memset(&self.pipeline, 0, sizeof(self.pipeline))
        self.pipeline.trust = trust_of(spec.trust)
        self.pipeline.norms = self.norms
        if stages is not None:
            self.pipeline.stages = <const tile_stages*>PyCapsule_GetPointer(stages, "fastopt.tile_stages")
        self.ema_decay = optimizer.ema_decay or 0.0
        self.ema_warmup = optimizer.ema_warmup
        self.pipeline.copy_storage = FLOAT16 if optimizer.copy_dtype == "float16" else BFLOAT16
        self.bfloat16_type = cnp.NPY_UINT16 if optimizer.grad_dtype == "bfloat16" else -1
        self.settings.seed = optimizer.seed
        self.settings.state_dtype = _formats.STATE_DTYPES.index(optimizer.state_dtype)
        codec = _formats.common_codec(optimizer.state_dtype, [spec.kinds[name] for name in self.state_names])
        self.settings.format.size = codec.dtype.itemsize
        self.settings.format.has_scales = codec.has_scales
        self.settings.format.is_rounded = codec.is_rounded
        self.arrays = []
        self.ranges = optimizer._ranges
        self.shapes = <cnp.npy_intp*>calloc(n_dims + 1, sizeof(cnp.npy_intp))
        if self.shapes == NULL:
            raise MemoryError
        cdef cnp.npy_intp* shape = self.shapes
        for i in range(self.n_tensors):
            t = &self.tensors[i]
            tensor = tensors[i]
            array = tensor.array
            self.arrays.append(array)
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
                t.scales[k] = <uint16_t*>data_of(tensor.scales.get(self.state_names[k]))
        self.group_values = [None] * self.n_groups
        self.identity = self.guard.begin_plan()

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
        self.pipeline.phase = WHOLE  # a fork can have left another, from the middle of a step in its parent
        try:
            if options is not None:
                return self.step_with(gradients, options, n_threads)
            clip_nothing(&self.pipeline)
            self.pipeline.zeroes = gradients is ACCUMULATED
            check_groups(self)
            gather_any(self, gradients)
            n_segments = make_segments(self, &total, 1.0, 1.0)
            count_steps(self)
            run_segments(self, n_segments, total, True, n_threads)
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
        check_groups(self)
        gather_any(self, gradients)
        if zero_grads and gradients is not ACCUMULATED:
            check_zeroable(self)
        if needs_norm:
            norm = gradient_norm(self, grad_scale, n_threads)
        applied = not (skip_nonfinite and not isfinite(norm))
        if max_norm is not None and not isinf(<double>max_norm):
            clip_factors(grad_scale, clip_coefficient(norm, max_norm), &grad_scale, &coefficient)
        self.pipeline.grad_scale = <float>grad_scale
        self.pipeline.clip_coefficient = <float>coefficient
        self.pipeline.clip_value = <float>(<double>clip_value) if self.pipeline.clips else INFINITY
        n_segments = make_segments(self, &total, <float>grad_scale, <float>coefficient)
        if applied:
            count_steps(self)
        else:
            drop_rules(self, n_segments)
        if applied or self.pipeline.zeroes:
            run_segments(self, n_segments, total, applied, n_threads)
        self.guard.steps += 1
        return applied, norm if needs_norm else None

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
            gather_all(self, gradients)
            if self.sum_arrays is None:
                make_sums(self)
            n_segments = make_sum_segments(self, &total)
            self.pipeline.phase = ACCUMULATE
            run_without_gil(self.segments, n_segments, total, &self.pipeline, n_threads)
            self.pipeline.phase = WHOLE
            for k in range(self.n_active):
                self.tensors[self.active[k].tensor].has_sums = True
            self.n_accumulated += 1
        finally:
            self.held = None

    def discard(self):
        """Drop the sums. The caller has taken the optimizer's guard."""
        forget_sums(self)
        self.sum_arrays = None

    def settle(self):
        """Nothing is undecided: a step's result is known when it returns."""

    def captured(self):
        """Nothing is in a graph."""
        return []

    def gather(self, gradients, bint zero_grads=False):
        """Check everything; return [(index of a tensor, its gradient), ...]. For backends in Python."""
        try:
            check_groups(self)
            gather_all(self, gradients)
            if zero_grads:
                check_zeroable(self)
            return gathered(self)
        finally:
            self.held = None
