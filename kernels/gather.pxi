# Room 2: every gradient is checked, and the tensors that have one are noted. Part of engine.pyx.
# What is refused here is explained by Python code (fastopt/_core/refusals.py).


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


cdef int gather_any(Plan plan, object gradients) except -1:
    """Gather gradients, or the sums of those that were accumulated."""
    if gradients is ACCUMULATED:
        return gather_sums(plan)
    if plan.n_accumulated:
        refusals.refuse_pending_gradients(plan.optimizer(), "step(grads)")
    return gather_all(plan, gradients)


cdef int gather_all(Plan plan, object gradients) except -1:
    """Check every gradient and note the tensors that have one."""
    cdef Py_ssize_t i, at = 0
    cdef PyObject* key
    cdef PyObject* item
    plan.n_active = 0
    if plan.structure == SINGLE:
        plan.held = [gradients]
    elif plan.structure == MAPPING:
        if type(gradients) is not dict:
            gradients = refusals.gradient_mapping(plan.optimizer(), gradients)
        if PyDict_Size(gradients) != plan.n_tensors:
            refusals.refuse_gradient_names(plan.optimizer(), gradients)
        plan.held = [None] * plan.n_tensors
        for i in range(plan.n_tensors):
            # In the usual order of names the next entry is the one; its key need not be hashed.
            if not PyDict_Next(gradients, &at, &key, &item) or key != PyTuple_GET_ITEM(plan.names, i):
                item = PyDict_GetItem(gradients, <object>PyTuple_GET_ITEM(plan.names, i))
            if item == NULL:
                refusals.refuse_gradient_names(plan.optimizer(), gradients)
            plan.held[i] = <object>item
    else:
        if type(gradients) is not list:
            gradients = refusals.gradient_list(plan.optimizer(), gradients)
        plan.held = list(<list>gradients)
        if PyList_GET_SIZE(plan.held) != plan.n_tensors:
            refusals.refuse_gradient_count(plan.optimizer(), plan.held)
    for i in range(plan.n_tensors):
        gather_one(plan, i, <object>PyList_GET_ITEM(plan.held, i))
    return 0


cdef int gather_one(Plan plan, Py_ssize_t i, object gradient) except -1:
    cdef Planned* t = &plan.tensors[i]
    cdef cnp.ndarray p = <cnp.ndarray>PyList_GET_ITEM(plan.arrays, i)
    cdef const void* data
    cdef uintptr_t end
    cdef int storage = FLOAT32
    if gradient is None:
        return 0
    if not is_gradient_for(gradient, t, cnp.NPY_FLOAT32):
        if is_gradient_for(gradient, t, cnp.NPY_FLOAT16):
            storage = FLOAT16
        elif plan.bfloat16_type >= 0 and is_gradient_for(gradient, t, plan.bfloat16_type):
            storage = BFLOAT16
        else:
            gradient, name = refusals.check_gradient(plan.optimizer(), i, gradient)
            storage = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}[name]
            plan.held[i] = gradient
            if storage == BFLOAT16:
                plan.bfloat16_type = cnp.PyArray_TYPE(<cnp.ndarray>gradient)
    if not is_as_planned(p, t):
        refusals.refuse_changed_parameter(plan.optimizer(), i)
    data = cnp.PyArray_DATA(<cnp.ndarray>gradient)
    if data != t.checked_gradient or storage != t.checked_storage:
        end = <uintptr_t>data + <uintptr_t>(t.n * item_size(storage))
        if plan.ranges.find(<uintptr_t>data, end) >= 0:
            refusals.refuse_overlapping_gradient(plan.optimizer(), i, gradient)
        t.checked_gradient = data
        t.checked_storage = storage
    if t.step[0] < 0 or t.step[0] >= MAX_STEP:
        refusals.refuse_step(plan.optimizer(), i, t.step[0])
    plan.active[plan.n_active].tensor = i
    plan.active[plan.n_active].gradient = <char*>data
    plan.active[plan.n_active].storage = storage
    plan.active[plan.n_active].array = <PyObject*>gradient
    plan.n_active += 1
    return 0


cdef int gather_sums(Plan plan) except -1:
    """Take the sums of gradients for gradients."""
    cdef Py_ssize_t i
    cdef Planned* t
    if not plan.n_accumulated:
        refusals.refuse_missing_gradients(plan.optimizer())
    plan.n_active = 0
    for i in range(plan.n_tensors):
        t = &plan.tensors[i]
        if not t.has_sums:
            continue
        if not is_as_planned(<cnp.ndarray>PyList_GET_ITEM(plan.arrays, i), t):
            refusals.refuse_changed_parameter(plan.optimizer(), i)
        if t.step[0] < 0 or t.step[0] >= MAX_STEP:
            refusals.refuse_step(plan.optimizer(), i, t.step[0])
        plan.active[plan.n_active].tensor = i
        plan.active[plan.n_active].gradient = <char*>t.sums
        plan.active[plan.n_active].storage = FLOAT32
        plan.n_active += 1
    return 0


cdef int check_zeroable(Plan plan) except -1:
    """See that every gathered gradient can be zeroed without touching another."""
    cdef Py_ssize_t k
    cdef bint same = plan.n_active == plan.n_zeroable
    cdef list gradients = []
    for k in range(plan.n_active):
        if not cnp.PyArray_ISWRITEABLE(<cnp.ndarray>plan.active[k].array):
            refusals.refuse_read_only_gradient(plan.optimizer(), plan.active[k].tensor)
        same = (
            same
            and plan.zeroable[k].gradient == plan.active[k].gradient
            and plan.zeroable[k].storage == plan.active[k].storage
            and plan.zeroable[k].tensor == plan.active[k].tensor
        )
    if not same:
        for k in range(plan.n_active):
            gradients.append(<object>plan.active[k].array)
        overlap = Ranges(gradients).first_overlap()
        if overlap is not None:
            a, b = overlap
            refusals.refuse_shared_gradients(
                plan.optimizer(), plan.active[<Py_ssize_t>a].tensor, plan.active[<Py_ssize_t>b].tensor
            )
        for k in range(plan.n_active):
            plan.zeroable[k] = plan.active[k]
        plan.n_zeroable = plan.n_active
    return 0


cdef list gathered(Plan plan):
    """[(index of a tensor, its gradient), ...]"""
    cdef Py_ssize_t k
    cdef list pairs = []
    for k in range(plan.n_active):
        pairs.append((plan.active[k].tensor, <object>plan.active[k].array))
    return pairs
