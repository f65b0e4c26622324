"""Notebooks run in kernels of this environment, and what fails on a page fails the test."""
import json
import sys
from pathlib import Path

import pytest

from tests.house.fresh_pytest import ROOT, run_pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]

KERNEL = dict(name="python3", display_name="python3", language="python")    # without it JupyterLab asks which kernel


def notebook(path: Path, *sources: str):
    cells = [
        dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=s)
        for i, s in enumerate(sources)
    ]
    path.write_text(
        json.dumps(dict(cells=cells, metadata=dict(kernelspec=KERNEL), nbformat=4, nbformat_minor=5)), encoding="utf-8"
    )


def test_kernels_are_of_this_environment(lab, open_nb):
    notebook(lab.root/"which.ipynb", "import sys, qcal_nb", "print(sys.prefix, qcal_nb.__file__)")
    page = open_nb("which.ipynb")
    shown = page.locator(".jp-OutputArea-output").inner_text()
    assert shown.split() == [sys.prefix, str(ROOT/"qcal_nb"/"__init__.py")]


def test_run_menu(lab, open_nb):
    "The way a person runs a notebook, once; the other tests use the command beneath it"
    notebook(lab.root/"menu.ipynb", "6*7")
    page = open_nb("menu.ipynb", run=False)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.locator(".jp-OutputArea-output", has_text="42").wait_for()


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


def test_a_failing_page_leaves_a_picture(browser, tmp_path):
    (tmp_path/"nbs").mkdir()
    status, text = run_pytest(tmp_path, FAILS)
    assert status == 1 and "on purpose" in text
    assert (tmp_path/"tests"/"shots"/"test_it-0.png").read_bytes().startswith(b"\x89PNG")
