"""Without Node.js what needs it is skipped; in CI that is a failure."""
import shutil

import pytest


def pytest_runtest_setup(item):
    if item.get_closest_marker("node") and not shutil.which("node"):
        pytest.skip("no Node.js: apt-get install nodejs")
