"""What the engine shares with the rules, as C headers."""

from __future__ import annotations

from fastopt._codegen.language import STAGE_HYPERS, Function, returned_scalars
from fastopt.rules import gradient_stage


def stage_positions() -> str:
    """Text of a C header: where the gradient stage's host scalars and hyperparameters stand among those of a kernel."""
    names = {"SCALAR": returned_scalars(Function.parse(gradient_stage.scalars)), "HYPER": STAGE_HYPERS}
    text = "/* Generated from fastopt/rules/gradient_stage.py. Not to be edited. */\n"
    for prefix, ordered in names.items():
        text += "enum {\n" + "".join(f"    {prefix}_{name.upper()},\n" for name in ordered) + "};\n"
    return text
