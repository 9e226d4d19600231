"""Rule text -> the Cython text of a module of kernels: the loops over a tile, one for each type of state.

What loops run over, and the stages around them, is written by hand in `kernels/`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from pathlib import Path

from fastopt._codegen import host_functions
from fastopt._codegen.language import Assignment, Kernel, clip, kernels
from fastopt._formats import STATE_DTYPES
from fastopt._formats.constants import RANDOM_BITS
from fastopt.rules.spec import Spec


class _ToCython(ast.NodeTransformer):
    """C names of the functions, and a selection for a branch."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        assert isinstance(node.func, ast.Name)
        return ast.Call(ast.Name(f"{node.func.id}_f32", ast.Load()), node.args, [])

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        return ast.Call(ast.Name("select_f32", ast.Load()), [node.test, node.body, node.orelse], [])


def _cython(expression: ast.expr, transformer: type[ast.NodeTransformer]) -> str:
    copy = ast.parse(ast.unparse(expression), mode="eval").body
    return ast.unparse(transformer().visit(copy))


def _wrapped(items: Iterable[str], indent: int) -> str:
    """`items` as the lines between two brackets, comma-separated."""
    margin = " " * indent
    text = ", ".join(item.replace(" ", "\0") for item in items)
    lines = textwrap.fill(text, 110, initial_indent=margin, subsequent_indent=margin, break_long_words=False)
    return lines.replace("\0", " ")


_TILE_ARGUMENTS = (
    "float* p, const float* g, void* const* states, uint16_t* const* scales, Py_ssize_t start, Py_ssize_t n,\n"
    "    const float* scalars, const tile_context* context"
)


def kernel_source(kernel: Kernel) -> str:
    """The tile functions of `kernel`, one for each format of its states, and the loops they are made of."""
    return "".join(_TILES[name](kernel) for name in kernel.formats())


def _tile_name(kernel: Kernel, codec: str) -> str:
    """Name of its tile function for states in the format of this name."""
    return f"{kernel.name}_tile" if codec == "float32" else f"{kernel.name}_{codec}_tile"


def _indented(lines: Iterable[str], indent: int) -> str:
    return textwrap.indent("\n".join(lines), " " * indent)


def _float32_tile(kernel: Kernel) -> str:
    arguments = [f"stream {name}_stream" for name in kernel.streams]
    arguments += ["Py_ssize_t n", *(f"float {name}" for name in kernel.used_scalars)]
    values = ", ".join([*kernel.streams, *kernel.temporaries])
    body = [f"{name} = {name}_stream[i]" for name in kernel.loaded]
    body += _statements(kernel.body)
    body += [f"{name}_stream[i] = {name}" for name in kernel.stored]
    unpack = ["cdef stream p_stream = p", "cdef stream g_stream = <stream>g"]
    unpack += [f"cdef stream {name}_stream = <stream>states[{k}] + start" for k, name in enumerate(kernel.streams[2:])]
    unpack += [f"cdef float {name} = scalars[{kernel.scalars.index(name)}]" for name in kernel.used_scalars]
    prefetch = [f"prefetch_line({name}_stream + at, context.distance)" for name in kernel.streams]
    at = [f"{name}_stream + at" for name in kernel.streams]

    def call(n: str, indent: int) -> str:
        return f"{kernel.name}_span(\n{_wrapped([*at, n, *kernel.used_scalars], indent + 4)}\n{' ' * indent})"

    return f"""
cdef inline void {kernel.name}_span(
{_wrapped(arguments, 4)}
) noexcept nogil:
    cdef float {values}
    cdef Py_ssize_t i
    for i in range(n):
{_indented(body, 8)}


cdef void {kernel.name}_tile(
    {_TILE_ARGUMENTS}
) noexcept nogil:
{_indented(unpack, 4)}
    cdef Py_ssize_t at = 0
    while at + LINE <= n:
{_indented(prefetch, 8)}
        {call("LINE", 8)}
        at += LINE
    {call("n - at", 4)}
"""


