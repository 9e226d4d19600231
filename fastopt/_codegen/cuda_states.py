"""How a kernel on a GPU reads and writes its states: the statements for each format, four neighbours a thread.

What the statements call is in `fastopt.backends.cuda.codecs`. Loads have two forms: `whole` for four elements (in 8
bits a block) that are all there, `general` for any.
"""

from __future__ import annotations

from fastopt._codegen.language import Kernel
from fastopt._formats.constants import SIGNED_SMALLEST_SCALE, UNSIGNED_SMALLEST_SCALE
from fastopt.backends.cuda import layout

ELEMENTS = range(4)
"""Neighbours that are one thread's: a name of the rule stands for four, with a number behind each."""


def four(name: str) -> str:
    """The names of a thread's four elements, with commas."""
    return ", ".join(f"{name}_{j}" for j in ELEMENTS)


class States:
    """The states of a kernel in float32; `k` is the position of one of them."""

    in_blocks = False
    """Whether the threads of a block of elements work together, so that those past the end must take part."""

    def __init__(self, kernel: Kernel) -> None:
        self.names, self.kinds = kernel.states, kernel.kinds

    def addresses(self, k: int) -> list[str]:
        return [f"{self.names[k]}_at = load_i64(segment + {layout.STATES + 8 * k})"]

    def whole(self, k: int) -> list[str]:
        return [f"{four(self.names[k])} = load_f32x4({self.names[k]}_at + 4 * i)"]

    def general(self, k: int) -> list[str]:
        return [f"{four(self.names[k])} = read4({self.names[k]}_at, i, n, whole)"]

    def decode(self, k: int) -> list[str]:
        """What was loaded in float32, subnormals as zero."""
        return [f"{self.names[k]}_{j} = flush({self.names[k]}_{j})" for j in ELEMENTS]

    def before_stores(self) -> list[str]:
        """What the stores of all states read."""
        return []

    def store(self, k: int) -> list[str]:
        return [f"store4({self.names[k]}_at, i, n, whole, {four(self.names[k])})"]


class Bfloat16States(States):
    """In bfloat16, two elements a word."""

    def whole(self, k: int) -> list[str]:
        return [f"{self.names[k]}_low, {self.names[k]}_high = load_u32x2({self.names[k]}_at + 2 * i)"]

    def general(self, k: int) -> list[str]:
        return [f"{self.names[k]}_low, {self.names[k]}_high = read4_halves({self.names[k]}_at, i, n, whole)"]

    def decode(self, k: int) -> list[str]:
        return [f"{four(self.names[k])} = bfloat16_of_words({self.names[k]}_low, {self.names[k]}_high)"]

    def before_stores(self) -> list[str]:
        return ["index = load_i64(segment + INDEX)", f"key = uint64(load_i64(scalars + {layout.KEY}))"]

    def store(self, k: int) -> list[str]:
        return [f"store4_bfloat16({self.names[k]}_at, i, n, whole, key, index, {k}, {four(self.names[k])})"]


class EightBitStates(States):
    """In 8 bits: words with a code of each element, and a scale for each block."""

    in_blocks = True

    def _is_signed(self, k: int) -> bool:
        return self.kinds[k] == "signed"

    def _load_scale(self, k: int) -> str:
        return f"{self.names[k]}_scale = load_u16({self.names[k]}_scales + 2 * (i // CODE_BLOCK))"

    def addresses(self, k: int) -> list[str]:
        scales = f"{self.names[k]}_scales = load_i64(segment + {layout.SCALES + 8 * k})"
        return [*super().addresses(k), scales]

    def whole(self, k: int) -> list[str]:
        words = f"load_u32x4({self.names[k]}_at + i - i % CODE_BLOCK + 16 * (i // 4 % 4))"
        return [f"{four(self.names[k] + '_word')} = {words}", self._load_scale(k)]

    def general(self, k: int) -> list[str]:
        smallest = SIGNED_SMALLEST_SCALE if self._is_signed(k) else UNSIGNED_SMALLEST_SCALE
        return [
            f"{four(self.names[k] + '_word')} = read4_codes({self.names[k]}_at, i, n)",
            f"{self.names[k]}_scale = uint32({smallest})",
            f"if i < n:\n    {self._load_scale(k)}",
        ]

    def decode(self, k: int) -> list[str]:
        lines = []
        for j in ELEMENTS:
            code = f"uint32(({self.names[k]}_word_{j} >> shift_of_code(i)) & 0xFF)"
            decoded = f"decode_code({code}, {self.names[k]}_scale, {self._is_signed(k)})"
            lines.append(f"{self.names[k]}_{j} = flush({decoded})")
        return lines

    def before_stores(self) -> list[str]:
        return [
            "index = load_i64(segment + INDEX)",
            f"key = uint64(load_i64(scalars + {layout.KEY}))",
            f"step = load_i32(scalars + {layout.STEP})",
        ]

    def store(self, k: int) -> list[str]:
        state = self.names[k]
        # elements past the end count as zero when the block's scale is chosen
        lines = [f"{state}_{j} = {state}_{j} if i + {j} < n else zero" for j in ELEMENTS]
        arguments = f"{state}_at, {state}_scales, i, n, key, index, step, {k}, {self._is_signed(k)}, {state}_scale"
        return [*lines, f"store4_coded({arguments}, {four(state)})"]


STATES: dict[str, type[States]] = {"float32": States, "bfloat16": Bfloat16States, "8bit": EightBitStates}
"""By the names of the formats."""
