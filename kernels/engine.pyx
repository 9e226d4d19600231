# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The step: from gradients and param groups to tiles, on however many threads. Table of contents; the code is in rooms.

A `Plan` (plan.pxi) is what one optimizer needs for a step, prebuilt: pointers, lengths, step counts and the last seen
hyperparameters. `Plan.step` goes through five rooms, and writes only in the last:

1. groups.pxi   hyperparameters are compared with those last seen, by identity; what changed is validated
2. gather.pxi   every gradient is checked
3. norms.pxi    the global norm, if the step's options ask for it: one pass over the gradients
4. scalars.pxi  host scalars of every (group, step count); tensors become segments: pointers, length, scalars
5. run.pxi      segments are cut into tiles and shared out over the threads

What happens to one tile is in segments.pxi. An optimizer with a trust ratio (`trust`) takes room 5 in two passes: norms
of every tensor, then the update. `Plan.accumulate` takes rooms 2 and 5 alone: it adds gradients to float32 sums
(sums.pxi), which a step without gradients uses and zeroes.

Beside the step: tensors.pxi (what is kept for each parameter), transaction.pxi (changes outside a step), ranges.pxi
(which arrays overlap), single_step.pxi (a step without an optimizer). All are one compiled module.

A tile stays in the cache while the stages that are on run over it: decode the gradient, clip it, the rule,
average the weights, copy them in low precision, zero the gradient. A stage that is off costs nothing.

What is refused is explained by Python code (`fastopt._core.refusals`); here it is only noticed. Compiled for the
baseline instruction set alone; the kernels come in as function pointers.
"""

from cpython.dict cimport PyDict_GetItem, PyDict_Next, PyDict_Size
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject, PyObject_GenericGetAttr, PyObject_GenericSetAttr
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport Py_DECREF
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from cython.parallel cimport parallel, threadid
from libc.math cimport INFINITY, isfinite, isinf, sqrt
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcmp, memcpy, memset

cimport numpy as cnp

from kernel cimport (
    CODE_BLOCK, LANES, MAX_HYPERS, MAX_RUNNING, MAX_SCALARS, MAX_STATES, NORM_BLOCK, STATES_FLOAT32, TILE_ELEMENTS,
    kernel, tile_context, tile_function, tile_stages,
)

import weakref

import numpy

from fastopt import _formats, _messages
from fastopt._core import groups, refusals
from fastopt._core.options import ACCUMULATED as accumulated

cnp.import_array()

cdef object ACCUMULATED = accumulated

cdef extern from "Python.h":
    void Py_SET_SIZE(object, Py_ssize_t)

cdef extern from "prefetch.h":
    enum: FAR_DISTANCE
    enum: NEAR_DISTANCE
    enum: FAR_FROM

cdef extern from "dither.h":
    uint64_t dither_key(uint64_t, int64_t) noexcept nogil

cdef extern from "control_word.h":
    ctypedef unsigned int control_word
    control_word enter_kernels() noexcept nogil
    control_word enter_host() noexcept nogil
    void leave_kernels(control_word) noexcept nogil
    control_word read_control_word() noexcept nogil

cdef extern from "team.h":
    enum: HAVE_OPENMP
    int team_size() noexcept nogil
    int affordable_team(int) noexcept nogil

cdef extern from "cpu_features.h":
    enum: MAX_CPU_FEATURES
    ctypedef struct cpu_feature:
        const char* name
        bint supported
    int cpu_features(cpu_feature*) noexcept nogil

# Generated from fastopt/rules/gradient_stage.py: clip_coefficient, clip_factors, and where the gradient stage's numbers
# stand among those of a kernel (SCALAR_..., HYPER_...).
include "gradient_stage.pxi"

TILE = TILE_ELEMENTS
"""Elements of one call of a kernel. Threads own whole tiles of a tensor."""

SCALAR_POSITIONS = {
    "grad_scale": SCALAR_GRAD_SCALE, "clip_coefficient": SCALAR_CLIP_COEFFICIENT, "trust": SCALAR_TRUST
}
"""Host scalars that the engine itself sets -> their positions among a kernel's."""

HYPER_POSITIONS = {"lr": HYPER_LR}
"""Hyperparameters that the engine itself reads -> their positions among a kernel's."""

cdef enum:
    SEGMENT_WEIGHT = 64  # what starting a segment costs, in elements; balances many small tensors
    GIL_BELOW = 16384    # elements for which releasing the GIL costs more than it gives

# How an array of gradients or copies holds its numbers.
cdef enum:
    FLOAT32, BFLOAT16, FLOAT16

# What a trust ratio per tensor scales.
cdef enum:
    NO_TRUST, TRUST_UPDATE, TRUST_GRADIENT

# What a pass over the tiles does.
cdef enum:
    WHOLE       # the whole step
    MEASURE     # first pass with a trust ratio: norms; the rule, too, where the ratio scales what that subtracts
    FINISH      # second pass with a trust ratio: the rule, or subtracting the scaled update; then the other stages
    ACCUMULATE  # adding gradients to their sums

OPENMP = bool(HAVE_OPENMP)

cdef int64_t MAX_STEP = 1 << 53  # exact in float64

cdef Py_ssize_t serial_below = 32768
cdef int default_n_threads = 1
cdef bint forked = False
cdef int generation = 1  # of this process: one more than its parent's when a fork made it


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
    global forked, generation
    forked = True
    generation += 1


def supported_features():
    """Whether this processor and operating system have each of the features that cpu_features.h knows: {name: bool}."""
    cdef cpu_feature found[MAX_CPU_FEATURES]
    cdef int k
    return {found[k].name.decode("ascii"): bool(found[k].supported) for k in range(cpu_features(found))}


def control_word_now():
    """The calling thread's floating-point control word, exception flags included."""
    return read_control_word()


cdef class Plan  # what the functions of the rooms take

include "tensors.pxi"
include "transaction.pxi"
include "ranges.pxi"
include "segments.pxi"
include "norms.pxi"
include "plan.pxi"
include "groups.pxi"
include "gather.pxi"
include "scalars.pxi"
include "run.pxi"
include "sums.pxi"
include "single_step.pxi"
