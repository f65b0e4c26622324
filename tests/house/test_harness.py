"""In CI a skip is a failure."""
import pytest

from tests.house.fresh_pytest import run_pytest

pytestmark = pytest.mark.slow

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