def _bfloat16_tile(kernel: Kernel) -> str:
    """Walks in blocks of 64 of the optimizer's elements, which share their random bits."""
    name = f"{kernel.name}_bfloat16"
    of_type = {stream: "halves" if stream in kernel.states else "stream" for stream in kernel.streams}
    arguments = [f"{of_type[stream]} {stream}_stream" for stream in kernel.streams]
    arguments += [f"uint32_t {state}_random" for state in kernel.states]
    arguments += ["const uint32_t* strata", "Py_ssize_t n", *(f"float {name}" for name in kernel.used_scalars)]
    values = ", ".join([*kernel.streams, *kernel.temporaries])
    body = [f"{stream} = {stream}_stream[i]" for stream in ("p", "g")]
    body += [f"{state} = bfloat16_to_f32({state}_stream[i])" for state in kernel.states]
    body += _statements(kernel.body)
    body += [f"{stream}_stream[i] = {stream}" for stream in kernel.stored if stream not in kernel.states]
    body += [
        f"{state}_stream[i] = f32_to_bfloat16_dithered({state}, strata[i] ^ {state}_random)" for state in kernel.states
    ]
    unpack = ["cdef stream p_stream = p", "cdef stream g_stream = <stream>g"]
    unpack += [
        f"cdef {of_type[stream]} {stream}_stream = <{of_type[stream]}>states[{k}] + start"
        for k, stream in enumerate(kernel.streams[2:])
    ]
    unpack += [f"cdef float {name} = scalars[{kernel.scalars.index(name)}]" for name in kernel.used_scalars]
    fetch = {"halves": "prefetch_bfloat16", "stream": "prefetch_block"}
    prefetch = [f"{fetch[of_type[stream]]}({stream}_stream + at, context.distance)" for stream in kernel.streams]
    at = [f"{stream}_stream + at" for stream in kernel.streams]
    at += [f"dither_of_state(bits, {k}) >> {RANDOM_BITS - 16}" for k in range(len(kernel.states))]

    def call(strata: str, n: str, indent: int) -> str:
        return f"{name}_span(\n{_wrapped([*at, strata, n, *kernel.used_scalars], indent + 4)}\n{' ' * indent})"

    return f"""

cdef inline void {name}_span(
{_wrapped(arguments, 4)}
) noexcept nogil:
    cdef float {values}
    cdef Py_ssize_t i
    for i in range(n):
{_indented(body, 8)}


cdef void {name}_tile(
    {_TILE_ARGUMENTS}
) noexcept nogil:
{_indented(unpack, 4)}
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t place, length
    cdef uint64_t bits
    while at < n:
        place = (context.index + start + at) & (CODE_BLOCK - 1)
        length = min(CODE_BLOCK - place, n - at)
        bits = dither_bits(context, context.index + start + at - place)
        if length == CODE_BLOCK:
{_indented(prefetch, 12)}
            {call("STRATA_OF_16_BITS", "CODE_BLOCK", 12)}
        else:
            {call("STRATA_OF_16_BITS + place", "length", 12)}
        at += length
"""


