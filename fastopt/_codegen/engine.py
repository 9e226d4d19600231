"""The gradient stage as the engine has it: its host functions, and where its numbers stand among those of a kernel."""

from __future__ import annotations

from fastopt._codegen.host_functions import cython_host_function
from fastopt._codegen.language import STAGE_HYPERS, Function, returned_scalars
from fastopt.rules import gradient_stage


def gradient_stage_source() -> str:
    """Text of a Cython file that the engine includes."""
    names = {"SCALAR": returned_scalars(Function.parse(gradient_stage.scalars)), "HYPER": STAGE_HYPERS}
    text = "# Generated from fastopt/rules/gradient_stage.py. Not to be edited.\n"
    for prefix, ordered in names.items():
        text += "\ncdef enum:\n" + "".join(f"    {prefix}_{name.upper()}\n" for name in ordered)
    for function in (gradient_stage.clip_coefficient, gradient_stage.clip_factors):
        text += "\n" + cython_host_function(function)
    return text
