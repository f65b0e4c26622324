"""Imports run one way: a wing imports only wings above it in the list, and only through their doors.

A wing is a module or a folder of `qcal_nb/`; its door is its `__init__`. Packages for the screen come in at a known
height, packages for development never. Imports inside functions count, too; those for type checkers alone do not.
"""
import ast
import configparser
import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("qcal_tools_drift", ROOT/"tools"/"drift.py")
drift = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drift)

WINGS = (
    "schemes warn models stats histogram taps observers calibration modeling lifecycle pipelines recipes "
    "checkpoints records analysis evaluate forecasts plots view report session widgets workbench cli"
).split()
# package → first wing that may
FROM = dict(matplotlib="plots", traitlets="session", ipywidgets="widgets", anywidget="widgets")
NEVER = {"nbdev", "fastcore", "execnb", "llmcompressor", "pytest", "hypothesis", "playwright", "nbconvert"}
MODULES = list(drift.modules(ROOT))        # dotted names below qcal_nb


def path_of(module: str) -> Path:
    file = ROOT/"qcal_nb"/module.replace(".", "/")
    return file/"__init__.py" if file.is_dir() else file.with_suffix(".py")


DOORS = [w for w in WINGS if (ROOT/"qcal_nb"/w).is_dir()]


def sources() -> dict[str, str]:
    "Every module and every door → its text."
    return {m: path_of(m).read_text(encoding="utf-8") for m in [*MODULES, *DOORS]}


def for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(tree: ast.AST):
    "All nodes of a tree but those that only type checkers see."
    for node in ast.iter_child_nodes(tree):
        if for_types_alone(node): continue
        yield node
        yield from statements(node)


def imports(source: str, module: str, is_door: bool = False) -> set[str]:
    "Absolute dotted names of modules that `source`, being `qcal_nb.<module>`, imports from, at any depth."
    package = f"qcal_nb.{module}".split(".")
    package = package if is_door else package[:-1]
    found = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package)-node.level+1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" for a in node.names} if base == "qcal_nb" else {base}
    return found


def wing_of(name: str) -> str: return name.split(".")[0]


def violations(sources: dict[str, str], wings: list[str], doors: list[str]) -> list[str]:
    "Imports of `sources` (module → text) that point the wrong way or past a door, one line each."
    lines = []
    for module, source in sources.items():
        here, names = wing_of(module), imports(source, module, module in doors)
        for name in sorted(n.removeprefix("qcal_nb.") for n in names if n.split(".")[0] == "qcal_nb"):
            there = wing_of(name)
            if name == "__version__" or there == here: continue
            if there not in wings: lines.append(f"{module} imports {name}, which is no wing")
            elif wings.index(there) > wings.index(here): lines.append(f"{module} imports {name}, a wing below its own")
            elif there in doors and name != there: lines.append(f"{module} imports {name}, past the door of {there}")
        for top in sorted({n.split(".")[0] for n in names}):
            if top in NEVER: lines.append(f"{module} imports {top}: never at run time")
            if top in FROM and wings.index(here) < wings.index(FROM[top]):
                lines.append(f"{module} imports {top}: only from {FROM[top]} on")
    return lines


def test_imports_run_one_way(): assert violations(sources(), WINGS, DOORS) == []


def test_there_is_something_to_check(): assert len(MODULES) > 50 and len(DOORS) > 10


def test_every_module_stands_in_a_wing():
    tops = {p.stem for p in (ROOT/"qcal_nb").iterdir() if p.is_dir() or p.suffix == ".py"} - {
        "__init__", "_modidx", "data", "__pycache__"
    }
    assert tops <= set(WINGS)


@pytest.mark.parametrize("wing", DOORS)
def test_no_circle_inside_a_wing(wing):
    inside = {m: path_of(m).read_text(encoding="utf-8") for m in MODULES if wing_of(m) == wing}
    edges = {m: {n.removeprefix("qcal_nb.") for n in imports(s, m)} & inside.keys() for m, s in inside.items()}
    try: TopologicalSorter(edges).prepare()
    except CycleError as error: pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("wing", DOORS)
def test_a_door_says_what_lives_there(wing):
    tree = ast.parse(path_of(wing).read_text(encoding="utf-8"))
    names = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    door = importlib.import_module(f"qcal_nb.{wing}")
    assert ast.get_docstring(tree) and names == set(door.__all__) and door.__all__ == sorted(door.__all__)
    modules = {m.split(".")[1] for m in MODULES if m.startswith(f"{wing}.")}
    assert modules & names == set(), "a submodule and an export share a name"
    assert [n for n in names if n.startswith("_")] == [], "private names stay inside"


