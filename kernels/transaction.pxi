# Changes of an optimizer outside a step: who may make one, and how it happens at once or not at all.
# Part of engine.pyx. What is written, and why, is decided in Python (fastopt/_core).
#
# Every operation that changes an optimizer follows the same three steps. It takes the optimizer's `Guard`, so that
# other threads are refused; it checks and allocates everything, and notes in a `Changes` what is to be written; and
# `Changes.publish` writes it. Publishing runs no Python code, so no signal handler and no other thread gets
# between two writes, and what could fail for lack of memory is undone.


cdef class Changes


cdef class Guard:
    """Lets one operation at a time work on an optimizer; shared by the optimizer and its plans.

    Parameters
    ----------
    owner
        Name of the optimizer's class, for error messages.
    """

    cdef str owner
    cdef int busy_generation  # of the process in which an operation is under way; 0 when none is
    cdef unsigned long thread  # that works on the optimizer
    cdef str doing
    cdef bint averages_are_in
    cdef public long long steps
    """Steps that were finished."""
    cdef public object plan
    """Identity of the plan that may step: None once parameters or states changed under it."""

    def __init__(self, str owner):
        self.owner = owner

    @property
    def busy(self):
        """Whether an operation is under way in this process."""
        return self.busy_generation == generation

    cdef int enter(self, str what, bint may_be_swapped=False) except -1:
        """Take the optimizer for the operation `what`, or raise RuntimeError."""
        if self.busy_generation == generation:
            doing = "another step" if self.doing == "step()" else self.doing
            raise RuntimeError(f"{self.owner}: {what} while {doing} of this optimizer is under way")
        if self.averages_are_in and not may_be_swapped:
            raise RuntimeError(
                f"{self.owner}: {what} inside swap_ema(), where averages stand in for the parameters"
            )
        self.busy_generation = generation
        self.thread = PyThread_get_thread_ident()
        self.doing = what
        return 0

    cdef bint is_busy_elsewhere(self) noexcept:
        """Whether another thread works on the optimizer."""
        return self.busy_generation == generation and self.thread != PyThread_get_thread_ident()

    cdef void leave(self) noexcept:
        self.busy_generation = 0

    cpdef begin_plan(self):
        """What a new plan shows to `check_plan`; those before it may not step any more."""
        self.plan = object()
        return self.plan

    cpdef check_plan(self, identity):
        """Raise RuntimeError unless the plan that got `identity` is that of the optimizer as it is now."""
        if self.plan is not identity:
            raise RuntimeError(f"{self.owner}: parameters or states of this optimizer were changed while step() began")

    def run(self, str what, function, *arguments):
        """The result of ``function(*arguments)``, called while the optimizer is taken for the operation `what`."""
        return self.run_at(what, False, function, arguments)

    cdef object run_at(self, str what, bint may_be_swapped, function, tuple arguments):
        """The caller's rounding mode changes no bit of what is computed meanwhile."""
        cdef control_word caller
        self.enter(what, may_be_swapped)
        caller = enter_host()
        try:
            return function(*arguments)
        finally:
            leave_kernels(caller)
            self.leave()

    def run_or_undo(self, str what, Changes changes, function, *arguments):
        """``function(changes, *arguments)``, likewise; an exception before a step was finished undoes `changes`."""
        cdef long long steps
        cdef bint is_done = False
        cdef control_word caller
        self.enter(what)
        steps = self.steps
        caller = enter_host()
        try:
            result = function(changes, *arguments)
            is_done = True
            return result
        finally:  # not `except`, which allocates before it begins
            if not is_done and self.steps == steps:
                changes.undo_from(0)
            leave_kernels(caller)
            self.leave()

    def run_also_swapped(self, str what, function, *arguments):
        """The same for an operation that makes sense inside `swap_ema`, too."""
        return self.run_at(what, True, function, arguments)


cdef enum:
    ATTRIBUTE, ITEM, EXTENSION

cdef object NOTHING = object()  # stood under a key that is new; not `self`, a cycle would keep large states alive


