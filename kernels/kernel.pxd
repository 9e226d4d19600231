# kernel.h in Cython, for the engine and for every kernel module: what a kernel is, what the stages of a tile are.
# No more than the declarations; each is explained in the header.

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

cdef extern from "kernel.h":
    enum: MAX_STATES
    enum: MAX_SCALARS
    enum: MAX_HYPERS
    enum: MAX_RUNNING
    enum: TILE_ELEMENTS
    enum: LANES
    enum: NORM_BLOCK
    enum: CODE_BLOCK
    enum: STATES_FLOAT32
    enum: N_STATE_DTYPES
    ctypedef float* stream
    ctypedef uint16_t* halves
    ctypedef uint32_t* words
    ctypedef struct tile_context:
        uint64_t key
        int64_t index
        uint32_t step
        int distance
    ctypedef void (*tile_function)(
        float*, const float*, void* const*, uint16_t* const*, Py_ssize_t, Py_ssize_t, const float*, const tile_context*
    ) noexcept nogil
    ctypedef void (*scalars_function)(const double*, double, double*, float*) noexcept nogil
    ctypedef double (*trust_function)(const double*, double, double) noexcept nogil
    ctypedef struct kernel:
        tile_function tile[N_STATE_DTYPES]
        scalars_function scalars
        trust_function trust
        int n_scalars
    ctypedef struct tile_stages:
        void (*decode_bfloat16)(const uint16_t*, float*, Py_ssize_t) noexcept nogil
        void (*decode_float16)(const uint16_t*, float*, Py_ssize_t) noexcept nogil
        void (*encode_bfloat16)(const float*, uint16_t*, Py_ssize_t) noexcept nogil
        void (*encode_float16)(const float*, uint16_t*, Py_ssize_t) noexcept nogil
        void (*join)(const uint16_t*, const uint16_t*, float*, Py_ssize_t) noexcept nogil
        void (*split)(const float*, uint16_t*, uint16_t*, Py_ssize_t) noexcept nogil
        void (*clip)(const float*, float*, Py_ssize_t, float, float, float) noexcept nogil
        void (*apply)(float*, const float*, Py_ssize_t, float) noexcept nogil
        void (*average)(const float*, float*, Py_ssize_t, float, float) noexcept nogil
        void (*accumulate)(const float*, float*, Py_ssize_t) noexcept nogil
        void (*sum_squares)(const float*, Py_ssize_t, float, Py_ssize_t, double*) noexcept nogil
    float select_f32(bint, float, float) noexcept nogil
    float sqrt_f32(float) noexcept nogil
    float sign_f32(float) noexcept nogil
    float fabs_f32(float) noexcept nogil
    float maximum_f32(float, float) noexcept nogil
    float minimum_f32(float, float) noexcept nogil
    float copysign_f32(float, float) noexcept nogil
