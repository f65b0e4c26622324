"qcal_nb/ is exactly what the notebooks export, the notebooks are clean; and the checks that say so can fail."
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

def tool(name):
    "The module tools/`name`.py"
    spec = importlib.util.spec_from_file_location(f"qcal_tools_{name}", ROOT/"tools"/f"{name}.py")
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module

drift, clean_outputs = tool("drift"), tool("clean_outputs")

def cell(kind, source, id, **kw):
    extra = dict(execution_count=None, outputs=[]) if kind == "code" else {}
    return dict(cell_type=kind, id=id, metadata={}, source=source.splitlines(keepends=True), **extra | kw)

def write_nb(path, *cells, **metadata):
    nb = dict(cells=list(cells), metadata=metadata, nbformat=4, nbformat_minor=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False)+"\n", encoding="utf-8")

def chapter(path, module, body):
    "A notebook with one exported cell"
    write_nb(
        path, cell("markdown", f"# {module}\n\n> A chapter.", "a0"), cell("code", f"#| default_exp {module}", "a1"),
        cell("code", f"#| export\n{body}", "a2")
    )

def git(root, *args):
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", *args], cwd=root, check=True, capture_output=True
    )

@pytest.fixture
def project(tmp_path):
    "A small project in step: two chapters, one of them in a subpackage, exported and committed"
    root = tmp_path/"project"; lib = root/"qcal_nb"
    chapter(root/"nbs"/"00_one.ipynb", "one", "def f(x): return x")
    chapter(root/"nbs"/"01_deep.ipynb", "deep.two", "from qcal_nb.one import f\ndef g(x): return f(x)+1")
    shutil.copy(ROOT/"pyproject.toml", root)
    (lib/"deep").mkdir(parents=True); (lib/"data").mkdir()
    shutil.copy(ROOT/"qcal_nb"/"__init__.py", lib)
    for name in ("py.typed", "deep/__init__.py", "data/table.json"): (lib/name).touch()
    drift.export(root)
    git(root, "init", "-q"); git(root, "add", "-A"); git(root, "commit", "-qm", "all")
    return root

def test_package_is_what_the_notebooks_export(): assert drift.problems(ROOT) == []

def test_a_project_in_step_passes(project): assert drift.problems(project) == []

def test_export_leaves_the_hand_kept_init_alone(project):
    assert (project/"qcal_nb"/"__init__.py").read_bytes() == (ROOT/"qcal_nb"/"__init__.py").read_bytes()

def test_renamed_notebook(project):
    nb = project/"nbs"/"00_one.ipynb"; nb.unlink(); chapter(project/"nbs"/"00_uno.ipynb", "uno", "def f(x): return x")
    drift.export(project)
    assert any("qcal_nb/one.py: no notebook" in p for p in drift.problems(project))

def test_renamed_notebook_not_exported(project):
    nb = project/"nbs"/"00_one.ipynb"; nb.unlink(); chapter(project/"nbs"/"00_uno.ipynb", "uno", "def f(x): return x")
    assert any("qcal_nb/uno.py: missing" in p for p in drift.problems(project))

def test_stale_module(project):
    (project/"qcal_nb"/"deep"/"old.py").write_text("x = 1\n"); git(project, "add", "-A")
    assert drift.problems(project) == ["qcal_nb/deep/old.py: no notebook exports it"]

def test_untracked_stray(project):
    (project/"qcal_nb"/"stray.py").write_text("x = 1\n")
    assert drift.problems(project) == ["qcal_nb/stray.py: no notebook exports it"]

def test_module_never_added(project):
    chapter(project/"nbs"/"02_new.ipynb", "new", "def h(): return 0"); drift.export(project)
    assert drift.problems(project) == []                                  # both new: work in progress
    git(project, "add", "nbs", "qcal_nb/_modidx.py"); git(project, "commit", "-qm", "half")
    assert drift.problems(project) == ["qcal_nb/new.py: not added to git, though nbs/02_new.ipynb is"]

def test_hand_edited_module(project):
    module = project/"qcal_nb"/"one.py"; module.write_text(module.read_text().replace("return x", "return -x"))
    assert drift.problems(project) == ["qcal_nb/one.py: differs from what the notebooks export"]

def test_edited_notebook_not_exported(project):
    chapter(project/"nbs"/"00_one.ipynb", "one", "def f(x): return -x")
    assert drift.problems(project) == ["qcal_nb/one.py: differs from what the notebooks export"]

def test_two_notebooks_one_module(project):
    chapter(project/"nbs"/"05_again.ipynb", "one", "def f(x): return x"); drift.export(project)
    assert any("nbs/00_one.ipynb and nbs/05_again.ipynb all export to one" in p for p in drift.problems(project))

def test_the_command_says_what_differs(project):
    (project/"qcal_nb"/"stray.py").touch()
    done = subprocess.run([sys.executable, ROOT/"tools"/"drift.py", project], capture_output=True, text=True)
    assert done.returncode == 1 and "stray.py" in done.stdout and "make export" in done.stdout

# --- notebooks as they are committed ---

def not_clean(root, tmp):
    "Notebooks of `root` that `nbdev-clean` and tools/clean_outputs.py would change"
    shutil.copytree(root/"nbs", tmp/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(root/"pyproject.toml", tmp)
    subprocess.run(
        [sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"],
        cwd=tmp,
        check=True,
        capture_output=True,
    )
    clean_outputs.main([tmp/"nbs"])
    return [
        p.relative_to(root).as_posix()
        for p in drift.notebooks(root) if p.read_bytes() != (tmp/p.relative_to(root)).read_bytes()
    ]

def test_notebooks_are_clean(tmp_path): assert not_clean(ROOT, tmp_path) == [], "run `make clean-notebooks`"

def test_an_execution_count_is_not_clean(project, tmp_path):
    assert not_clean(project, tmp_path/"before") == []
    write_nb(project/"nbs"/"00_one.ipynb", cell("code", "1", "a1", execution_count=3))
    assert not_clean(project, tmp_path/"after") == ["nbs/00_one.ipynb"]

def test_widget_views_and_state_are_dropped(tmp_path):
    view = {clean_outputs.VIEW: {"model_id": "0"}, "text/plain": ["VBox()"]}
    shown = [dict(output_type="display_data", data=view, metadata={}),
             dict(output_type="display_data", data=view | {"image/png": "iVBORw0KGgo="}, metadata={}),
             dict(output_type="stream", name="stdout", text=["kept"])]
    write_nb(tmp_path/"w.ipynb", cell("code", "panel", "a0", outputs=shown), widgets={"state": {}})
    clean_outputs.main([tmp_path])
    nb = json.loads((tmp_path/"w.ipynb").read_text())
    assert nb["metadata"] == {}
    assert [sorted(o.get("data", {})) for o in nb["cells"][0]["outputs"]] == [["image/png", "text/plain"], []]
    assert not clean_outputs.clean_file(tmp_path/"w.ipynb")               # nothing left to do

def test_progress_bars_are_dropped_and_warnings_stay(tmp_path):
    shown = [dict(output_type="stream", name="stderr", text=["\r", " 50%|# | 1/2\r", "100%|##| 2/2\n"]),
             dict(output_type="stream", name="stderr", text=["a warning\n", "\r100%|##| 2/2\n"])]
    write_nb(tmp_path/"w.ipynb", cell("code", "slow()", "a0", outputs=shown))
    clean_outputs.main([tmp_path])
    outputs = json.loads((tmp_path/"w.ipynb").read_text())["cells"][0]["outputs"]
    assert [o["text"] for o in outputs] == [["a warning\n"]]
