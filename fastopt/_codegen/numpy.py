"""Rule text -> NumPy text: what the tests compare every kernel with."""

from __future__ import annotations

import ast

from fastopt._codegen.language import Kernel


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
