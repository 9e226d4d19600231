"""Rule text -> kernel text. At build time for Cython, in the tests for NumPy; loops come from `kernels/`.

The rule language: names, ``+ - * /``, unary minus, comparisons, conditional expressions, the functions in
`FUNCTIONS`, assignments, one final return, and ``if FLAG:`` on the rule's keyword-only arguments, which
the generator resolves: one kernel for every combination of flags, no branch in a loop. No literals: 1.0
is a double in C and in Numba, so that it would turn float32 arithmetic into float64. What does not depend
on the element is a host scalar.

Host scalars (`scalars`) are float64 and may also use literals and ``**``, and unpack a pair; they return
``dict(name=...)``.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastopt.rules import gradient_stage
from fastopt.rules.spec import Spec

FUNCTIONS = ("sqrt", "sign", "fabs", "maximum", "minimum", "copysign")
# How kernels are compiled. No contraction and no fast-math: a kernel's bits are those of its rule, one operation at
# a time. The other two only say that nobody reads errno or traps, without which sqrt and selections do not vectorize.
FLAGS = (
    *("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    "--param=max-completely-peel-times=8",  # or GCC unrolls a loop of 16 before it thinks of vectors
)
STAGE_HYPERS = tuple(inspect.signature(gradient_stage.scalars).parameters)

_RULE_NODES = (
    ast.Name,
    ast.Load,
    ast.Store,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.UnaryOp,
    ast.USub,
    ast.Compare,
    ast.Eq,
    ast.NotEq,
    ast.Lt,
    ast.LtE,
    ast.Gt,
    ast.GtE,
    ast.IfExp,
    ast.Call,
)
_SCALARS_NODES = (*_RULE_NODES, ast.Constant, ast.Pow)


class RuleError(ValueError):
    """A rule or its host scalars use something that the rule language does not have."""


@dataclass(frozen=True)
class Function:
    """The parsed text of one Python function."""

    name: str
    file: str
    first_line: int
    tree: ast.FunctionDef

    @classmethod
    def parse(cls, function: Callable) -> Function:
        lines, first_line = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        return cls(function.__qualname__, inspect.getsourcefile(function) or "?", first_line, tree)

    @property
    def arguments(self) -> list[str]:
        return [argument.arg for argument in self.tree.args.args]

    @property
    def flags(self) -> list[str]:
        return [argument.arg for argument in self.tree.args.kwonlyargs]

    @property
    def body(self) -> list[ast.stmt]:
        """The statements, without the docstring."""
        first = self.tree.body[0]
        documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        return self.tree.body[1:] if documented else self.tree.body

    def error(self, node: ast.AST, message: str) -> RuleError:
        line = self.first_line + getattr(node, "lineno", 1) - 1
        return RuleError(f"{self.file}:{line}: {self.name}: {message}")

    def check_expression(self, expression: ast.expr, allowed: tuple[type, ...], known: Iterable[str]) -> None:
        """Raise RuleError unless `expression` is made of `allowed` nodes and `known` names."""
        called = {id(node.func) for node in ast.walk(expression) if isinstance(node, ast.Call)}
        for node in ast.walk(expression):
            if isinstance(node, ast.Constant) and ast.Constant not in allowed:
                raise self.error(node, f"no literals in a rule: make {ast.unparse(node)} a host scalar")
            if not isinstance(node, allowed):
                place = node if hasattr(node, "lineno") else expression
                raise self.error(place, f"{type(node).__name__} is not part of the rule language")
            if isinstance(node, ast.Call) and not (
                isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
            ):
                raise self.error(node, f"only {', '.join(FUNCTIONS)} may be called, got {ast.unparse(node)}")
            if isinstance(node, ast.Compare) and len(node.ops) != 1:
                raise self.error(node, f"one comparison at a time, got {ast.unparse(node)}")
            if isinstance(node, ast.Name) and id(node) not in called and node.id not in known:
                raise self.error(node, f"unknown name {node.id!r}")

    def target(self, statement: ast.stmt) -> str:
        """Name that the assignment `statement` binds."""
        if not (
            isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
        ):
            raise self.error(statement, f"expected `name = expression`, got {ast.unparse(statement)!r}")
        return statement.targets[0].id


@dataclass(frozen=True)
class Assignment:
    """``name = expression`` in a specialised rule."""

    name: str
    expression: ast.expr

    def reads(self) -> set[str]:
        return {node.id for node in ast.walk(self.expression) if isinstance(node, ast.Name)} - set(FUNCTIONS)


@dataclass(frozen=True)
class Kernel:
    """A rule with its flags resolved, preceded by the gradient stage: what one loop computes."""

    name: str
    states: tuple[str, ...]
    """State arrays it reads and writes, in the order of the optimizer's `states`."""
    kinds: tuple[str, ...]
    """What they hold (`STATE_KINDS`)."""
    scalars: tuple[str, ...]
    """Host scalars of the optimizer, used here or not, in the order in which they are passed."""
    body: tuple[Assignment, ...]
    gives_update: bool = False
    """Whether it writes the update into a stream of its own and leaves p to the engine, for a trust ratio."""

    @property
    def streams(self) -> tuple[str, ...]:
        return ("p", "g", *self.states, *(("update",) if self.gives_update else ()))

    @property
    def loaded(self) -> tuple[str, ...]:
        """Streams that are read."""
        return ("p", "g", *self.states)

    @property
    def stored(self) -> tuple[str, ...]:
        """Streams that are written; never the gradient."""
        assigned = {assignment.name for assignment in self.body} - {"g"}
        return tuple(n for n in self.streams if n in assigned and not (n == "p" and self.gives_update))

    @property
    def bytes_moved(self) -> int:
        """Bytes of memory that a step reads and writes for each parameter, the passes of a trust ratio included."""
        once = len(self.loaded) + len(self.stored)
        apply = 3 if self.gives_update else 0  # reads p and update, writes p
        measure = 2 if "trust" in self.used_scalars else 0  # reads p and g
        return 4 * (once + apply + measure)

    @property
    def used_scalars(self) -> tuple[str, ...]:
        read = set().union(*(assignment.reads() for assignment in self.body))
        return tuple(name for name in self.scalars if name in read)

    @property
    def temporaries(self) -> tuple[str, ...]:
        names = dict.fromkeys(assignment.name for assignment in self.body)
        return tuple(name for name in names if name not in self.streams)


