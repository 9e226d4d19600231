"""The instruction sets that kernels are built for: one table, which the build and the CPU backend read.

A new one is a row here; a feature that no row had needs its answer in `kernels/cpu_features.h`.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

_X86_64 = ("x86_64", "amd64")


@dataclass(frozen=True)
class InstructionSet:
    """One set of instructions, and with it one module of compiled kernels."""

    name: str
    """As FASTOPT_ISA takes it."""
    machines: tuple[str, ...]
    """What `platform.machine()` says, in lower case, where it can be built; empty for everywhere."""
    features: tuple[str, ...]
    """What the processor and the operating system must support, by the names in `kernels/cpu_features.h`."""
    flags: tuple[str, ...]
    """What GCC and Clang are told beside `_codegen.FLAGS`."""

    @property
    def module(self) -> str:
        """Name of the extension module that holds its kernels."""
        return f"_kernels_{self.name.replace('-', '_')}"


_AVX2 = ("avx2", "bmi", "bmi2", "fma")  # with lzcnt and movbe, which every processor with AVX2 and BMI2 has
_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

INSTRUCTION_SETS = {
    row.name: row
    for row in (
        InstructionSet("baseline", (), (), ()),
        InstructionSet("x86-64-v3", _X86_64, _AVX2, ("-march=x86-64-v3",)),
        InstructionSet("x86-64-v4", _X86_64, (*_AVX2, *_AVX512), ("-march=x86-64-v4", "-mprefer-vector-width=512")),
    )
}
"""By name; of those that a processor runs the last is used."""


def for_this_machine() -> list[InstructionSet]:
    """Those that can be built here: the baseline alone where Python has 32 bits."""
    machine = platform.machine().lower() if sys.maxsize > 2**32 else None
    return [row for row in INSTRUCTION_SETS.values() if not row.machines or machine in row.machines]
