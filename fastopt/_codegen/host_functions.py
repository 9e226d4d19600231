"""Host functions -> Cython text: host scalars and trust ratios, in float64."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Mapping

from fastopt._codegen.language import HOST_NODES, Function, hyper_slots, returned_scalars, scalar_names
from fastopt.rules import gradient_stage
from fastopt.rules.spec import Spec


class _ToCythonDouble(ast.NodeTransformer):
    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Pow):
            return ast.Call(ast.Name("pow", ast.Load()), [node.left, node.right], [])
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Constant(float(ast.literal_eval(node)))


def _host_statements(
    function: Function, inputs: Mapping[str, list[str]], prefix: str
) -> tuple[list[str], Callable[[ast.expr], str]]:
    """The body of a host function but its return, in Cython; and a translator of expressions in its names.

    `inputs` says where its arguments come from: an argument without a source is a parameter of the same name. Local
    names get `prefix`.
    """
    lines = []
    declared = set()
    known = set(function.arguments)
    renamed = {name: f"{prefix}{name}" for name in function.arguments}

    def translate(expression: ast.expr) -> str:
        function.check_expression(expression, HOST_NODES, known)
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


def cython_scalars(spec: Spec) -> str:
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
        for name, value in returned_scalars(function).items():
            sources[name] = translate(value)
    lines += [f"scalars[{k}] = <float>({sources[name]})  # {name}" for k, name in enumerate(scalar_names(spec))]
    lines += [f"running[{k}] = {sources[name]}" for k, name in enumerate(spec.running)]
    return f"""
cdef void {spec.rule_name}_scalars(
    const double* hyper, double step, double* running, float* scalars
) noexcept nogil:
{textwrap.indent(chr(10).join(lines), " " * 4)}
"""


def cython_trust(spec: Spec) -> str:
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


def cython_host_function(made_from: Callable) -> str:
    """A function of the gradient stage that returns a number, or writes the numbers that it returns into `new_...`."""
    function = Function.parse(made_from)
    lines, translate = _host_statements(function, {name: [] for name in function.arguments}, "")
    parameters = [f"double {name}" for name in function.arguments]
    last = function.body[-1]
    assert isinstance(last, ast.Return)
    if isinstance(last.value, ast.Call):
        returned, result = returned_scalars(function), "void"
        parameters += [f"double* new_{name}" for name in returned]
        lines += [f"new_{name}[0] = {translate(value)}" for name, value in returned.items()]
    else:
        assert last.value is not None
        result = "double"
        lines.append(f"return {translate(last.value)}")
    return f"""
cdef inline {result} {made_from.__name__}(
    {", ".join(parameters)}
) noexcept nogil:
{textwrap.indent(chr(10).join(lines), " " * 4)}
"""
