"""How numbers are kept, in NumPy: what the kernels' codecs (`kernels/`, `fastopt.backends.cuda.codecs`) must equal.

The compiled step decodes and encodes on its own; this is the reference backend's and the tests' text, and what
loads, converts and shows states.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastopt._formats.bfloat16 import Bfloat16 as Bfloat16
from fastopt._formats.codec import Codec as Codec
from fastopt._formats.constants import CODE_BLOCK as CODE_BLOCK
from fastopt._formats.constants import FLAGGED as FLAGGED
from fastopt._formats.dither import Random as Random
from fastopt._formats.dither import dither_key as dither_key
from fastopt._formats.eight_bit import EightBit as EightBit
from fastopt._formats.halves import join as join
from fastopt._formats.halves import split as split

_FLOAT32, _BFLOAT16 = Codec(), Bfloat16()
_CODECS: dict[str, dict[str, Codec]] = {
    "float32": {"signed": _FLOAT32, "unsigned": _FLOAT32, "weights": _FLOAT32},
    "bfloat16": {"signed": _BFLOAT16, "unsigned": _BFLOAT16, "weights": _BFLOAT16},
    "8bit": {"signed": EightBit(is_signed=True), "unsigned": EightBit(is_signed=False), "weights": _BFLOAT16},
}
"""One row for each state dtype: how it keeps states of each kind (`STATE_KINDS`)."""

STATE_DTYPES = tuple(_CODECS)
"""What `state_dtype` may be; kernels have their loops over states in this order."""


def codec(state_dtype: str, kind: str) -> Codec:
    """How a state of `kind` is kept under `state_dtype`."""
    return _CODECS[state_dtype][kind]


def common_codec(state_dtype: str, kinds: Iterable[str]) -> Codec:
    """How the states of a kernel are kept, one of `kinds` each: a loop has one format for all of them.

    Raises
    ------
    ValueError
        If `state_dtype` keeps them in more than one format.
    """
    codecs = {codec(state_dtype, kind).name: codec(state_dtype, kind) for kind in kinds}
    if len(codecs) > 1:
        raise ValueError(f"{state_dtype} keeps these states in different formats: {', '.join(codecs)}")
    return next(iter(codecs.values()), _FLOAT32)
