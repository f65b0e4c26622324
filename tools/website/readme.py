"README.md from nbs/index.ipynb."
import base64
import json
import re
from pathlib import Path

from .notebooks import LINK, directives, hidden, joined, without_directives

ROOT = Path(__file__).resolve().parents[2]
PICTURES = "nbs/images"

def output_markdown(output: dict, name: str, pictures: dict[str, bytes]) -> str:
    "One output as markdown; a PNG goes into `pictures` under `name`."
    data = output.get("data", {})
    if "image/png" in data:
        path = f"{PICTURES}/{name}.png"
        pictures[path] = base64.b64decode(joined(data["image/png"]))
        return f"![]({path})"
    for mime in ("text/markdown", "text/html"):
        if mime in data: return re.sub(r"<style.*?</style>\s*", "", joined(data[mime]), flags=re.S).strip("\n")
    text = joined(output.get("text") or data.get("text/plain", "")).rstrip("\n")
    return f"```text\n{text}\n```" if text.strip() else ""

def cell_markdown(cell: dict, pictures: dict[str, bytes]) -> list[str]:
    "One notebook cell as pieces of markdown, links to notebooks made relative to the repository's root."
    source = joined(cell["source"])
    if cell["cell_type"] == "markdown":
        return [re.sub(r"(!\[[^\]]*\]\()(?!\w+:)", r"\1nbs/", LINK.sub(r"\1nbs/\2\3)", without_directives(source)))]
    if cell["cell_type"] != "code" or hidden(source): return []
    code = without_directives(source)
    pieces = [f"```python\n{code}\n```"] if code and "echo:false" not in directives(source) else []
    return pieces + [output_markdown(o, f"readme-{cell['id']}-{i}", pictures) for i, o in enumerate(cell["outputs"])]

def readme(root: Path = ROOT) -> tuple[str, dict[str, bytes]]:
    "README.md's text and its pictures (path → PNG), from nbs/index.ipynb."
    nb = json.loads((root/"nbs"/"index.ipynb").read_text(encoding="utf-8"))
    pictures: dict[str, bytes] = {}
    pieces = [p for cell in nb["cells"] for p in cell_markdown(cell, pictures) if p]
    return "\n\n".join(["<!-- Made from nbs/index.ipynb by `make readme`. -->", *pieces])+"\n", pictures

def write_readme(root: Path = ROOT) -> None:
    text, pictures = readme(root)
    for old in (root/PICTURES).glob("readme-*.png"): old.unlink()
    for path, png in pictures.items():
        (root/path).parent.mkdir(parents=True, exist_ok=True); (root/path).write_bytes(png)
    (root/"README.md").write_text(text, encoding="utf-8")
    print(f"README.md, {len(pictures)} pictures")
