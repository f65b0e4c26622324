"""The metres of the code: what a reader has to take in at once. Measured on the package as it is exported, private code
included.

Widths and statements are measured in the notebooks (test_notebook_style). Bodies of compiled kernels do not count as
operations: there a loop over numbers is the point.
"""
import ast
import statistics
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "qcal_nb"
OPERATIONS = (
    ast.Call, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.ListComp, ast.SetComp, ast.DictComp,
    ast.GeneratorExp,
    ast.IfExp, ast.Lambda, ast.NamedExpr,
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources() -> dict[str, str]:
    found = {p.relative_to(PACKAGE).as_posix(): p for p in sorted(PACKAGE.rglob("*.py"))}
    return {
        name: p.read_text(encoding="utf-8")
        for name, p in found.items() if p.name != "_modidx.py" and not name.startswith("data/")
    }


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


# What is not rewritten yet: sessions, what they record while they feed, and the panels. Their functions may be
# longer until they are.
LATER = ("session/", "widgets/", "records/collect", "records/observing")
MEDIAN, NINETIETH = 7, 20                  # operations a function
LONG, LONGEST, FEW = 25, 40, 10            # lines a function; how many may be longer than LONG


def measured(later: bool) -> list[tuple[str, ast.FunctionDef]]:
    texts = {name: text for name, text in sources().items() if name.startswith(LATER) == later}
    return [(f"{name}: {f.name}", f) for name, text in texts.items() for f in functions(text)]


def percentile(counts: list[int], share: float) -> int: return sorted(counts)[int(share * len(counts))]


def test_a_function_does_few_things():
    counts = [operations(f) for _, f in measured(later=False) if not is_compiled(f)]
    assert len(counts) > 500 and statistics.median(counts) <= MEDIAN and percentile(counts, 0.9) <= NINETIETH


def test_what_is_rewritten_later_gets_no_worse():
    counts = [operations(f) for _, f in measured(later=True) if not is_compiled(f)]
    assert statistics.median(counts) <= 10 and percentile(counts, 0.9) <= 25


def test_a_function_fits_the_eye():
    long = {name: lines(f) for name, f in measured(later=False) if lines(f) > LONG}
    assert len(long) <= FEW and max(long.values(), default=0) <= LONGEST, long


def test_an_assignment_says_one_thing():
    nodes = [n for text in sources().values() for n in ast.walk(ast.parse(text))]
    total = sum(len(text.splitlines()) for text in sources().values())
    assert sum(map(packs, nodes)) <= total / 200


@pytest.mark.parametrize("source, count", [
    ("def f(): return 1", 0), ("def f(x): return g(x)[0] + 1", 3),
    ("def f(x):\n    def g(y): return y + 1\n    return g(x)", 1),
    ("def f(x): return [y for y in x if y > 1]", 2), ("def f(x): return -x if x else not x", 3),
])
def test_operations_are_counted(source, count): assert operations(functions(source)[0]) == count


def test_packing_is_seen():
    assert [
        packs(ast.parse(line).body[0]) for line in ("a, b = x, y", "a, b = f()", "a = x, y")
    ] == [True, False, False]
