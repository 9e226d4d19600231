"""The table of the formats' constants as a C header."""

from __future__ import annotations

from fastopt._formats import STATE_DTYPES, constants


def state_dtype_name(state_dtype: str) -> str:
    """Name of a state dtype's number in C."""
    return f"STATES_{state_dtype.upper()}"


def formats_header() -> str:
    """Text of `formats.h`."""
    numbers = {name: value for name, value in vars(constants).items() if name.isupper()}
    lines = [f"#define {name} {f'{value:#x}ull' if value >> 31 else value}" for name, value in numbers.items()]
    dtypes = ", ".join([*map(state_dtype_name, STATE_DTYPES), "N_STATE_DTYPES"])
    return f"""/* Generated from fastopt/_formats/: what the numbers mean is said in constants.py. Not to be edited. */
#ifndef FASTOPT_FORMATS_H
#define FASTOPT_FORMATS_H

{chr(10).join(lines)}

/* How an optimizer keeps its states. */
enum {{ {dtypes} }};

#endif
"""