def scalar_names(spec: Spec) -> tuple[str, ...]:
    """Names of the host scalars that `spec`'s kernels take, in order: the gradient stage's, then its own."""
    stage = _returned(Function.parse(gradient_stage.scalars))
    own = [name for name in _returned(Function.parse(spec.scalars)) if name not in spec.running]
    if clash := set(stage) & set(own):
        raise RuleError(f"{spec.name}: scalars {sorted(clash)} are names of the gradient stage")
    return (*stage, *own)


def kernels(spec: Spec) -> list[Kernel]:
    """Every distinct kernel of `spec`: one for each combination of flags that changes its text."""
    rule = Function.parse(spec.rule)
    stage = Function.parse(gradient_stage.rule)
    scalars = scalar_names(spec)
    expected = ["p", "g", *spec.rule_states]
    if rule.arguments[: len(expected)] != expected:
        raise rule.error(rule.tree, f"must start with the arguments {', '.join(expected)}")
    for name in rule.arguments[len(expected) :]:
        if name not in scalars:
            raise rule.error(rule.tree, f"argument {name!r} is neither a state nor a host scalar")
    found: dict[str, Kernel] = {}
    regularizable = "weight_decay" in spec.hypers or "l1" in spec.hypers
    for regularized, flags in itertools.product((False, True)[: 1 + regularizable], spec.flag_choices()):
        stage_flags = {"regularized": regularized, "trusted": spec.trust == "gradient"}
        body = _specialise(stage, stage_flags, ["p", "g"])
        if spec.trust == "update":
            body += _specialise(Function.parse(gradient_stage.before_update), {}, ["p", "weight"])
        body += _specialise(rule, {**spec.fixed_flags, **flags}, expected)
        if spec.trust == "update":
            body += _specialise(Function.parse(gradient_stage.after_update), stage_flags, ["update"])
        touched = {assignment.name for assignment in body}.union(*(a.reads() for a in body))
        states = tuple(name for name in spec.rule_states if name in touched)
        text = "\n".join(f"{a.name} = {ast.unparse(a.expression)}" for a in body)
        name = spec.kernel_name(flags, regularized)
        declared = spec.states_for(flags)
        if states != declared:
            raise rule.error(rule.tree, f"with {flags} uses the states {states}, but declares {declared}")
        assigned = {assignment.name for assignment in body}
        if missing := [state for state in states if state not in assigned]:
            raise rule.error(rule.tree, f"with {flags} reads the states {missing}, but does not update them")
        kinds = tuple(spec.kinds[state] for state in states)
        found.setdefault(text, Kernel(name, states, kinds, scalars, tuple(body), spec.trust == "update"))
    return list(found.values())


