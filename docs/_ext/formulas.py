"""Formulas of docstrings, which are Python, as TeX: ``v = beta2 * v + (1 - beta2) * g**2`` in Greek, with fractions."""

import ast
import re

GREEK = {"alpha", "beta", "eta", "mu", "rho"}
SYMBOLS = {"eps": r"\epsilon", "lambd": r"\lambda"}
FUNCTIONS = {
    "sqrt": r"\sqrt{%s}",
    "norm": r"\lVert %s \rVert",
    "abs": r"\lvert %s \rvert",
    "maximum": r"\max(%s, %s)",
    "minimum": r"\min(%s, %s)",
    "sign": r"\operatorname{sign}(%s)",
}
RELATIONS = {ast.Gt: ">", ast.GtE: r"\ge", ast.Lt: "<", ast.LtE: r"\le", ast.Eq: "=", ast.NotEq: r"\ne"}


def formula(text):
    """TeX of some lines of Python, a row for each.

    Raises
    ------
    ValueError
        If they are no formula: no Python, or something for which there is no notation here.
    """
    lines = text.splitlines()

    def comment(statement):
        label, _, words = lines[statement.lineno - 1].partition("  # ")[2].partition(": ")
        return rf" \quad \text{{({label}: }} {_tex(ast.parse(words, mode='eval').body)} \text{{)}}" if words else ""

    def rows(statements, margin=""):
        for statement in statements:
            if isinstance(statement, ast.If):
                yield rf"{margin}\text{{if }} & {_tex(statement.test)}"
                yield from rows(statement.body, margin + r"\qquad ")
                if statement.orelse:
                    yield rf"{margin}\text{{else}} &"
                    yield from rows(statement.orelse, margin + r"\qquad ")
            elif isinstance(statement, ast.Assign):
                value = _tex(statement.value) + comment(statement)
                yield rf"{margin}{_tex(statement.targets[0])} & \leftarrow {value}"
            else:
                raise ValueError(f"no formula has {type(statement).__name__}")

    try:
        return " \\\\\n".join(rows(ast.parse(text).body))
    except SyntaxError as error:
        raise ValueError(str(error)) from None


def symbol(name):
    """A name: Greek where it is spelt so, its number as an index, words upright."""
    if name in SYMBOLS:
        return SYMBOLS[name]
    letters, digits = re.fullmatch(r"(.*?)(\d*)", name).groups()
    if letters in GREEK:
        letters = f"\\{letters}"
    elif len(letters) > 1:
        letters = r"\mathrm{" + letters.replace("_", r"\_") + "}"
    return f"{letters}_{{{digits}}}" if digits else letters


def _tex(node, inside=False):
    """TeX of an expression; `inside` a fraction others are written with a slash."""
    match node:
        case ast.Name():
            return symbol(node.id)
        case ast.Constant():
            return str(node.value)
        case ast.Subscript():
            return f"{_tex(node.value)}_{{{_tex(node.slice)}}}"
        case ast.UnaryOp(op=ast.USub()):
            return f"-{_enclosed(node.operand, inside)}"
        case ast.Call(func=ast.Name(id=function)) if function in FUNCTIONS:
            return FUNCTIONS[function] % tuple(_tex(argument, inside) for argument in node.args)
        case ast.Compare(ops=[operation]):
            return f"{_tex(node.left)} {RELATIONS[type(operation)]} {_tex(node.comparators[0])}"
        case ast.Tuple():
            return r",\ ".join(map(_tex, node.elts))
        case ast.GeneratorExp(generators=[loop]):
            return rf"{_tex(node.elt)} \quad \text{{for }} {_tex(loop.target)} = {_tex(loop.iter)}"
        case ast.BinOp(op=ast.Pow()):
            is_plain = isinstance(node.left, ast.Name | ast.Constant)
            base = _tex(node.left) if is_plain else f"({_tex(node.left, inside)})"
            return f"{base}^{{{_tex(node.right, True)}}}"
        case ast.BinOp(op=ast.Add()):
            return f"{_tex(node.left, inside)} + {_tex(node.right, inside)}"
        case ast.BinOp(op=ast.Sub()):
            return f"{_tex(node.left, inside)} - {_enclosed(node.right, inside)}"
        case ast.BinOp(op=ast.Mult() | ast.Div()):
            over, under = _factors(node)
            if not under:
                return _product(over, inside)
            if inside:
                is_plain = len(under) == 1 and (not isinstance(under[0], ast.BinOp) or isinstance(under[0].op, ast.Pow))
                divisor = _product(under, inside)
                return f"{_product(over, inside)} / {divisor if is_plain else f'({divisor})'}"
            return rf"\frac{{{_product(over, True)}}}{{{_product(under, True)}}}"
    raise ValueError(f"no formula has {ast.unparse(node)}")


def _enclosed(node, inside):
    """In brackets if it is a sum."""
    is_sum = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)
    return f"({_tex(node, inside)})" if is_sum else _tex(node, inside)


def _factors(node):
    """What ``a / b * c / d`` has over the line, and what under it."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div)):
        return [node], []
    over, under = _factors(node.left)
    return ([*over, node.right], under) if isinstance(node.op, ast.Mult) else (over, [*under, node.right])


def _product(factors, inside):
    if len(factors) == 1:
        return _tex(factors[0], inside)
    texts = [_enclosed(factor, inside) for factor in factors]
    return texts[0] + "".join((r" \cdot " if text[0].isdigit() else r"\, ") + text for text in texts[1:])