cdef class Changes:
    """What an operation is going to write, noted first and then written at once.

    Values must be prepared completely before `publish`; nothing is converted there.
    """

    cdef list kinds      # of the writes into objects: (kind, object, attribute or key, value)
    cdef list before     # what stood there
    cdef list calls      # of what arrays in host memory do not need
    cdef list targets    # arrays to overwrite
    cdef list sources
    cdef Py_ssize_t n_done  # of the writes into objects
    cdef Py_ssize_t n_called
    cdef Py_ssize_t n_copied

    def __init__(self):
        self.kinds = []
        self.before = []
        self.calls = []
        self.targets = []
        self.sources = []

    def attribute(self, target, str name, value):
        """Note ``target.name = value``, past any ``__setattr__``."""
        self.kinds.append((ATTRIBUTE, target, name, value))

    def item(self, dict target, key, value):
        """Note ``target[key] = value``."""
        self.kinds.append((ITEM, target, key, value))

    def extend(self, list target, list values):
        """Note that `values` are to be appended to the list `target`."""
        self.kinds.append((EXTENSION, target, None, values))

    cpdef copy(self, cnp.ndarray target, cnp.ndarray source):
        """Note that `target` gets the bytes of `source`, both C-contiguous and of one size."""
        if not (cnp.PyArray_ISCARRAY(target) and cnp.PyArray_ISCARRAY_RO(source)):
            raise ValueError("arrays must be C-contiguous, and the target writable")
        if cnp.PyArray_NBYTES(target) != cnp.PyArray_NBYTES(source):
            raise ValueError(
                f"arrays must be of one size, got {cnp.PyArray_NBYTES(source)} bytes for {cnp.PyArray_NBYTES(target)}"
            )
        self.targets.append(target)
        self.sources.append(source)

    def copy_all(self, list targets, list sources):
        """`copy` for many arrays."""
        cdef Py_ssize_t k
        if len(targets) != len(sources):
            raise ValueError(f"expected {len(targets)} sources, got {len(sources)}")
        for k in range(len(targets)):
            self.copy(targets[k], sources[k])

    def call(self, function, *arguments):
        """Note ``function(*arguments)``, which copies to a GPU. Calls come before all writes, in their order.

        An exception in one leaves what those before it have copied.
        """
        self.calls.append((function, arguments))

    def publish(self):
        """Write everything that was noted since the last time. On an exception none of it was, save by calls."""
        cdef Py_ssize_t k, first = self.n_done
        cdef bint is_done = False
        cdef cnp.ndarray target, source
        for k in range(self.n_copied, len(self.targets)):  # sizes can have changed since
            target, source = self.targets[k], self.sources[k]
            if cnp.PyArray_NBYTES(target) != cnp.PyArray_NBYTES(source):
                raise ValueError("an array was resized while it was to be written")
        self.before += [None] * (len(self.kinds) - len(self.before))
        while self.n_called < len(self.calls):
            function, arguments = self.calls[self.n_called]
            function(*arguments)
            self.n_called += 1
        try:
            while self.n_done < len(self.kinds):
                self.write(self.n_done)
                self.n_done += 1
            is_done = True
        finally:
            if not is_done:
                self.undo_from(first)
        while self.n_copied < len(self.targets):
            target, source = self.targets[self.n_copied], self.sources[self.n_copied]
            memcpy(cnp.PyArray_DATA(target), cnp.PyArray_DATA(source), cnp.PyArray_NBYTES(target))
            self.n_copied += 1

    cdef int write(self, Py_ssize_t k) except -1:
        kind, target, key, value = self.kinds[k]
        if kind == ATTRIBUTE:
            self.before[k] = PyObject_GenericGetAttr(target, key)
            PyObject_GenericSetAttr(target, key, value)
        elif kind == ITEM:
            self.before[k] = (<dict>target).get(key, NOTHING)
            (<dict>target)[key] = value
        else:
            self.before[k] = len(<list>target)
            (<list>target).extend(<list>value)
        return 0

    cdef int undo_from(self, Py_ssize_t first) except -1:
        """Put back what stood in the objects before write number `first`, without allocating; arrays stay."""
        while self.n_done > first:
            self.n_done -= 1
            kind, target, key, _ = self.kinds[self.n_done]
            before = self.before[self.n_done]
            if kind == ATTRIBUTE:
                PyObject_GenericSetAttr(target, key, before)
            elif kind == ITEM and before is NOTHING:
                del (<dict>target)[key]
            elif kind == ITEM:
                (<dict>target)[key] = before
            else:
                shorten(<list>target, before)
        return 0