def _specialise(function: Function, flags: Mapping[str, bool], returned: list[str]) -> list[Assignment]:
    """The assignments that `function` comes down to under `flags`; check its text on the way."""
    *statements, last = function.body
    value = last.value if isinstance(last, ast.Return) else None
    names = value.elts if isinstance(value, ast.Tuple) else [value]
    if [name.id for name in names if isinstance(name, ast.Name)] != [n for n in returned if n != "g"] and [
        name.id for name in names if isinstance(name, ast.Name)
    ] != returned:
        raise function.error(last, f"must end with `return {', '.join(n for n in returned if n != 'g')}`")
    result: list[Assignment] = []
    known = set(function.arguments)

    def visit(statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.If):
                if not (isinstance(statement.test, ast.Name) and statement.test.id in flags):
                    raise function.error(statement, "`if` is for flags (keyword-only arguments) alone")
                visit(statement.body if flags[statement.test.id] else statement.orelse)
                continue
            target = function.target(statement)
            assert isinstance(statement, ast.Assign)
            function.check_expression(statement.value, _RULE_NODES, known)
            known.add(target)
            result.append(Assignment(target, statement.value))

    visit(statements)
    return result


def _returned(function: Function) -> dict[str, ast.expr]:
    """The final ``return dict(name=...)`` of a scalars function."""
    last = function.body[-1]
    if not (
        isinstance(last, ast.Return)
        and isinstance(last.value, ast.Call)
        and isinstance(last.value.func, ast.Name)
        and last.value.func.id == "dict"
        and not last.value.args
    ):
        raise function.error(last, "must end with `return dict(name=..., ...)`")
    return {str(keyword.arg): keyword.value for keyword in last.value.keywords}


# --- NumPy ------------------------------------------------------------------------------------------------


class _ToNumPy(ast.NodeTransformer):
    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        return ast.Call(ast.Name("where", ast.Load()), [node.test, node.body, node.orelse], [])


def numpy_source(kernel: Kernel) -> str:
    """Text of a Python function that evaluates `kernel` on whole arrays, one operation at a time."""
    lines = [f"def {kernel.name}({', '.join([*kernel.loaded, *kernel.used_scalars])}):"]
    for assignment in kernel.body:
        expression = _ToNumPy().visit(ast.parse(ast.unparse(assignment.expression), mode="eval").body)
        lines.append(f"    {assignment.name} = {ast.unparse(expression)}")
    lines.append(f"    return {', '.join(kernel.stored)},")
    return "\n".join(lines) + "\n"


# --- Cython -----------------------------------------------------------------------------------------------