def _8bit_tile(kernel: Kernel) -> str:
    """A full block of 64 elements, as 16 words of 4 codes for every state, and the tile around it."""
    name = f"{kernel.name}_8bit"
    is_signed = {state: kind == "signed" for state, kind in zip(kernel.states, kernel.kinds, strict=True)}
    arguments = ["stream p_stream", "stream g_stream"]
    passed = ["p", "<stream>g"]
    if kernel.gives_update:
        arguments.append("stream update_stream")
        passed.append("update")
    locals_ = []
    for k, state in enumerate(kernel.states):
        arguments += [f"words {state}_codes", f"stream {state}_stream", f"const block_code* {state}_code"]
        passed += [f"<words>codes[{k}]", f"values[{k}]", f"code + {k}"]
        locals_ += [f"cdef uint32_t {state}_word, {state}_made, {state}_encoded"]
    arguments += ["const float* scalars", "words overflow", "const code_masks* masks"]
    passed += ["scalars", "overflow", "masks"]
    body = [f"{scalar} = scalars[{kernel.scalars.index(scalar)}]" for scalar in kernel.used_scalars]
    for state in kernel.states:
        body += [f"{state}_word = {state}_codes[i]", f"{state}_made = 0"]
    body += ["over_signed = 0", "over_unsigned = 0"]
    for j in range(4):
        at = f"{16 * j} + i" if j else "i"
        body += [f"# element {at}", f"p = p_stream[{at}]", f"g = g_stream[{at}]"]
        for state in kernel.states:
            decode = "decode_signed" if is_signed[state] else "decode_unsigned"
            body += [f"{state} = {decode}({state}_word, {j}, {state}_code, masks)"]
        body += _statements(kernel.body)
        body += [f"{stream}_stream[{at}] = {stream}" for stream in kernel.stored]
        for state in kernel.states:
            if is_signed[state]:
                body += [
                    f"{state}_encoded = encode_signed({state}, STRATA_OF_20_BITS[{at}], {state}_code, masks)",
                    f"over_signed |= {state}_encoded",
                    f"{state}_made |= signed_byte({state}_encoded, {state}, {j}, masks)",
                ]
            else:
                body += [
                    f"{state}_encoded = encode_unsigned({state}, STRATA_OF_20_BITS[{at}], {state}_code)",
                    f"over_unsigned |= {state}_encoded",
                    f"{state}_made |= unsigned_byte({state}_encoded, {j}, masks)",
                ]
    body += [f"{state}_codes[i] = {state}_made" for state in kernel.states]
    body += ["overflow[i] = over_signed | over_unsigned >> 1"]
    values = ", ".join([*kernel.streams, *kernel.temporaries, *kernel.used_scalars])
    signs = [f"{name}_rule.is_signed[{k}] = {is_signed[state]}" for k, state in enumerate(kernel.states)]
    return f"""

cdef inline void {name}_span(
{_wrapped(arguments, 4)}
) noexcept nogil:
{_indented(locals_, 4)}
    cdef uint32_t over_signed, over_unsigned
    cdef float {values}
    cdef Py_ssize_t i
    for i in range(CODE_WORDS):
{_indented(body, 8)}


cdef void {name}_block(
    float* p, const float* g, void* const* codes, float* const* values, float* update, const block_code* code,
    const float* scalars, uint32_t* overflow, const code_masks* masks
) noexcept nogil:
    {name}_span(
{_wrapped(passed, 8)}
    )


cdef coded_rule {name}_rule
{name}_rule.block = {name}_block
{name}_rule.float32 = {kernel.name}_tile
{name}_rule.n_states = {len(kernel.states)}
{chr(10).join(signs)}


cdef void {name}_tile(
    {_TILE_ARGUMENTS}
) noexcept nogil:
    run_coded_tile(&{name}_rule, p, g, states, scales, start, n, scalars, context)
"""


_TILES = {"float32": _float32_tile, "bfloat16": _bfloat16_tile, "8bit": _8bit_tile}
"""By the names of the formats; the first is what others fall back to."""


def _statements(assignments: Iterable[Assignment]) -> list[str]:
    return [f"{assignment.name} = {_cython(assignment.expression, _ToCython)}" for assignment in assignments]


def cython_source(specs: Iterable[Spec], template: Path, isa: str) -> str:
    """Text of the Cython module that holds the kernels of `specs`, from the template in `kernels/`."""
    text: list[str] = []
    table: list[str] = []
    seen: set[str] = set()
    for spec in specs:
        if spec.rule_name in seen:
            continue
        seen.add(spec.rule_name)
        text.append(f"\n# {spec.rule_name}: from {Path(inspect.getfile(spec.rule)).name}\n")
        text.append(host_functions.cython_scalars(spec))
        text.append(host_functions.cython_trust(spec))
        trust = f"{spec.rule_name}_trust" if spec.trust else "NULL"
        for kernel in kernels(spec):
            text.append(kernel_source(kernel))
            tiles = [_tile_name(kernel, kernel.codec(state_dtype).name) for state_dtype in STATE_DTYPES]
            table.append(
                f"KERNELS[{kernel.name!r}] = make_kernel(\n    [{', '.join(tiles)}],\n"
                f"    {spec.rule_name}_scalars, {trust}, {kernel.states!r}, {len(kernel.scalars)},\n)"
            )
    source = template.read_text(encoding="utf-8")
    filled = {
        "isa": isa,
        "clip": _indented(_statements(clip()), 8).lstrip(),
        "kernels": "\n".join(text),
        "table": "\n".join(table),
    }
    for name, made in filled.items():
        source = source.replace("{{" + name + "}}", made)
    return source