cdef void shorten(list target, Py_ssize_t n) noexcept:
    """Drop the items from `n` on but keep their room: to delete a slice, or make a list smaller, may allocate."""
    cdef PyObject* item
    while PyList_GET_SIZE(target) > n:
        item = PyList_GET_ITEM(target, PyList_GET_SIZE(target) - 1)
        Py_SET_SIZE(target, PyList_GET_SIZE(target) - 1)
        Py_DECREF(<object>item)


cdef class AverageSwap:
    """Context manager in which averages stand in the parameters' place: `Optimizer.swap_ema`.

    Arrays in host memory are exchanged tile by tile, in place and without allocating, on entry and on exit, by code
    that nothing interrupts. On a GPU `exchange` does it.

    Parameters
    ----------
    guard
        Of the optimizer.
    prepare : callable
        Checks the parameters and returns the list of tensors.
    stages : capsule or None
        A kernel module's STAGES; None if `exchange` is to be called.
    copy_is_bfloat16 : bool
        What the tensors' copies hold, which follow.
    exchange : callable or None
        Exchanges tensors of the GPU.
    """

    cdef Guard guard
    cdef object prepare
    cdef object exchange_elsewhere
    cdef const tile_stages* stages
    cdef object stages_capsule
    cdef bint copy_is_bfloat16
    cdef list tensors
    cdef void** data  # of the parameters when they were exchanged

    def __cinit__(self, Guard guard, prepare, stages, bint copy_is_bfloat16, exchange):
        self.guard = guard
        self.prepare = prepare
        self.exchange_elsewhere = exchange
        self.copy_is_bfloat16 = copy_is_bfloat16
        self.stages_capsule = stages
        if stages is not None:
            self.stages = <const tile_stages*>PyCapsule_GetPointer(stages, "fastopt.tile_stages")

    def __dealloc__(self):
        free(self.data)

    def __enter__(self):
        cdef Py_ssize_t k
        self.guard.enter("swap_ema()")
        try:
            tensors = self.prepare()
            if self.stages != NULL:
                free(self.data)  # of the last entry
                self.data = <void**>calloc(len(tensors) + 1, sizeof(void*))
                if self.data == NULL:
                    raise MemoryError
                for k in range(len(tensors)):
                    self.data[k] = cnp.PyArray_DATA(<cnp.ndarray?>(<Tensor?>tensors[k]).array)
            self.exchange(tensors)
            self.tensors = tensors
            self.guard.averages_are_in = True
        finally:
            self.guard.leave()

    def __exit__(self, error_type, error, traceback):  # no tuple: a call that allocates nothing cannot fail
        cdef Py_ssize_t k
        cdef Tensor tensor
        if self.tensors is None:
            raise RuntimeError(f"{self.guard.owner}: this swap_ema() was not entered")
        while self.guard.is_busy_elsewhere():  # another thread refreshes copies
            with nogil:
                pass
        self.guard.enter("leaving swap_ema()", True)
        try:
            if self.stages != NULL:
                for k in range(len(self.tensors)):
                    tensor = self.tensors[k]
                    if cnp.PyArray_DATA(<cnp.ndarray>tensor.array) != self.data[k] or (
                        cnp.PyArray_SIZE(<cnp.ndarray>tensor.array) != tensor.size
                    ):
                        raise ValueError(
                            f"{self.guard.owner}: the memory of {tensor.label} was reallocated inside swap_ema(), so "
                            "its values cannot be put back: averages stay in the other parameters, steps are refused"
                        )
            self.exchange(self.tensors)
            self.tensors = None
            self.guard.averages_are_in = False
        finally:
            self.guard.leave()
        return False

    cdef int exchange(self, list tensors) except -1:
        cdef Py_ssize_t k
        cdef control_word caller
        if self.stages == NULL:
            self.exchange_elsewhere(tensors)
            return 0
        caller = enter_kernels()
        for k in range(len(tensors)):
            exchange_average(<Tensor>tensors[k], self.stages, self.copy_is_bfloat16)
        leave_kernels(caller)
        return 0


