# What an optimizer keeps for each of its parameters, and making and checking many arrays at once.
# Part of engine.pyx. A million tensors are made in about two seconds, which Python code alone does not reach.


cdef class Tensor:
    """One parameter and what the optimizer keeps for it.

    Parameters
    ----------
    array
        The parameter.
    key
        Its name in a dict, its position in a list, or None where it is alone.
    group : int
        Position of its param group.
    index : int
        Of its first element among all elements of the optimizer; a loaded state keeps that of its origin.
    step : array of int64, shape ()
    running : array of float64
        Scalars that are carried from step to step.
    shape : tuple of int
    """

    cdef public object array
    cdef public object key
    cdef public int group
    cdef public int64_t index
    cdef public object step
    cdef public object running
    cdef public tuple shape
    cdef public Py_ssize_t size
    cdef public dict states
    """As they are kept: float32, bfloat16 or codes."""
    cdef public dict scales
    """Of states in 8 bits."""
    cdef public object low
    """Lower halves of the parameters, uint16, where `array` holds the upper ones."""
    cdef public object ema
    cdef public object copy
    cdef public object update

    def __init__(self, array, key, int group, int64_t index, step, running, tuple shape):
        cdef Py_ssize_t size = 1
        for length in shape:
            size *= <Py_ssize_t>length
        self.array = array
        self.key = key
        self.group = group
        self.index = index
        self.step = step
        self.running = running
        self.shape = shape
        self.size = size
        self.states = {}
        self.scales = {}

    @property
    def label(self):
        """What error messages call the parameter."""
        return _messages.parameter_label(self.key)


def make_tensors(list arrays, keys, int group, int64_t index, list steps, list running, list shapes):
    """A `Tensor` for each array, whose elements are numbered from `index` on."""
    cdef Py_ssize_t k
    cdef list made = []
    cdef Tensor tensor
    for k in range(len(arrays)):
        tensor = Tensor(arrays[k], keys[k], group, index, steps[k], running[k], shapes[k])
        index += tensor.size
        made.append(tensor)
    return made


def give(list tensors, str name, list states, list scales):
    """Put an array into the states of each tensor, and its scales, if it has any."""
    cdef Py_ssize_t k
    for k in range(len(tensors)):
        (<Tensor?>tensors[k]).states[name] = states[k]
        if scales:
            (<Tensor>tensors[k]).scales[name] = scales[k]


def unusual(list arrays, int type_number, tensors, bint writable):
    """Positions of what is not an exact, C-contiguous, aligned, writable array of this NumPy type.

    Where `tensors` is a list, the arrays must have their shapes; where `writable` is False, arrays may be read-only.
    Python code (`fastopt._arrays.checks.check_array`) says what is wrong with the others, if anything.
    """
    cdef Py_ssize_t k
    cdef list found = []
    for k in range(len(arrays)):
        if not is_usual(arrays[k], type_number, None if tensors is None else (<Tensor?>tensors[k]).shape, writable):
            found.append(k)
    return found


cdef bint is_usual(object value, int type_number, tuple shape, bint writable):
    cdef int k
    if not cnp.PyArray_CheckExact(value):
        return False
    cdef cnp.ndarray array = <cnp.ndarray>value
    if cnp.PyArray_TYPE(array) != type_number or not cnp.PyArray_ISCARRAY_RO(array):
        return False
    if writable and not cnp.PyArray_ISWRITEABLE(array):
        return False
    if shape is None:
        return True
    if cnp.PyArray_NDIM(array) != len(shape):
        return False
    for k in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_DIM(array, k) != <Py_ssize_t>shape[k]:
            return False
    return True


def holds(parameters, list tensors):
    """Whether a tuple or list holds just the parameters of these tensors, in their order."""
    cdef Py_ssize_t k
    if not isinstance(parameters, (tuple, list)) or len(parameters) != len(tensors):
        return False
    for k in range(len(tensors)):
        if parameters[k] is not (<Tensor?>tensors[k]).array:
            return False
    return True


def first_lacking(list tensors, tuple states):
    """(tensor, state) of the first tensor that does not have one of these states, or None."""
    cdef Tensor tensor
    for tensor in tensors:
        for name in states:
            if name not in tensor.states:
                return tensor, name
    return None


def kept_beside(list tensors, tuple states):
    """What is kept beside the parameters: [(attribute, state or None, [array or None for each tensor]), ...]."""
    cdef Tensor tensor
    cdef list ema = [], copy = [], low = [], update = [], step = [], running = []
    for tensor in tensors:
        ema.append(tensor.ema)
        copy.append(tensor.copy)
        low.append(tensor.low)
        update.append(tensor.update)
        step.append(tensor.step)
        running.append(tensor.running)
    cdef list columns = [
        ("ema", None, ema), ("copy", None, copy), ("low", None, low), ("update", None, update), ("step", None, step),
        ("running", None, running),
    ]
    cdef list states_column, scales_column
    for name in states:
        states_column, scales_column = [], []
        for tensor in tensors:
            states_column.append(tensor.states.get(name))
            scales_column.append(tensor.scales.get(name))
        columns += [("states", name, states_column), ("scales", name, scales_column)]
    return columns


cdef cnp.ndarray carved(cnp.ndarray flat, Py_ssize_t start, int n_dims, cnp.npy_intp* shape):
    """A view of `flat` from element `start` on."""
    cdef char* data = <char*>cnp.PyArray_DATA(flat) + start * cnp.PyArray_ITEMSIZE(flat)
    cdef cnp.ndarray made = cnp.PyArray_SimpleNewFromData(n_dims, shape, cnp.PyArray_TYPE(flat), data)
    cnp.set_array_base(made, flat)
    return made


def carve(cnp.ndarray flat, list like, list offsets):
    """Views of the flat array, one for each array in `like`, of its shape, from these elements on."""
    cdef Py_ssize_t k
    cdef cnp.ndarray array
    cdef list made = []
    for k in range(len(like)):
        array = like[k]
        made.append(carved(flat, offsets[k], cnp.PyArray_NDIM(array), cnp.PyArray_DIMS(array)))
    return made


def carve_scalars(cnp.ndarray flat):
    """A view of shape () for each element of the flat array."""
    cdef Py_ssize_t k
    cdef list made = []
    for k in range(cnp.PyArray_SIZE(flat)):
        made.append(carved(flat, k, 0, NULL))
    return made


def places(list arrays, Py_ssize_t alignment, Py_ssize_t block):
    """Where in one allocation, in elements, the state of each array starts, and where the last one ends.

    Arrays that follow each other in memory get states that follow each other; every other state starts at a
    multiple of `alignment` elements, and so does one that would begin inside a `block` of elements.
    """
    cdef Py_ssize_t end = 0
    cdef char* previous = NULL
    cdef cnp.ndarray array
    cdef list offsets = []
    for item in arrays:
        array = item
        if <char*>cnp.PyArray_DATA(array) != previous or end % block:
            end += (alignment - end % alignment) % alignment
        previous = <char*>cnp.PyArray_DATA(array) + cnp.PyArray_NBYTES(array)
        offsets.append(end)
        end += cnp.PyArray_SIZE(array)
    return offsets, end
