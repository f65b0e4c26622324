"""Is qcal_nb/ exactly what the notebooks export?

Exports the working tree's notebooks into an emptied copy of the package and compares both ways, so that what `git diff`
cannot see is seen: modules whose notebook is gone or renamed, modules nobody added to git, edits by hand, two notebooks
that write one module.

    python tools/drift.py [ROOT]        # prints what differs, exit status 1 if anything does
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIB = "qcal_nb"
REMEDY = "The notebooks are the source: edit them, then `make export`; delete modules whose notebook is gone."

def tracked(root: Path) -> set[str] | None:
    "Paths that git tracks, or None outside a repository."
    if not (root/".git").exists(): return None
    out = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    return {p for p in out.split("\0") if p}

def notebooks(root: Path) -> list[Path]:
    "Notebooks that nbdev looks at, in order: none whose path has a part that starts with `_` or `.`."
    found = sorted((root/"nbs").rglob("*.ipynb"))
    return [p for p in found if not any(part[0] in "_." for part in p.relative_to(root/"nbs").parts)]

def default_exp(notebook: Path) -> str | None:
    "The module that `notebook` exports to, dotted, or None."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    found = [m[1] for s in sources for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", s, re.M)]
    return found[-1] if found else None

def modules(root: Path) -> dict[str, list[Path]]:
    "Dotted module name → the notebooks that export to it, in the order of the notebooks' names."
    found: dict[str, list[Path]] = {}
    for nb in notebooks(root):
        if name := default_exp(nb): found.setdefault(name, []).append(nb)
    return found

def kept_by_hand(path: Path) -> bool:
    "Files under qcal_nb/ (`path` is relative to it) that no notebook writes."
    kept = path.parts[0] == "data" or path.parts[:2] == ("view", "js")
    return kept or path.name in ("__init__.py", "py.typed")

def compared(package: Path) -> dict[str, bytes]:
    "Relative path → content of every file that an export could have written, or ought to have."
    files = (p.relative_to(package) for p in package.rglob("*") if p.is_file())
    return {
        p.as_posix(): (package/p).read_bytes() for p in files if "__pycache__" not in p.parts and p.parts[0] != "data"
    }

def export(root: Path) -> None:
    "`nbdev-export` in `root`, by this interpreter."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}     # with IN_TEST nbdev exports nothing
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"nbdev-export failed:\n{done.stdout}{done.stderr}")

def fresh_export(root: Path, into: Path) -> Path:
    "Export `root`'s notebooks into `into`, beside the hand-kept files alone; returns the package's folder."
    for nb in notebooks(root):
        copy = into/nb.relative_to(root); copy.parent.mkdir(parents=True, exist_ok=True); shutil.copy(nb, copy)
    shutil.copy(root/"pyproject.toml", into)
    for p in (root/LIB).rglob("*"):
        kept = p.relative_to(root/LIB)
        if p.is_file() and kept_by_hand(kept) and kept.parts[0] != "data":
            copy = into/LIB/kept; copy.parent.mkdir(parents=True, exist_ok=True); shutil.copy(p, copy)
    export(into)
    return into/LIB

def differences(committed: dict[str, bytes], fresh: dict[str, bytes]) -> list[str]:
    "What differs between two packages, one line each."
    lines = [f"{LIB}/{p}: no notebook exports it" for p in sorted(committed.keys() - fresh)]
    lines += [f"{LIB}/{p}: missing, though a notebook exports it" for p in sorted(fresh.keys() - committed)]
    return lines + [f"{LIB}/{p}: differs from what the notebooks export" for p in sorted(committed.keys() & fresh)
                    if committed[p] != fresh[p]]

def not_added(root: Path) -> list[str]:
    "Modules that git does not track though it tracks their notebook."
    known = tracked(root)
    if known is None: return []
    pairs = [
        (nb.relative_to(root).as_posix(), f"{LIB}/{name.replace('.', '/')}.py")
        for name, nbs in modules(root).items() for nb in nbs
    ]
    return [
        f"{module}: not added to git, though {nb} is" for nb, module in pairs if nb in known and module not in known
    ]

def problems(root: Path = ROOT) -> list[str]:
    "Everything that is wrong between `root`'s notebooks and its package; empty if nothing is."
    with tempfile.TemporaryDirectory() as tmp:
        lines = differences(compared(root/LIB), compared(fresh_export(root, Path(tmp))))
    lines += [f"{' and '.join(str(n.relative_to(root)) for n in nbs)} all export to {name}: the last one would win"
              for name, nbs in modules(root).items() if len(nbs) > 1]
    return lines + not_added(root)

if __name__ == "__main__":
    found = problems(Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT)
    print("\n".join(found + [REMEDY]) if found else f"{LIB}/ is what the notebooks export")
    sys.exit(bool(found))
