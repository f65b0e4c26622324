"""The metres of the code: what a reader has to take in at once. Measured on the package as it is exported, private code included.

Widths and statements are measured in the notebooks (test_notebook_style). Bodies of compiled kernels do not count as operations: there a
loop over numbers is the point.
"""
import ast
import statistics
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "qcal_nb"
OPERATIONS = (
    ast.Call, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
    ast.IfExp, ast.Lambda, ast.NamedExpr,
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources() -> dict[str, str]:
    found = {p.relative_to(PACKAGE).as_posix(): p for p in sorted(PACKAGE.rglob("*.py"))}
    return {name: p.read_text(encoding="utf-8") for name, p in found.items() if p.name != "_modidx.py" and not name.startswith("data/")}


def functions(source: str) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(ast.parse(source)) if isinstance(n, FUNCTIONS)]


def is_compiled(function) -> bool: return any("njit" in ast.unparse(d) for d in function.decorator_list)


def operations(function) -> int:
    "Calls, operators, subscripts and comprehensions of a function, without those of the functions inside it."
    count = 0
    todo = list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop()
        count += isinstance(node, OPERATIONS)
        if not isinstance(node, FUNCTIONS): todo += ast.iter_child_nodes(node)
    return count


def lines(function) -> int: return function.end_lineno - function.lineno + 1


def packs(node) -> bool:
    "`a, b = x, y`: one line that says two unrelated things."
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