class _ToCython(ast.NodeTransformer):
    """C names of the functions; float64 literals and pow() in host scalars."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        assert isinstance(node.func, ast.Name)
        return ast.Call(ast.Name(f"{node.func.id}_f32", ast.Load()), node.args, [])

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        return ast.Call(ast.Name("select_f32", ast.Load()), [node.test, node.body, node.orelse], [])


class _ToCythonDouble(ast.NodeTransformer):
    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Pow):
            return ast.Call(ast.Name("pow", ast.Load()), [node.left, node.right], [])
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Constant(float(ast.literal_eval(node)))


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


def _cython_kernel(kernel: Kernel) -> str:
    """The tile functions of `kernel`, one for each type of state, and the loops they are made of."""
    text = _float32_tile(kernel)
    if kernel.states:
        text += _bfloat16_tile(kernel)
    if _is_coded(kernel):
        text += _coded_tile(kernel)
    return text


def _tile_names(kernel: Kernel) -> tuple[str, str, str]:
    """Names of its tile functions for states in float32, bfloat16 and 8 bits."""
    float32 = f"{kernel.name}_tile"
    bfloat16 = f"{kernel.name}_bfloat16_tile" if kernel.states else float32
    return float32, bfloat16, f"{kernel.name}_coded_tile" if _is_coded(kernel) else bfloat16


def _is_coded(kernel: Kernel) -> bool:
    """Whether it has states that 8 bits can hold; weights take bfloat16 at least."""
    weights = [kind == "weights" for kind in kernel.kinds]
    if any(weights) and not all(weights):
        raise RuleError(f"{kernel.name}: states of weights beside others cannot be kept in 8 bits")
    return bool(kernel.states) and not any(weights)


def _indented(lines: Iterable[str], indent: int) -> str:
    return textwrap.indent("\n".join(lines), " " * indent)


def _float32_tile(kernel: Kernel) -> str:
    arguments = [f"stream {name}_stream" for name in kernel.streams]
    arguments += ["Py_ssize_t n", *(f"float {name}" for name in kernel.used_scalars)]
    values = ", ".join([*kernel.streams, *kernel.temporaries])
    body = [f"{name} = {name}_stream[i]" for name in kernel.loaded]
    body += [f"{a.name} = {_cython(a.expression, _ToCython)}" for a in kernel.body]
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
    arguments += ["const uint32_t* lanes", "Py_ssize_t n", *(f"float {name}" for name in kernel.used_scalars)]
    values = ", ".join([*kernel.streams, *kernel.temporaries])
    body = [f"{stream} = {stream}_stream[i]" for stream in ("p", "g")]
    body += [f"{state} = bfloat16_to_f32({state}_stream[i])" for state in kernel.states]
    body += [f"{a.name} = {_cython(a.expression, _ToCython)}" for a in kernel.body]
    body += [f"{stream}_stream[i] = {stream}" for stream in kernel.stored if stream not in kernel.states]
    body += [
        f"{state}_stream[i] = f32_to_bfloat16_dithered({state}, lanes[i] ^ {state}_random)" for state in kernel.states
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
    at += [f"dither_of_state(bits, {k}) >> 4" for k in range(len(kernel.states))]

    def call(lanes: str, n: str, indent: int) -> str:
        return f"{name}_span(\n{_wrapped([*at, lanes, n, *kernel.used_scalars], indent + 4)}\n{' ' * indent})"

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
    cdef Py_ssize_t lane, length
    cdef uint64_t bits
    while at < n:
        lane = (context.index + start + at) & (BLOCK - 1)
        length = min(BLOCK - lane, n - at)
        bits = dither_bits(context, context.index + start + at - lane)
        if length == BLOCK:
{_indented(prefetch, 12)}
            {call("LANES_OF_16_BITS", "BLOCK", 12)}
        else:
            {call("LANES_OF_16_BITS + lane", "length", 12)}
        at += length
"""


def _coded_tile(kernel: Kernel) -> str:
    """A full block of 64 elements, as 16 words of 4 codes for every state, and the tile around it."""
    name = f"{kernel.name}_coded"
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
        body += [f"{a.name} = {_cython(a.expression, _ToCython)}" for a in kernel.body]
        body += [f"{stream}_stream[{at}] = {stream}" for stream in kernel.stored]
        for state in kernel.states:
            if is_signed[state]:
                body += [
                    f"{state}_encoded = encode_signed({state}, LANES_OF_20_BITS[{at}], {state}_code, masks)",
                    f"over_signed |= {state}_encoded",
                    f"{state}_made |= signed_byte({state}_encoded, {state}, {j}, masks)",
                ]
            else:
                body += [
                    f"{state}_encoded = encode_unsigned({state}, LANES_OF_20_BITS[{at}], {state}_code)",
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


def _host_statements(
    function: Function, inputs: Mapping[str, list[str]], prefix: str
) -> tuple[list[str], Callable[[ast.expr], str]]:
    """The body of a host function but its return, in Cython; and a translator of expressions in its names.

    `inputs` says where its arguments come from; their local names get `prefix`.
    """
    lines = []
    declared = set()
    known = set(function.arguments)
    renamed = {name: f"{prefix}{name}" for name in function.arguments}

    def translate(expression: ast.expr) -> str:
        function.check_expression(expression, _SCALARS_NODES, known)
        return _double(expression, renamed)

    for name in function.arguments:
        if name not in inputs:
            raise function.error(function.tree, f"argument {name!r} is no hyperparameter and not from the engine")
        if len(inputs[name]) == 1:
            lines.append(f"cdef double {prefix}{name} = {inputs[name][0]}")
            declared.add(name)
    for statement in function.body[:-1]:
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Tuple)
            and isinstance(statement.value, ast.Name)
        ):
            names = [ast.unparse(target) for target in statement.targets[0].elts]
            values = inputs.get(statement.value.id, [])
        else:
            names = [function.target(statement)]
            assert isinstance(statement, ast.Assign)
            values = [translate(statement.value)]
        if len(names) != len(values):
            raise function.error(statement, f"cannot unpack {ast.unparse(statement)!r}")
        for name, value in zip(names, values, strict=True):
            renamed[name] = f"{prefix}{name}"
            lines.append(f"{'' if name in declared else 'cdef double '}{prefix}{name} = {value}")
            known.add(name)
            declared.add(name)
    return lines, translate


