"""Take out of the notebooks what only a running kernel can show, and what differs from run to run; after `nbdev-clean`.

Drops widget views (a picture or text beside them stays) and saved widget state: a trusted notebook that was not run
would show "Loading widget..." in their place, and their ids change on every run. Progress bars go, too: whether one
shows depends on how busy the machine was.

    python tools/clean_outputs.py [FOLDER or NOTEBOOK ...]      # nbs/ unless told; names each notebook that it changed
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VIEW = "application/vnd.jupyter.widget-view+json"

def without_bars(outputs: list[dict]) -> list[dict]:
    "Outputs without what was overwritten on its line, as progress bars are; an output that was nothing else is gone."
    for o in outputs:
        if o.get("name") == "stderr":
            lines = "".join(o["text"]).split("\n")
            o["text"] = "\n".join(line for line in lines if "\r" not in line).splitlines(keepends=True)
    return [o for o in outputs if o.get("text", True)]

def cleaned(nb: dict) -> dict:
    "A copy of `nb` without widget views, widget state and progress bars; an output that was nothing else is gone."
    nb = json.loads(json.dumps(nb))
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        if "outputs" in cell: cell["outputs"] = without_bars(cell["outputs"])
        views = [o for o in cell.get("outputs", []) if VIEW in o.get("data", {})]
        for o in views:
            del o["data"][VIEW]
            if not any(mime.startswith("image/") or mime in ("text/html", "text/markdown") for mime in o["data"]):
                o["data"] = {}
        if views: cell["outputs"] = [o for o in cell["outputs"] if o.get("data", True)]
    return nb

def clean_file(path: Path) -> bool:
    "Clean the notebook at `path` in place; was there anything to do?"
    old = json.loads(path.read_text(encoding="utf-8"))
    new = cleaned(old)
    if new == old: return False
    path.write_text(json.dumps(new, sort_keys=True, indent=1, ensure_ascii=False)+"\n", encoding="utf-8")
    return True

def main(args: list[str]) -> None:
    for path in map(Path, args or [ROOT/"nbs"]):
        for nb in sorted(path.rglob("*.ipynb")) if path.is_dir() else [path]:
            if ".ipynb_checkpoints" not in nb.parts and clean_file(nb): print(f"cleaned {nb}")

if __name__ == "__main__": main(sys.argv[1:])
