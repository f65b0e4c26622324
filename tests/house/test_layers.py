"""Imports point one way: a module may import what its notebook's name sorts after, never what comes later.

The order is that of the notebooks (00_..., 01_..., 03a_...); packages for the screen come in at a known height, packages for
development never.
"""
import ast
import configparser
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("qcal_tools_drift", ROOT/"tools"/"drift.py")
drift = importlib.util.module_from_spec(spec); spec.loader.exec_module(drift)

FROM = dict(matplotlib="figures", traitlets="state", ipywidgets="panels", anywidget="panels")   # package → first module that may
NEVER = {"nbdev", "fastcore", "execnb", "llmcompressor", "pytest", "hypothesis", "playwright", "nbconvert"}
ORDER = list(drift.modules(ROOT))          # dotted names below qcal_nb, lowest first

def imports(source: str, module: str) -> set[str]:
    "Absolute dotted names that `source`, being `qcal_nb.<module>`, imports at any depth; for `from a import b` also `a.b`."
    package = f"qcal_nb.{module}".split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package)-node.level+1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{a.name}" for a in node.names}
    return found

def height(name: str, order: list[str]) -> int | None:
    "How high `qcal_nb...` name stands: a module's place; for a package (its __init__) the place of its highest module."
    parts = name.split(".")[1:]
    for n in range(len(parts), 0, -1):
        inside = [i for i, m in enumerate(order) if m.split(".")[:n] == parts[:n]]
        if inside: return max(inside)
    return None

def violations(sources: dict[str, str], order: list[str]) -> list[str]:
    "Imports of `sources` (module → text) that point the wrong way, one line each."
    lines = []
    for module, source in sources.items():
        here, names = order.index(module), imports(source, module)
        for name in sorted(n for n in names if n.split(".")[0] == "qcal_nb"):
            if any(other.startswith(f"{name}.") for other in names): continue           # `from .a import b`: a.b says more
            where = height(name, order)
            if where is None and name != "qcal_nb.__version__": lines.append(f"{module} imports {name}, which no notebook exports")
            if where is not None and where >= here: lines.append(f"{module} imports {name}, which does not stand above it")
        for top in sorted({n.split(".")[0] for n in names}):
            if top in NEVER: lines.append(f"{module} imports {top}: never at run time")
            if top in FROM and (FROM[top] not in order or here < order.index(FROM[top])):
                lines.append(f"{module} imports {top}: only from {FROM[top]} on")
    return lines

def sources() -> dict[str, str]:
    return {m: (ROOT/"qcal_nb"/(m.replace(".", "/")+".py")).read_text(encoding="utf-8") for m in ORDER}

def test_imports_point_one_way(): assert violations(sources(), ORDER) == []

def test_there_is_something_to_check(): assert len(ORDER) >= 4

@pytest.mark.parametrize("module, source, complaint", [
    ("low", "from qcal_nb.high import f", "does not stand above"),
    ("low", "from .high import f", "does not stand above"),
    ("low", "def f():\n    from . import high", "does not stand above"),
    ("low", "import qcal_nb.low", "does not stand above"),
    ("low", "from .pack import A", "does not stand above"),
    ("pack.a", "from .b import A", "does not stand above"),
    ("pack.a", "from ..high import f", "does not stand above"),
    ("high", "from . import nothing", "no notebook exports"),
    ("high", "from .gone import f", "no notebook exports"),
    ("high", "def f(): import matplotlib.pyplot as plt", "only from figures on"),
    ("plots", "from ipywidgets import HTML", "only from panels on"),
    ("plots", "from fastcore.test import expect_fail", "never at run time"),
    ("plots", "import llmcompressor", "never at run time"),
])
def test_a_wrong_import_is_seen(module, source, complaint):
    order = ["low", "pack.a", "pack.b", "high", "figures", "plots"]
    assert len(found := violations({module: source}, order)) == 1 and complaint in found[0]

@pytest.mark.parametrize("module, source", [
    ("pack.b", "from .a import A\nfrom ..low import f, g"), ("high", "from qcal_nb.pack.a import A\nfrom .pack import B"),
    ("high", "from . import low\nimport torch.nn as nn\nfrom . import __version__"), ("figures", "import matplotlib.pyplot as plt"),
    ("plots", "from .figures import f"),
])
def test_a_right_import_passes(module, source):
    assert violations({module: source}, ["low", "pack.a", "pack.b", "high", "figures", "plots"]) == []

# --- what the package asks for, and what `import qcal_nb` brings in ---

def required() -> set[str]:
    "Names of settings.ini's run-time requirements, normalised."
    ini = configparser.ConfigParser(delimiters=["="], inline_comment_prefixes=["#"], interpolation=None)
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    names = [re.match(r"[\w.-]+", line.strip())[0] for line in ini["DEFAULT"]["requirements"].splitlines() if line.strip()]
    return {re.sub(r"[-_.]+", "-", n).lower() for n in names}

def test_every_import_is_a_stated_requirement():
    homes = importlib.metadata.packages_distributions()
    tops = {n.split(".")[0] for m, s in sources().items() for n in imports(s, m)} - {"qcal_nb"} - set(sys.stdlib_module_names)
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
    "Everything below `figures` imports neither matplotlib nor ipywidgets, also by what it imports."
    below = ORDER[:ORDER.index(FROM["matplotlib"])]
    code = f"import sys, importlib\nfor m in {below}: importlib.import_module('qcal_nb.'+m)\n"
    assert run(code+"print([m for m in ('matplotlib', 'ipywidgets', 'anywidget') if m in sys.modules])") == "[]"

def test_top_level_names_resolve():
    names = "Workbench", "record", "CalibrationRecord", "calibrate", "load_tiny_llama"
    assert run(f"import qcal_nb; print([n for n in {names} if n not in dir(qcal_nb) or getattr(qcal_nb, n).__name__ != n])") == "[]"

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