def _hyper_inputs(spec: Spec) -> dict[str, list[str]]:
    """Where the compiled host functions find each hyperparameter."""
    inputs = {}
    slot = 0
    for name, width in hyper_slots(spec):
        inputs[name] = [f"hyper[{slot + k}]" for k in range(width)]
        slot += width
    return inputs


def _cython_scalars(spec: Spec) -> str:
    """The function that computes the host scalars of `spec`."""
    inputs = _hyper_inputs(spec)
    inputs |= {name: [f"running[{k}]"] for k, name in enumerate(spec.running)}
    sources = {}
    lines = []
    for prefix, function in (
        ("stage_", Function.parse(gradient_stage.scalars)),
        ("own_", Function.parse(spec.scalars)),
    ):
        statements, translate = _host_statements(function, inputs | {"step": ["step"]}, prefix)
        lines += statements
        for name, value in _returned(function).items():
            sources[name] = translate(value)
    lines += [f"scalars[{k}] = <float>({sources[name]})  # {name}" for k, name in enumerate(scalar_names(spec))]
    lines += [f"running[{k}] = {sources[name]}" for k, name in enumerate(spec.running)]
    return f"""
cdef void {spec.rule_name}_scalars(
    const double* hyper, double step, double* running, float* scalars
) noexcept nogil:
{textwrap.indent(chr(10).join(lines), " " * 4)}
"""


def _cython_trust(spec: Spec) -> str:
    """The function that computes the trust ratio of `spec`, if it has one."""
    if spec.trust is None:
        return ""
    function = Function.parse(spec.cls.trust_ratio)
    given = {"p_norm": ["p_norm_"], f"{spec.trust}_norm": ["other_norm"]}
    lines, translate = _host_statements(function, _hyper_inputs(spec) | given, "own_")
    last = function.body[-1]
    if not isinstance(last, ast.Return) or last.value is None:
        raise function.error(last, "must end with `return ratio`")
    lines.append(f"return {translate(last.value)}")
    return f"""
cdef double {spec.rule_name}_trust(const double* hyper, double p_norm_, double other_norm) noexcept nogil:
{textwrap.indent(chr(10).join(lines), " " * 4)}
"""


def _double(expression: ast.expr, renamed: Mapping[str, str]) -> str:
    copy = ast.parse(ast.unparse(expression), mode="eval").body
    for node in ast.walk(copy):
        if isinstance(node, ast.Name):
            node.id = renamed.get(node.id, node.id)
    return ast.unparse(_ToCythonDouble().visit(copy))


def hyper_slots(spec: Spec) -> list[tuple[str, int]]:
    """Layout of the float64 hyperparameters that the compiled host scalars read: (name, width)."""
    own = [(name, spec.hypers[name].kind.slots) for name in spec.scalar_hypers]
    return [(name, 1) for name in STAGE_HYPERS] + [(n, w) for n, w in own if n not in STAGE_HYPERS]


def stage_positions() -> str:
    """Text of a C header: where the gradient stage's host scalars and hyperparameters stand among those of a kernel."""
    names = {"SCALAR": _returned(Function.parse(gradient_stage.scalars)), "HYPER": STAGE_HYPERS}
    text = "/* Generated from fastopt/gradient_stage.py. Not to be edited. */\n"
    for prefix, ordered in names.items():
        text += "enum {\n" + "".join(f"    {prefix}_{name.upper()},\n" for name in ordered) + "};\n"
    return text


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
        text.append(_cython_scalars(spec))
        text.append(_cython_trust(spec))
        trust = f"{spec.rule_name}_trust" if spec.trust else "NULL"
        for kernel in kernels(spec):
            text.append(_cython_kernel(kernel))
            table.append(
                f"KERNELS[{kernel.name!r}] = make_kernel(\n    {', '.join(_tile_names(kernel))},\n"
                f"    {spec.rule_name}_scalars, {trust}, {kernel.states!r}, {len(kernel.scalars)},\n)"
            )
    source = template.read_text(encoding="utf-8")
    return source.replace("{{isa}}", isa).replace("{{kernels}}", "\n".join(text)).replace("{{table}}", "\n".join(table))
