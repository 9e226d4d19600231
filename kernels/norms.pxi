# Room 3, the global norm of the gradients, and the sums of squares that norms are made of. Part of engine.pyx.
#
# The sum of squares of an index space has the same bits whatever the threads, the vector width and the split
# into tensors: element i goes to lane i % LANES of block i // NORM_BLOCK, in float64 and in order; lanes are added
# up as a fixed tree, and so are blocks, block b in lane b % LANES.


cdef double fold(double* lanes) noexcept nogil:
    """Sum of the lanes, as a fixed tree."""
    cdef int width = LANES // 2
    cdef int k
    while width:
        for k in range(width):
            lanes[k] += lanes[k + width]
        width //= 2
    return lanes[0]


cdef double sum_of_blocks(const double* sums, Py_ssize_t n_blocks, Py_ssize_t stride) noexcept nogil:
    """Sum over blocks, every `stride`-th number: block b in lane b % LANES, so that a GPU's warp does the same."""
    cdef double lanes[LANES]
    cdef Py_ssize_t block
    memset(lanes, 0, sizeof(lanes))
    for block in range(n_blocks):
        lanes[block % LANES] += sums[block * stride]
    return fold(lanes)


cdef struct Piece:
    const char* data
    int storage
    Py_ssize_t start  # in the index space
    Py_ssize_t n


cdef double sum_block(
    const Piece* pieces, Py_ssize_t n_pieces, Py_ssize_t block, float scale, const tile_stages* stages
) noexcept nogil:
    """Sum of squares of (scale * x) over one block."""
    cdef double lanes[LANES]
    cdef float decoded[TILE_ELEMENTS]
    cdef Py_ssize_t at = block * NORM_BLOCK
    cdef Py_ssize_t end = at + NORM_BLOCK
    cdef Py_ssize_t low = 0
    cdef Py_ssize_t high = n_pieces
    cdef Py_ssize_t middle, n, inside
    memset(lanes, 0, sizeof(lanes))
    while low < high:  # the first piece that ends after `at`
        middle = (low + high) // 2
        if pieces[middle].start + pieces[middle].n <= at:
            low = middle + 1
        else:
            high = middle
    while low < n_pieces and at < end:
        inside = at - pieces[low].start
        n = min(pieces[low].n - inside, end - at)
        if pieces[low].storage == FLOAT32:
            stages.sum_squares(<const float*>pieces[low].data + inside, n, scale, at % LANES, lanes)
        else:
            n = min(n, <Py_ssize_t>TILE_ELEMENTS)
            decode(stages, pieces[low].data, pieces[low].storage, inside, decoded, n)
            stages.sum_squares(decoded, n, scale, at % LANES, lanes)
        at += n
        if inside + n == pieces[low].n:
            low += 1
    return fold(lanes)


cdef void sum_share(
    const Piece* pieces,
    Py_ssize_t n_pieces,
    Py_ssize_t n_blocks,
    float scale,
    const tile_stages* stages,
    double* sums,
    int thread,
    int n_threads,
) noexcept nogil:
    cdef Py_ssize_t block
    cdef control_word caller = enter_kernels()
    for block in range(n_blocks * thread // n_threads, n_blocks * (thread + 1) // n_threads):
        sums[block] = sum_block(pieces, n_pieces, block, scale, stages)
    leave_kernels(caller)


cdef double sum_squares(
    const Piece* pieces,
    Py_ssize_t n_pieces,
    Py_ssize_t total,
    float scale,
    const tile_stages* stages,
    double* sums,
    int n_threads,
) noexcept nogil:
    """Sum of squares of (scale * x) over `total` elements; `sums` has room for a number per block."""
    cdef Py_ssize_t n_blocks = (total + NORM_BLOCK - 1) // NORM_BLOCK
    cdef int team = team_for(total, n_blocks, n_threads)
    if team <= 1:
        sum_share(pieces, n_pieces, n_blocks, scale, stages, sums, 0, 1)
    else:
        with nogil, parallel(num_threads=team):
            sum_share(pieces, n_pieces, n_blocks, scale, stages, sums, threadid(), team_size())
    return sum_of_blocks(sums, n_blocks, 1)


cdef double gradient_norm(Plan plan, double grad_scale, int n_threads):
    """Global L2 norm of the gathered gradients, scaled; over those of all processes if the plan reduces sums."""
    cdef Py_ssize_t k, total = 0
    cdef Active* active
    cdef Piece piece
    cdef double result
    memset(&piece, 0, sizeof(piece))
    for k in range(plan.n_active):
        active = &plan.active[k]
        piece.data = active.gradient
        piece.storage = active.storage
        piece.start = total
        piece.n = plan.tensors[active.tensor].n
        if memcmp(&plan.pieces[k], &piece, sizeof(Piece)) != 0:
            plan.pieces[k] = piece
        total += piece.n
    with nogil:
        result = sum_squares(
            plan.pieces, plan.n_active, total, <float>grad_scale, plan.pipeline.stages, plan.sums, n_threads
        )
    if plan.reduce_sum is not None:
        result = plan.reduce_sum(result)
    return sqrt(result)