@pytest.mark.parametrize("module, source, complaint", [
    ("low.a", "from qcal_nb.high import f", "a wing below its own"),
    ("low.a", "from ..high import f", "a wing below its own"),
    ("low.a", "def f():\n    from .. import high", "a wing below its own"),
    ("low.a", "import qcal_nb.high.b", "a wing below its own"),
    ("high.b", "from ..low.a import f", "past the door of low"),
    ("high.b", "from qcal_nb.low.a import f", "past the door of low"),
    ("high", "from ..low.a import f", "past the door of low"),
    ("high.b", "from .. import nothing", "is no wing"),
    ("high.b", "from ..gone import f", "is no wing"),
    ("low.a", "def f(): import matplotlib.pyplot as plt", "only from plots on"),
    ("plots", "from ipywidgets import HTML", "only from widgets on"),
    ("plots", "from fastcore.test import expect_fail", "never at run time"),
    ("plots", "import llmcompressor", "never at run time"),
])
def test_a_wrong_import_is_seen(module, source, complaint):
    found = violations({module: source}, ["low", "high", "plots", "session", "widgets"], ["low", "high"])
    assert len(found) == 1 and complaint in found[0]


@pytest.mark.parametrize("module, source", [
    ("low.b", "from .a import A"), ("high.b", "from ..low import A, B"), ("high", "from .b import B"),
    ("high.b", "import torch.nn as nn\nfrom .. import __version__"),
    ("plots", "import matplotlib.pyplot as plt\nfrom .high import B"),
    ("low.a", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from qcal_nb.high import f"),
])
def test_a_right_import_passes(module, source):
    assert violations({module: source}, ["low", "high", "plots", "session", "widgets"], ["low", "high"]) == []

# --- what the package asks for, and what `import qcal_nb` brings in ---

def required() -> set[str]:
    "Names of settings.ini's run-time requirements, normalised."
    ini = configparser.ConfigParser(delimiters=["="], inline_comment_prefixes=["#"], interpolation=None)
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    names = [
        re.match(r"[\w.-]+", line.strip())[0] for line in ini["DEFAULT"]["requirements"].splitlines() if line.strip()
    ]
    return {re.sub(r"[-_.]+", "-", n).lower() for n in names}

def test_every_import_is_a_stated_requirement():
    homes = importlib.metadata.packages_distributions()
    tops = {
        n.split(".")[0] for m, s in sources().items() for n in imports(s, m, m in DOORS)
    } - {"qcal_nb"} - set(sys.stdlib_module_names)
    unstated = {t for t in tops if not {re.sub(r"[-_.]+", "-", d).lower() for d in homes.get(t, [t])} & required()}
    assert unstated == set(), "say in settings.ini what each is for"

def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

def test_import_is_light():
    heavy = ["torch", "transformers", "pandas", "matplotlib", "ipywidgets", "anywidget", "nbdev", "fastcore"]
    assert run(f"import sys, qcal_nb; print([m for m in {heavy} if m in sys.modules])") == "[]"

def test_engine_needs_no_screen():
    "Every wing above `plots` imports neither matplotlib nor ipywidgets, also by what it imports."
    above = [w for w in WINGS[:WINGS.index(FROM["matplotlib"])] if path_of(w).exists()]
    code = f"import sys, importlib\nfor m in {above}: importlib.import_module('qcal_nb.'+m)\n"
    assert run(code+"print([m for m in ('matplotlib', 'ipywidgets', 'anywidget') if m in sys.modules])") == "[]"

def test_top_level_names_resolve():
    names = "Workbench", "record", "CalibrationRecord", "calibrate", "load_tiny_llama"
    assert run(
        f"import qcal_nb; print([n for n in {names} if n not in dir(qcal_nb) or getattr(qcal_nb, n).__name__ != n])"
    ) == "[]"

def test_unknown_top_level_name():
    import qcal_nb
    with pytest.raises(AttributeError, match="qcal_nb.*no_such_name"): qcal_nb.no_such_name  # noqa: B018

def test_type_checkers_see_what_python_sees():
    "The names under TYPE_CHECKING, the lazy table and `__all__` are one list."
    import qcal_nb
    tree = ast.parse((ROOT/"qcal_nb"/"__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    typed = {a.name: n.module for n in block.body for a in n.names}
    assert typed == qcal_nb._homes and set(qcal_nb.__all__) == {*typed, "__version__"}
