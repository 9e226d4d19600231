"""Rule text -> kernel text, when fastopt is built: Cython, and NumPy in the tests; loops come from `kernels/`.

`language` says what a rule may be. `fastopt._codegen.cuda` is for the CUDA backend, at run time.
"""

from fastopt._codegen.cython import cython_source as cython_source
from fastopt._codegen.engine import gradient_stage_source as gradient_stage_source
from fastopt._codegen.headers import formats_header as formats_header
from fastopt._codegen.language import FUNCTIONS as FUNCTIONS
from fastopt._codegen.language import Kernel as Kernel
from fastopt._codegen.language import RuleError as RuleError
from fastopt._codegen.language import hyper_slots as hyper_slots
from fastopt._codegen.language import kernels as kernels
from fastopt._codegen.language import scalar_names as scalar_names
from fastopt._codegen.numpy import numpy_source as numpy_source

# How kernels are compiled. No contraction and no fast-math: a kernel's bits are those of its rule, one operation at
# a time. The other two only say that nobody reads errno or traps, without which sqrt and selections do not vectorize.
FLAGS = (
    *("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    "-falign-functions=64",  # or every edit of the engine decides anew on 60 of a small step's 450 ns
    "--param=max-completely-peel-times=8",  # or GCC unrolls a loop of 16 before it thinks of vectors
)
