"The wheel that people get: complete, of one version, and importable where nothing for development is installed."
import configparser
import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
DEVELOPMENT = ["nbdev", "fastcore", "execnb", "llmcompressor", "playwright", "pytest", "hypothesis"]
def sh(*args, cwd, **env):
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout+done.stderr
    return done.stdout

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from the sdist that was built from a copy of the tree: what MANIFEST.in forgets is missing"
    tree = tmp_path_factory.mktemp("build")/"tree"
    leave = shutil.ignore_patterns(".git", ".venv", ".venv-next", "build", "dist",
                                   "_docs", "_proc", "*.egg-info", "__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT, tree, ignore=leave)
    sh("-m", "build", "--no-isolation", cwd=tree)
    return next((tree/"dist").glob("*.whl"))

@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "A folder with the wheel and nothing else in it; what it depends on is found in this environment"
    target = tmp_path_factory.mktemp("installed")
    sh("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target)
    return target

@pytest.fixture(scope="module")
def dependencies(tmp_path_factory):
    "A folder of links to what is installed here, less the development packages and this project"
    folder = tmp_path_factory.mktemp("dependencies")
    for entry in (
        p for site in {*map(Path, (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))}
        for p in site.iterdir()
    ):
        name = entry.name.lower().split("-")[0].split(".")[0]
        if name not in {*DEVELOPMENT, "qcal_nb", "__editable__"}: (folder/entry.name).symlink_to(entry)
    return folder

@pytest.fixture
def python(installed, dependencies, tmp_path):
    "`python(code)`: what `code` prints, as JSON, outside the project; -S: only what PYTHONPATH names can be imported"
    path = os.pathsep.join(map(str, (installed, dependencies)))
    return lambda code: json.loads(sh("-S", "-c", code, cwd=tmp_path, PYTHONPATH=path).splitlines()[-1])

def files(package):
    return {
        p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }

def test_wheel_has_every_file_of_the_package(wheel):
    inside = {n.removeprefix("qcal_nb/") for n in zipfile.ZipFile(wheel).namelist() if n.startswith("qcal_nb/")}
    assert inside == files(ROOT/"qcal_nb") and "py.typed" in inside

def test_wheel_has_nothing_else(wheel):
    assert {n.split("/")[0] for n in zipfile.ZipFile(wheel).namelist()} == {
        "qcal_nb", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    }

def test_metadata_comes_from_settings(wheel):
    ini = configparser.ConfigParser(delimiters=["="], inline_comment_prefixes=["#"], interpolation=None)
    ini.read(ROOT/"settings.ini", encoding="utf-8"); said = ini["DEFAULT"]
    with zipfile.ZipFile(wheel) as z:
        meta = email.message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith("/METADATA"))))
    def stated(key): return [line.strip() for line in said[key].splitlines() if line.strip()]
    def built(extra): return [r.split(";")[0].strip() for r in meta.get_all("Requires-Dist") if r.endswith(extra)]
    assert [r for r in meta.get_all("Requires-Dist") if "extra ==" not in r] == stated("requirements")
    assert meta.get_all("Provides-Extra") == ["dev", "browser"]
    for extra in ("dev", "browser"): assert built(f'extra == "{extra}"') == stated(f"{extra}_requirements")
    assert (meta["Name"], meta["Summary"], meta["Requires-Python"]) == (
        said["name"], said["description"], said["python_requires"]
    )

def test_one_version(python):
    package, metadata = python(
        "import json, qcal_nb, importlib.metadata as m; print(json.dumps([qcal_nb.__version__, m.version('qcal-nb')]))"
    )
    assert package == metadata

def test_changelog_knows_the_version(python):
    version = python("import json, qcal_nb; print(json.dumps(qcal_nb.__version__))")
    assert f"## [{version}]" in (ROOT/"CHANGELOG.md").read_text(encoding="utf-8")

def test_every_module_imports_without_development_packages(python, installed):
    found = python("""
import importlib, json, pkgutil, qcal_nb
names = [m.name for m in pkgutil.walk_packages(qcal_nb.__path__, 'qcal_nb.')]
print(json.dumps({n: importlib.import_module(n).__file__ for n in names}))""")
    assert len(found) >= 4 and all(f.startswith(str(installed)) for f in found.values())

@pytest.mark.parametrize("package", DEVELOPMENT)
def test_development_packages_are_out_of_reach(python, package):
    with pytest.raises(AssertionError, match=f"No module named '{package}'"): python(f"import {package}")

def test_data_is_found_from_the_wheel(python):
    there = python("""
import importlib.resources as r, json
def walk(d, at=''): return [f for e in d.iterdir() for f in (walk(e, at+e.name+'/') if e.is_dir() else [at+e.name])]
print(json.dumps(walk(r.files('qcal_nb')/'data')))""")
    assert {n for n in there if "__pycache__" not in n} == files(ROOT/"qcal_nb"/"data") != set()
