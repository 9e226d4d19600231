"""The rule language: the text of a rule, read, checked and brought into the form that every generator starts from.

Rules are made of names, ``+ - * /``, unary minus, comparisons, conditional expressions, the functions in
`FUNCTIONS`, assignments, one final return, and ``if FLAG:`` on the rule's keyword-only arguments, which
the generator resolves: one kernel for every combination of flags, no branch in a loop. No literals: 1.0
is a double in C and in Numba, so that it would turn float32 arithmetic into float64. What does not depend
on the element is a host scalar.

Host functions (host scalars, trust ratios) are float64 and may also use literals and ``**``, and unpack a pair; host
scalars return ``dict(name=...)``.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fastopt._formats import STATE_DTYPES, Codec, common_codec
from fastopt.rules import gradient_stage
from fastopt.rules.spec import Spec

FUNCTIONS = ("sqrt", "sign", "fabs", "maximum", "minimum", "copysign")
STAGE_HYPERS = tuple(inspect.signature(gradient_stage.scalars).parameters)

RULE_NODES = (
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
HOST_NODES = (*RULE_NODES, ast.Constant, ast.Pow)


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

    def codec(self, state_dtype: str) -> Codec:
        """How its states are kept under `state_dtype`; float32 where it has none."""
        try:
            return common_codec(state_dtype, self.kinds)
        except ValueError as error:
            raise RuleError(f"{self.name}: {error}") from None

    def formats(self) -> list[str]:
        """Names of the formats that its states can be kept in."""
        return list(dict.fromkeys(self.codec(state_dtype).name for state_dtype in STATE_DTYPES))

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
    stage = returned_scalars(Function.parse(gradient_stage.scalars))
    own = [name for name in returned_scalars(Function.parse(spec.scalars)) if name not in spec.running]
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
        body = specialise(Function.parse(gradient_stage.scale), {}, ["g"])
        body += specialise(stage, stage_flags, ["p", "g"])
        if spec.trust == "update":
            body += specialise(Function.parse(gradient_stage.before_update), {}, ["p", "weight"])
        body += specialise(rule, {**spec.fixed_flags, **flags}, expected)
        if spec.trust == "update":
            body += specialise(Function.parse(gradient_stage.after_update), stage_flags, ["update"])
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


def clip() -> list[Assignment]:
    """What clipping by value does to an element of a gradient, in steps that ask for it: scaling it comes first."""
    functions: tuple[Callable, ...] = (gradient_stage.scale, gradient_stage.clamp)
    return [made for function in functions for made in specialise(Function.parse(function), {}, ["g"])]


def specialise(function: Function, flags: Mapping[str, bool], returned: list[str]) -> list[Assignment]:
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
            function.check_expression(statement.value, RULE_NODES, known)
            known.add(target)
            result.append(Assignment(target, statement.value))

    visit(statements)
    return result


def returned_scalars(function: Function) -> dict[str, ast.expr]:
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


def hyper_slots(spec: Spec) -> list[tuple[str, int]]:
    """Layout of the float64 hyperparameters that the compiled host scalars read: (name, width)."""
    own = [(name, spec.hypers[name].kind.slots) for name in spec.scalar_hypers]
    return [(name, 1) for name in STAGE_HYPERS] + [(n, w) for n, w in own if n not in STAGE_HYPERS]