cdef void exchange_average(Tensor tensor, const tile_stages* stages, bint copy_is_bfloat16) noexcept:
    """Let a parameter and its average change places; its copy follows."""
    cdef float kept[TILE_ELEMENTS]
    cdef Py_ssize_t at = 0, n
    cdef float* p = NULL
    cdef uint16_t* high = NULL
    cdef uint16_t* low = NULL
    cdef uint16_t* copy = NULL
    cdef float* ema = <float*>cnp.PyArray_DATA(<cnp.ndarray>tensor.ema)
    if tensor.low is None:
        p = <float*>cnp.PyArray_DATA(<cnp.ndarray>tensor.array)
    else:
        high = <uint16_t*>cnp.PyArray_DATA(<cnp.ndarray>tensor.array)
        low = <uint16_t*>cnp.PyArray_DATA(<cnp.ndarray>tensor.low)
    if tensor.copy is not None:
        copy = <uint16_t*>cnp.PyArray_DATA(<cnp.ndarray>tensor.copy)
    while at < tensor.size:
        n = min(tensor.size - at, <Py_ssize_t>TILE_ELEMENTS)
        if copy != NULL and copy_is_bfloat16:
            stages.encode_bfloat16(ema + at, copy + at, n)
        elif copy != NULL:
            stages.encode_float16(ema + at, copy + at, n)
        if p != NULL:
            memcpy(kept, p + at, n * sizeof(float))
            memcpy(p + at, ema + at, n * sizeof(float))
        else:
            stages.join(high + at, low + at, kept, n)
            stages.split(ema + at, high + at, low + at, n)
        memcpy(ema + at, kept, n * sizeof(float))
        at += n


def copy_parameters(list tensors, object stages, bint as_bfloat16):
    """Round the parameters of all tensors into their copies, by code that nothing interrupts, without allocating."""
    cdef const tile_stages* made = <const tile_stages*>PyCapsule_GetPointer(stages, "fastopt.tile_stages")
    cdef control_word caller
    cdef Tensor tensor
    cdef Py_ssize_t k
    for tensor in tensors:
        if cnp.PyArray_SIZE(<cnp.ndarray?>tensor.array) != tensor.size:
            raise ValueError(
                f"{tensor.label} must have {tensor.size} elements, got "
                f"{cnp.PyArray_SIZE(<cnp.ndarray>tensor.array)}: it was resized since it was given"
            )
    caller = enter_kernels()
    for k in range(len(tensors)):
        copy_parameter(<Tensor>tensors[k], made, as_bfloat16)
    leave_kernels(caller)


cdef void copy_parameter(Tensor tensor, const tile_stages* stages, bint as_bfloat16) noexcept:
    cdef float whole[TILE_ELEMENTS]
    cdef Py_ssize_t at = 0, n
    cdef const float* p
    cdef void* array = cnp.PyArray_DATA(<cnp.ndarray>tensor.array)
    cdef uint16_t* low = NULL
    cdef uint16_t* copy = <uint16_t*>cnp.PyArray_DATA(<cnp.ndarray>tensor.copy)
    if tensor.low is not None:
        low = <uint16_t*>cnp.PyArray_DATA(<cnp.ndarray>tensor.low)
    while at < tensor.size:
        n = min(tensor.size - at, <Py_ssize_t>TILE_ELEMENTS)
        if low == NULL:
            p = <float*>array + at
        else:
            stages.join(<uint16_t*>array + at, low + at, whole, n)
            p = whole
        if as_bfloat16:
            stages.encode_bfloat16(p, copy + at, n)
        else:
            stages.encode_float16(p, copy + at, n)
        at += n
