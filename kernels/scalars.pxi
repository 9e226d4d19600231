# Room 4: host scalars of every (group, step count), and tensors that become segments. Part of engine.pyx.


cdef inline double warmed_up(double decay, double step) noexcept nogil:
    """The average's decay in step number `step` (1 is the first): its first steps forget the initial weights."""
    cdef double ramp = (1.0 + step) / (10.0 + step)
    return ramp if ramp < decay else decay


cdef inline bint compute_scalars(
    const Group* group, int trust, double step, double* running, float* scalars
) noexcept nogil:
    """Host scalars of step number `step` (1 is the first); `running` is advanced. False if one leaves float32."""
    cdef double hyper[MAX_HYPERS]
    cdef const double* read = &group.hyper[0]
    cdef int k
    if trust == TRUST_UPDATE:
        memcpy(hyper, group.hyper, sizeof(hyper))
        hyper[HYPER_LR] = 1.0  # the rule gives the direction; the engine scales it
        read = hyper
    group.kernel.scalars(read, step, running, scalars)
    for k in range(group.kernel.n_scalars):
        if not isfinite(scalars[k]):
            return False
    return True


cdef inline void describe(
    Segment* segment, const Planned* t, const Group* group, const Active* active, const Settings* settings, int trust,
    const float* scalars
) noexcept nogil:
    """Fill in what a segment of one tensor takes from it, from its group and from its gradient.

    Left to the caller are the average's decay and, with a trust ratio, the segment's place among the norms.
    """
    cdef int k
    if t.low == NULL:
        segment.p = <float*>t.data
    else:
        segment.high = <uint16_t*>t.data
        segment.low = t.low
    segment.gradient = active.gradient
    segment.storage = active.storage
    for k in range(group.n_states):
        segment.states[k] = t.states[group.states[k]]
        segment.scales[k] = t.scales[group.states[k]]
    segment.states[group.n_states] = t.update if trust == TRUST_UPDATE else NULL
    segment.n_states = group.n_states
    segment.n = t.n
    segment.context.distance = settings.distance
    if settings.format.is_rounded:
        segment.context.step = <uint32_t>(t.step[0] + 1)
        segment.context.key = dither_key(settings.seed, t.step[0] + 1)
        segment.context.index = t.index
    segment.ema = t.ema
    segment.copy = t.copy
    segment.tile = group.kernel.tile[settings.state_dtype]
    segment.scalars = scalars
    if trust != NO_TRUST:
        segment.kernel = group.kernel
        segment.hyper = &group.hyper[0]
        segment.update = t.update


cdef Py_ssize_t make_segments(Plan plan, Py_ssize_t* total, float grad_scale, float clip_coefficient) except -1:
    """Compute the scalars of every gathered tensor and turn neighbours in memory into one segment.

    Scale and coefficient go into the rule's scalars, or, where gradients are clipped element by element,
    into that stage.
    """
    cdef bint clips = plan.pipeline.clips
    cdef int trust = plan.pipeline.trust
    cdef Py_ssize_t first_block = 0
    cdef double ema_decay = plan.ema_decay
    cdef Py_ssize_t k, previous, j, at = -1, n_segments = 0
    cdef Planned* t
    cdef Planned* before
    cdef Group* group
    cdef Segment segment    # so far, with the neighbours that were joined to it
    cdef Segment following  # the next tensor's, which may be joined to it
    cdef float* scalars = NULL
    cdef bint same
    memset(&segment, 0, sizeof(segment))
    memset(&following, 0, sizeof(following))
    total[0] = 0
    previous = -1
    for k in range(plan.n_active):
        t = &plan.tensors[plan.active[k].tensor]
        group = &plan.groups[t.group]
        same = previous >= 0
        if same:
            before = &plan.tensors[plan.active[previous].tensor]
            same = before.group == t.group and before.step[0] == t.step[0]
            for j in range(plan.n_running):
                same = same and before.running[j] == t.running[j]
        if same:
            memcpy(plan.active[k].running, plan.active[previous].running, sizeof(plan.active[k].running))
            if trust == TRUST_GRADIENT:  # every tensor has a ratio of its own in there
                memcpy(scalars + MAX_SCALARS, scalars, MAX_SCALARS * sizeof(float))
                at += 1
                scalars += MAX_SCALARS
        else:
            at += 1
            scalars = plan.scalars + at * MAX_SCALARS
            memcpy(plan.active[k].running, t.running, plan.n_running * sizeof(double))
            if not compute_scalars(group, trust, <double>(t.step[0] + 1), plan.active[k].running, scalars):
                refusals.refuse_scalars(plan.optimizer(), plan.active[k].tensor, t.step[0] + 1)
            if not clips:
                scalars[SCALAR_GRAD_SCALE] *= grad_scale
                scalars[SCALAR_CLIP_COEFFICIENT] = clip_coefficient
            if plan.ema_warmup:
                ema_decay = warmed_up(plan.ema_decay, <double>(t.step[0] + 1))
        previous = k
        if t.n == 0:
            continue
        describe(&following, t, group, &plan.active[k], &plan.settings, trust, scalars)
        following.ema_decay = <float>ema_decay
        following.ema_weight = <float>(1.0 - ema_decay)
        if trust != NO_TRUST:
            following.first_block = first_block
            first_block += (t.n + NORM_BLOCK - 1) // NORM_BLOCK
        total[0] += t.n
        same = trust == NO_TRUST and segment.n > 0 and segment.scalars == scalars
        if same and follows(&segment, &following, &plan.settings.format):
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
