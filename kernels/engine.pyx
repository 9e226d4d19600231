# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The step: from gradients and param groups to tiles, on however many threads.

A `Plan` is what one optimizer needs for a step, prebuilt: pointers, lengths, step counts and the last seen
hyperparameters. `Plan.step` goes through four rooms, and writes only in the last:

1. groups     hyperparameters are compared with those last seen, by identity; what changed is validated
2. gather     every gradient is checked and becomes a segment: pointers, length, scalars
3. scalars    host scalars of every (group, step count)
4. run        segments are cut into tiles and shared out over the threads

What is refused is explained by Python code (`fastopt._buffers`); here it is only noticed. Compiled for the
baseline instruction set alone; the kernels come in as function pointers.
"""

from cpython.dict cimport PyDict_GetItem, PyDict_Size
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from cython.parallel cimport parallel, threadid
from libc.math cimport isfinite
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free, qsort
from libc.string cimport memcmp, memcpy, memset

cimport numpy as cnp

from fastopt import _buffers

cnp.import_array()

cdef extern from "kernel.h":
    enum: MAX_STREAMS
    enum: MAX_SCALARS
    enum: MAX_HYPERS
    enum: MAX_RUNNING
    ctypedef void (*tile_function)(float* const*, Py_ssize_t, Py_ssize_t, const float*) noexcept nogil
    ctypedef void (*scalars_function)(const double*, double, double*, float*) noexcept nogil
    ctypedef struct kernel:
        tile_function tile
        scalars_function scalars
        int n_scalars

cdef extern from "control_word.h":
    ctypedef unsigned int control_word
    control_word enter_kernels() noexcept nogil
    void leave_kernels(control_word) noexcept nogil
    control_word read_control_word() noexcept nogil

cdef extern from "team.h":
    enum: HAVE_OPENMP
    int team_size() noexcept nogil

cdef extern from "cpu_features.h":
    int x86_64_level() noexcept nogil

TILE = 2048
"""Elements of one call of a kernel. Threads own whole tiles of a tensor."""

cdef enum:
    TILE_ELEMENTS = 2048
    SEGMENT_WEIGHT = 64  # what starting a segment costs, in elements; balances many small tensors
    GIL_BELOW = 16384    # elements for which releasing the GIL costs more than it gives

OPENMP = bool(HAVE_OPENMP)

cdef Py_ssize_t serial_below = 32768
cdef int default_n_threads = 1
cdef bint forked = False


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
    global forked
    forked = True


def cpu_level():
    """The x86-64 level of this processor: 1 (baseline), 3 or 4."""
    return x86_64_level()


def control_word_now():
    """The calling thread's floating-point control word, exception flags included."""
    return read_control_word()


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
    """Sorted memory ranges of arrays, empty ones left out: finds overlaps in O(log n)."""

    cdef Range* ranges
    cdef Py_ssize_t n

    def __cinit__(self, list arrays):
        cdef Py_ssize_t i
        cdef cnp.ndarray array
        self.ranges = <Range*>calloc(len(arrays) + 1, sizeof(Range))
        if self.ranges == NULL:
            raise MemoryError
        for i in range(len(arrays)):
            array = arrays[i]
            if cnp.PyArray_SIZE(array):
                self.ranges[self.n].first = <uintptr_t>cnp.PyArray_DATA(array)
                self.ranges[self.n].end = self.ranges[self.n].first + <uintptr_t>cnp.PyArray_NBYTES(array)
                self.ranges[self.n].owner = i
                self.n += 1
        qsort(self.ranges, self.n, sizeof(Range), compare_ranges)

    def __dealloc__(self):
        free(self.ranges)

    def first_overlap(self):
        """Positions of two arrays that overlap each other, or None."""
        cdef Py_ssize_t k
        for k in range(1, self.n):
            if self.ranges[k].first < self.ranges[k - 1].end:
                return tuple(sorted((self.ranges[k - 1].owner, self.ranges[k].owner)))
        return None

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
    float* streams[MAX_STREAMS]
    Py_ssize_t n
    tile_function tile
    const float* scalars


cdef struct Position:
    Py_ssize_t segment
    Py_ssize_t element


