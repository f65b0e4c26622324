"""pytest on a file of its own, beside a copy of our conftest.py."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_pytest(folder: Path, text: str, *args, **env):
    "pytest on `text` beside a copy of our conftest.py; returns (exit status, output)"
    (folder/"tests").mkdir()
    shutil.copy(ROOT/"tests"/"conftest.py", folder/"tests")
    shutil.copy(ROOT/"pyproject.toml", folder)
    (folder/"tests"/"test_it.py").write_text(text, encoding="utf-8")
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTEST_ADDOPTS")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args]
    done = subprocess.run(command, cwd=folder, env=clean | env, capture_output=True, text=True)
    return done.returncode, done.stdout
