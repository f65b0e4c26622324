"The tests' own machinery: skips fail in CI, the browser runs kernels of this environment, failing pages leave a picture."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SKIPS = """
import pytest
def test_passes(): pass
def test_skips(): pytest.skip("no such thing here")
@pytest.mark.skipif(True, reason="never")
def test_marked(): pass
@pytest.fixture
def missing(): return pytest.importorskip("no_such_module")
def test_needs(missing): pass
@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""

def run_pytest(folder: Path, text: str, *args, **env):
    "pytest on `text` beside a copy of our conftest.py; returns (exit status, output)"
    (folder/"tests").mkdir(); shutil.copy(ROOT/"tests"/"conftest.py", folder/"tests"); shutil.copy(ROOT/"pyproject.toml", folder)
    (folder/"tests"/"test_it.py").write_text(text, encoding="utf-8")
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTEST_ADDOPTS")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args]
    done = subprocess.run(command, cwd=folder, env=clean | env, capture_output=True, text=True)
    return done.returncode, done.stdout

def test_skips_are_skips_at_home(tmp_path):
    status, text = run_pytest(tmp_path, SKIPS)
    assert status == 0 and "1 passed, 3 skipped, 1 xfailed" in text

def test_skips_fail_in_ci(tmp_path):
    status, text = run_pytest(tmp_path, SKIPS, CI="true")
    assert status == 1 and "skipped in CI, where everything has to run: Skipped: no such thing here" in text
    counts = text.splitlines()[-1]
    assert "1 passed" in counts and "1 xfailed" in counts and "skipped" not in counts

def test_a_skipped_module_fails_in_ci(tmp_path):
    text = "import pytest\npytest.importorskip('no_such_module')\ndef test_a(): pass"
    assert run_pytest(tmp_path, text, CI="true")[0] != 0

@pytest.mark.parametrize("ci", ["", "true"])
def test_missing_chromium(tmp_path, ci):
    "Says how to get it; a skip at home, a failure in CI"
    status, text = run_pytest(tmp_path, "def test_a(browser): pass", CI=ci, PATH="")
    assert "apt-get install chromium" in text and (status != 0) == bool(ci)

KERNEL = dict(name="python3", display_name="python3", language="python")    # without it JupyterLab asks which kernel

def notebook(path: Path, *sources: str):
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=s) for i, s in enumerate(sources)]
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=KERNEL), nbformat=4, nbformat_minor=5)), encoding="utf-8")

@pytest.mark.browser
def test_kernels_are_of_this_environment(lab, open_nb):
    notebook(lab.root/"which.ipynb", "import sys, qcal_nb", "print(sys.prefix, qcal_nb.__file__)")
    page = open_nb("which.ipynb")
    shown = page.locator(".jp-OutputArea-output").inner_text()
    assert shown.split() == [sys.prefix, str(ROOT/"qcal_nb"/"__init__.py")]

@pytest.mark.browser
def test_run_menu(lab, open_nb):
    "The way a person runs a notebook, once; the other tests use the command beneath it"
    notebook(lab.root/"menu.ipynb", "6*7")
    page = open_nb("menu.ipynb", run=False)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.locator(".jp-OutputArea-output", has_text="42").wait_for()

@pytest.mark.browser
def test_a_failing_cell_fails_the_test(lab, open_nb):
    notebook(lab.root/"fails.ipynb", "1/0")
    with pytest.raises(AssertionError, match="ZeroDivisionError"): open_nb("fails.ipynb")

FAILS = """
def test_it(lab, open_nb):
    kernel = '{"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}'
    (lab.root/"a.ipynb").write_text('{"cells": [], "metadata": %s, "nbformat": 4, "nbformat_minor": 5}' % kernel)
    open_nb("a.ipynb", run=False)
    assert False, "on purpose"
"""

@pytest.mark.browser
@pytest.mark.slow
def test_a_failing_page_leaves_a_picture(browser, tmp_path):
    (tmp_path/"nbs").mkdir()
    status, text = run_pytest(tmp_path, FAILS)
    assert status == 1 and "on purpose" in text
    assert (tmp_path/"tests"/"shots"/"test_it-0.png").read_bytes().startswith(b"\x89PNG")
