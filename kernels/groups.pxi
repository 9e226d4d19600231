# Room 1: hyperparameters are compared with those last seen, by identity; what changed is read anew. Part of engine.pyx.


cdef int check_groups(Plan plan) except -1:
    """See that the kernels and hyperparameters are those that the param groups ask for now."""
    cdef Py_ssize_t k
    plan.guard.check_plan(plan.identity)
    for k in range(plan.n_groups):
        if not group_is_unchanged(plan, k):
            read_group(plan, k)
    if PyList_GET_SIZE(plan.param_groups) != plan.n_groups:  # last: reading can run code of the user's
        refusals.refuse_regrouping(plan.optimizer())
    for k in range(plan.n_groups):
        if PyList_GET_ITEM(plan.param_groups, k) != PyTuple_GET_ITEM(plan.group_dicts, k):
            refusals.refuse_regrouping(plan.optimizer())
    return 0


cdef bint group_is_unchanged(Plan plan, Py_ssize_t k):
    """Whether a group holds what was last read from it: the same keys in the same order, with the same values."""
    cdef object read = <object>PyList_GET_ITEM(plan.group_values, k)
    cdef object group = <object>PyTuple_GET_ITEM(plan.group_dicts, k)
    cdef Py_ssize_t i = 0, at = 0
    cdef PyObject* key
    cdef PyObject* value
    if read is None or 2 * PyDict_Size(group) != PyTuple_GET_SIZE(read):
        return False
    while PyDict_Next(group, &at, &key, &value):  # looking every name up took a quarter of a small step
        if key != PyTuple_GET_ITEM(read, i) or value != PyTuple_GET_ITEM(read, i + 1):
            return False
        i += 2
    return True


cdef int read_group(Plan plan, Py_ssize_t k) except -1:
    cdef Group* group = &plan.groups[k]
    cdef list values = []
    name, hyper, checked = groups.read_group(plan.optimizer(), k)
    plan.group_values[k] = None  # until all of it is here
    if plan.kernels is not None:
        if name not in plan.kernels:
            raise ValueError(f"{plan.guard.owner}: no kernel {name!r} was compiled; backend='reference' needs none")
        capsule, states, n_scalars = plan.kernels[name]
        if len(hyper) > MAX_HYPERS or len(states) > MAX_STATES or plan.n_running > MAX_RUNNING:
            raise OverflowError(f"{name}: more hyperparameters, states or running scalars than kernel.h allows")
        if n_scalars > MAX_SCALARS:
            raise OverflowError(f"{name}: more host scalars than kernel.h allows")
        group.kernel = <const kernel*>PyCapsule_GetPointer(capsule, "fastopt.kernel")
        group.n_states = <int>len(states)
        for i, state in enumerate(states):
            group.states[i] = plan.state_names.index(state)
        for i, value in enumerate(hyper):
            group.hyper[i] = value
    for item in checked.items():
        values += item
    plan.group_values[k] = tuple(values)
    return 0


def replace_items(dict group, dict found, dict replaced):
    """Put the values of `replaced` into `group` where it still has those of `found`; nobody gets in between."""
    for key in found:
        if found[key] is not replaced[key] and group.get(key) is found[key]:
            group[key] = replaced[key]