cdef inline void put(Segment* at, const Segment* made) noexcept nogil:
    """Write a segment unless it is there already: lines that nobody writes stay in every core's cache."""
    if memcmp(at, made, sizeof(Segment)) != 0:
        at[0] = made[0]


cdef Position share_start(
    const Segment* segments, Py_ssize_t n_segments, Py_ssize_t total, int thread, int n_threads
) noexcept nogil:
    """Where the share of `thread` starts, and that of the thread before ends: a tile's start, or the end."""
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
        at.element = min(left // TILE_ELEMENTS * TILE_ELEMENTS, segments[at.segment].n)
    return at


cdef void run_share(
    const Segment* segments, Py_ssize_t n_segments, Py_ssize_t total, int thread, int n_threads
) noexcept nogil:
    """Update the elements that belong to `thread`."""
    cdef Position first = share_start(segments, n_segments, total, thread, n_threads)
    cdef Position end = share_start(segments, n_segments, total, thread + 1, n_threads)
    cdef Py_ssize_t k = first.segment
    cdef Py_ssize_t at = first.element
    cdef Py_ssize_t stop
    cdef control_word caller = enter_kernels()
    while k < n_segments and k <= end.segment:
        stop = segments[k].n if k < end.segment else end.element
        while at < stop:
            segments[k].tile(segments[k].streams, at, min(<Py_ssize_t>TILE_ELEMENTS, stop - at), segments[k].scalars)
            at += TILE_ELEMENTS
        at = 0
        k += 1
    leave_kernels(caller)


cdef void run_parallel(
    const Segment* segments, Py_ssize_t n_segments, Py_ssize_t total, int n_threads
) noexcept nogil:
    with nogil, parallel(num_threads=n_threads):
        run_share(segments, n_segments, total, threadid(), team_size())


cdef void run(const Segment* segments, Py_ssize_t n_segments, Py_ssize_t total, int n_threads) noexcept:
    """Update every element of `segments`, `total` of them, on at most `n_threads` threads."""
    cdef Py_ssize_t n_tiles = total // TILE_ELEMENTS + n_segments
    if n_threads > n_tiles:
        n_threads = <int>n_tiles
    if total < serial_below or forked:
        n_threads = 1
    if n_threads > 1:
        with nogil:
            run_parallel(segments, n_segments, total, n_threads)
    elif total < GIL_BELOW:
        run_share(segments, n_segments, total, 0, 1)
    else:
        with nogil:
            run_share(segments, n_segments, total, 0, 1)


# --- The plan ---------------------------------------------------------------------------------------------

cdef struct Tensor:
    float* p
    float* states[MAX_STREAMS]  # in the order of the optimizer's states; NULL where it keeps none
    Py_ssize_t n
    int n_dims
    # A copy: the array's own lies beside its data, in a cache line that another thread writes at every step.
    const cnp.npy_intp* shape
    int group
    int64_t* step
    double* running
    const void* checked_gradient  # data of the last gradient that was found not to overlap anything written


cdef struct Group:
    const kernel* kernel
    int n_states
    int states[MAX_STREAMS]  # positions in Tensor.states of the states that the kernel uses
    double hyper[MAX_HYPERS]


cdef struct Active:
    Py_ssize_t tensor
    double running[MAX_RUNNING]  # after the step
    float* g


cdef enum:
    SINGLE, SEQUENCE, MAPPING


cdef inline bint is_gradient_for(object gradient, const Tensor* t):
    """Whether `gradient` is, at first sight, a C-contiguous float32 array of the shape of `t`."""
    cdef int k
    if not cnp.PyArray_CheckExact(gradient):
        return False
    cdef cnp.ndarray g = <cnp.ndarray>gradient
    if cnp.PyArray_TYPE(g) != cnp.NPY_FLOAT32 or not cnp.PyArray_ISCARRAY_RO(g):
        return False
    if cnp.PyArray_NDIM(g) != t.n_dims:
        return False
    for k in range(t.n_dims):
        if cnp.PyArray_DIM(g, k) != t.shape[k]:
            return False
    return True


cdef class Plan:
    """The prebuilt step of one optimizer.

    Parameters
    ----------
    optimizer
        What the plan reads: `_tensors` (objects with array, label, group, states, step, running), the live
        list `param_groups`, `_structure`, and `_read_group(k)`, which validates the hyperparameters of group
        k and returns the kernel's name and its float64 hyperparameters.
    kernels : dict or None
        A kernel module's KERNELS; None when another backend computes and only `gather` is wanted.
    """

    cdef object optimizer
    cdef dict kernels
    cdef list arrays
    cdef list written
    cdef Ranges ranges
    cdef Tensor* tensors
    cdef cnp.npy_intp* shapes
    cdef Py_ssize_t n_tensors
    cdef Group* groups
    cdef Py_ssize_t n_groups
    cdef list param_groups
    cdef list group_dicts
    cdef list group_values
    cdef tuple hyper_names
    cdef tuple state_names
    cdef int structure
    cdef tuple names
    cdef int n_running
    cdef int n_scalars
    cdef bint busy
    cdef Active* active
    cdef Py_ssize_t n_active
    cdef Segment* segments
    cdef float* scalars
    cdef list gathered
    cdef public int n_threads
    """Threads at most; 0 for the process-wide number."""

    def __cinit__(self, optimizer, dict kernels):
        cdef Py_ssize_t i, k
        cdef Tensor* t
        cdef cnp.ndarray array
        tensors = optimizer._tensors
        spec = optimizer.spec
        self.optimizer = optimizer
        self.kernels = kernels
        self.param_groups = optimizer.param_groups
        self.group_dicts = list(self.param_groups)
        self.hyper_names = ("params", *spec.hypers)
        self.state_names = tuple(spec.states)
        self.n_running = len(spec.running)
        self.names = optimizer._names or ()
        self.structure = {"single": SINGLE, "sequence": SEQUENCE, "mapping": MAPPING}[optimizer._structure]
        self.n_tensors = len(tensors)
        self.n_groups = len(self.param_groups)
        self.tensors = <Tensor*>calloc(self.n_tensors + 1, sizeof(Tensor))
        self.groups = <Group*>calloc(self.n_groups + 1, sizeof(Group))
        self.active = <Active*>calloc(self.n_tensors + 1, sizeof(Active))
        self.segments = <Segment*>calloc(self.n_tensors + 1, sizeof(Segment))
        self.scalars = <float*>calloc((self.n_tensors + 1) * MAX_SCALARS, sizeof(float))
        if not (self.tensors and self.groups and self.active and self.segments and self.scalars):
            raise MemoryError
        self.arrays = [tensor.array for tensor in tensors]
        self.shapes = <cnp.npy_intp*>calloc(sum([array.ndim for array in self.arrays]) + 1, sizeof(cnp.npy_intp))
        if self.shapes == NULL:
            raise MemoryError
        cdef cnp.npy_intp* shape = self.shapes
        self.written = []
        for i in range(self.n_tensors):
            t = &self.tensors[i]
            tensor = tensors[i]
            array = tensor.array
            t.p = <float*>cnp.PyArray_DATA(array)
            t.n = cnp.PyArray_SIZE(array)
            t.n_dims = cnp.PyArray_NDIM(array)
            t.shape = shape
            for k in range(t.n_dims):
                shape[k] = cnp.PyArray_DIM(array, k)
            shape += t.n_dims
            t.group = tensor.group
            array = tensor.step
            t.step = <int64_t*>cnp.PyArray_DATA(array)
            array = tensor.running
            t.running = <double*>cnp.PyArray_DATA(array)
            self.written.append((tensor.array, tensor.label))
            for k in range(len(self.state_names)):
                if self.state_names[k] in tensor.states:
                    array = tensor.states[self.state_names[k]]
                    t.states[k] = <float*>cnp.PyArray_DATA(array)
                    self.written.append((array, f"state {self.state_names[k]!r} of {tensor.label}"))
        self.ranges = Ranges([array for array, _ in self.written])
        self.group_values = [None] * self.n_groups

    def __dealloc__(self):
        free(self.tensors)
        free(self.shapes)
        free(self.groups)
        free(self.active)
        free(self.segments)
        free(self.scalars)

    # --- 1. groups

    cdef int check_groups(self) except -1:
        """See that the kernels and hyperparameters are those that the param groups ask for now."""
        cdef Py_ssize_t k
        if PyList_GET_SIZE(self.param_groups) != self.n_groups:
            self.optimizer._refuse_regrouping()
        for k in range(self.n_groups):
            if PyList_GET_ITEM(self.param_groups, k) != PyList_GET_ITEM(self.group_dicts, k):
                self.optimizer._refuse_regrouping()
            if not self.group_is_unchanged(k):
                self.read_group(k)
        return 0

    cdef bint group_is_unchanged(self, Py_ssize_t k):
        cdef object values = <object>PyList_GET_ITEM(self.group_values, k)
        cdef object group = <object>PyList_GET_ITEM(self.group_dicts, k)
        cdef Py_ssize_t i
        if values is None or PyDict_Size(group) != PyTuple_GET_SIZE(values):
            return False
        for i in range(PyTuple_GET_SIZE(self.hyper_names)):
            if PyDict_GetItem(group, <object>PyTuple_GET_ITEM(self.hyper_names, i)) != PyTuple_GET_ITEM(values, i):
                return False
        return True

    cdef int read_group(self, Py_ssize_t k) except -1:
        cdef Group* group = &self.groups[k]
        name, hyper = self.optimizer._read_group(k)
        live = self.group_dicts[k]
        if self.kernels is not None:
            capsule, states, n_scalars = self.kernels[name]
            if len(hyper) > MAX_HYPERS or len(states) + 2 > MAX_STREAMS or self.n_running > MAX_RUNNING:
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
        cdef Py_ssize_t i
        cdef PyObject* item
        self.n_active = 0
        self.gathered = []
        if self.structure == SINGLE:
            self.gather_one(0, gradients)
        elif self.structure == MAPPING:
            if type(gradients) is not dict:
                gradients = _buffers.gradient_mapping(self.optimizer, gradients)
            if PyDict_Size(gradients) != self.n_tensors:
                _buffers.refuse_gradient_names(self.optimizer, gradients)
            for i in range(self.n_tensors):
                item = PyDict_GetItem(gradients, <object>PyTuple_GET_ITEM(self.names, i))
                if item == NULL:
                    _buffers.refuse_gradient_names(self.optimizer, gradients)
                self.gather_one(i, <object>item)
        else:
            if type(gradients) is not list:
                gradients = _buffers.gradient_list(self.optimizer, gradients)
            if PyList_GET_SIZE(gradients) != self.n_tensors:
                _buffers.refuse_gradient_count(self.optimizer, gradients)
            for i in range(self.n_tensors):
                self.gather_one(i, <object>PyList_GET_ITEM(gradients, i))
        return 0

    cdef int gather_one(self, Py_ssize_t i, object gradient) except -1:
        cdef Tensor* t = &self.tensors[i]
        cdef cnp.ndarray p = <cnp.ndarray>PyList_GET_ITEM(self.arrays, i)
        cdef const void* data
        cdef Py_ssize_t found
        if gradient is None:
            return 0
        if not is_gradient_for(gradient, t):
            _buffers.check_gradient(self.optimizer, i, gradient)
        if not cnp.PyArray_ISWRITEABLE(p):
            _buffers.check_still_writable(self.optimizer, i)
        data = cnp.PyArray_DATA(<cnp.ndarray>gradient)
        if data != t.checked_gradient:
            found = self.ranges.find(<uintptr_t>data, <uintptr_t>data + <uintptr_t>t.n * sizeof(float))
            if found >= 0:
                _buffers.refuse_overlapping_gradient(self.optimizer, i, self.written[found][1])
            t.checked_gradient = data
        if t.step[0] < 0:
            _buffers.refuse_step(self.optimizer, i, t.step[0])
        self.active[self.n_active].tensor = i
        self.active[self.n_active].g = <float*>data
        self.n_active += 1
        if self.kernels is None:
            self.gathered.append((i, gradient))
        return 0

    # --- 3. scalars

    cdef Py_ssize_t make_segments(self, Py_ssize_t* total) except -1:
        """Compute the scalars of every gathered tensor and turn neighbours in memory into one segment."""
        cdef Py_ssize_t k, previous, j, at = -1, n_segments = 0
        cdef Tensor* t
        cdef Tensor* before
        cdef Group* group
        cdef Segment made
        cdef Segment next_one
        cdef float* scalars = NULL
        cdef bint same, joins
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
            else:
                at += 1
                scalars = self.scalars + at * MAX_SCALARS
                memcpy(self.active[k].running, t.running, self.n_running * sizeof(double))
                group.kernel.scalars(group.hyper, <double>(t.step[0] + 1), self.active[k].running, scalars)
                for j in range(group.kernel.n_scalars):
                    if not isfinite(scalars[j]):
                        _buffers.refuse_scalars(self.optimizer, self.active[k].tensor, t.step[0] + 1)
            previous = k
            if t.n == 0:
                continue
            next_one.streams[0] = t.p
            next_one.streams[1] = self.active[k].g
            for j in range(group.n_states):
                next_one.streams[2 + j] = t.states[group.states[j]]
            next_one.n = t.n
            next_one.tile = group.kernel.tile
            next_one.scalars = scalars
            total[0] += t.n
            joins = made.n > 0 and made.scalars == scalars
            if joins:
                for j in range(2 + group.n_states):
                    joins = joins and made.streams[j] + made.n == next_one.streams[j]
            if joins:
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

    # --- 4. run

    cdef void count_steps(self) noexcept:
        cdef Py_ssize_t k
        cdef Tensor* t
        for k in range(self.n_active):
            t = &self.tensors[self.active[k].tensor]
            t.step[0] += 1
            memcpy(t.running, self.active[k].running, self.n_running * sizeof(double))

    def step(self, gradients):
        """Check everything, then update every tensor that has a gradient, in place."""
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t n_segments
        if self.busy:
            _buffers.refuse_concurrent_step(self.optimizer)
        self.busy = True
        try:
            self.check_groups()
            self.gather_all(gradients)
            n_segments = self.make_segments(&total)
            self.count_steps()
            run(self.segments, n_segments, total, self.n_threads if self.n_threads else default_n_threads)
        finally:
            self.busy = False

    def gather(self, gradients):
        """Check everything; return [(index of a tensor, its gradient), ...]. For backends in Python."""
        self.check_groups()
        self.gather_all(gradients)
        return self.gathered


def run_once(object capsule, list arrays, tuple hyper, double step, running, int n_threads):
    """One step of one kernel over the flat streams `arrays` (p, g, states), all checked by the caller.

    `running` is a writable float64 array or None; it is advanced. Returns False, with nothing written, when a
    host scalar is not a finite float32.
    """
    cdef const kernel* chosen = <const kernel*>PyCapsule_GetPointer(capsule, "fastopt.kernel")
    cdef Segment segment
    cdef float scalars[MAX_SCALARS]
    cdef double values[MAX_HYPERS]
    cdef double advanced[MAX_RUNNING]
    cdef cnp.ndarray array
    cdef Py_ssize_t k, n_running = 0
    cdef Py_ssize_t n = cnp.PyArray_SIZE(<cnp.ndarray>arrays[0])
    for k in range(len(hyper)):
        values[k] = hyper[k]
    if running is not None:
        array = running
        n_running = cnp.PyArray_SIZE(array)
        memcpy(advanced, cnp.PyArray_DATA(array), n_running * sizeof(double))
    chosen.scalars(values, step, advanced, scalars)
    for k in range(chosen.n_scalars):
        if not isfinite(scalars[k]):
            return False
    for k in range(len(arrays)):
        array = arrays[k]
        segment.streams[k] = <float*>cnp.PyArray_DATA(array)
    segment.n = n
    segment.tile = chosen.tile
    segment.scalars = scalars
    if running is not None:
        array = running
        memcpy(cnp.PyArray_DATA(array), advanced, n_running * sizeof(double))
    run(&segment, 1, n, n_threads if n_threads else default_n_threads)
    return True
