"""README.md from nbs/index.ipynb, and HTML pages of all notebooks in _docs/. Needs neither Quarto nor a network.

    python tools/docs.py readme docs
"""
import base64
import html
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES = "nbs/images"
LINK = re.compile(r"(\]\()([^)\s:]+\.ipynb)(#[^)]*)?\)")

def joined(text: str | list[str]) -> str: return text if isinstance(text, str) else "".join(text)

def directives(source: str) -> set[str]:
    "The names of a cell's `#|` directives, `echo: false` as one word: `echo:false`."
    return {re.sub(r":\s*", ":", d.strip()) for d in re.findall(r"^#\|\s*(.+)$", source, re.M)}

def without_directives(source: str) -> str: return re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")

def hidden(source: str) -> bool: return bool({"hide", "include:false"} & directives(source))

# --- README ---

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

# --- pages ---

STYLE = """<style>
.qcal-nav { font: 14px/1.7 system-ui, sans-serif; padding: .6em 1.2em; border-bottom: 1px solid #8884; }
.qcal-nav a { margin-right: 1.1em; white-space: nowrap; text-decoration: none; } .qcal-nav a.here { font-weight: 700; }
body.jp-Notebook { max-width: 76em; margin: 0 auto; }
</style>"""

def page_of(notebook: Path) -> Path:
    "Where a notebook's page goes, relative to _docs/."
    from nbdev.config import nbpath2html
    return nbpath2html(notebook)

def page_link(link: re.Match) -> str: return f"{link[1]}{page_of(Path(link[2])).as_posix()}{link[3] or ''})"

def prepared(path: Path):
    "A processed notebook as nbconvert takes it: nbdev's private keys, directives and hidden cells are gone, links go to pages."
    import nbformat
    nb = json.loads(path.read_text(encoding="utf-8"))
    keep = ("cell_type", "id", "metadata", "source", "outputs", "execution_count", "attachments")
    cells = []
    for cell in nb["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] == "code" and (hidden(source) or not without_directives(source)): continue
        cell = {k: v for k, v in cell.items() if k in keep} | dict(metadata={}, source=without_directives(source))
        if "echo:false" in directives(source): cell["metadata"] = dict(tags=["no-input"])
        if cell["cell_type"] == "markdown": cell["source"] = LINK.sub(page_link, cell["source"])
        cells.append(cell)
    return nbformat.reads(json.dumps(dict(nb, cells=cells, metadata={"language_info": {"name": "python"}})), as_version=4)

def nav(pages: dict[Path, str], here: Path) -> str:
    "Links to all pages, the one that we are on marked."
    up = "../"*(len(here.parts)-1)
    links = (f"<a href='{up}{p.as_posix()}'{' class=here' if p == here else ''}>{html.escape(title)}</a>" for p, title in pages.items())
    return f"{STYLE}<nav class='qcal-nav' aria-label='Chapters'>{' '.join(links)}</nav>"

def docs(root: Path = ROOT) -> Path:
    "Write a page for each notebook as it is committed, outputs included; returns the folder, _docs/."
    from nbconvert import HTMLExporter
    folder, out = root/"nbs", root/"_docs"
    shutil.rmtree(out, ignore_errors=True)
    sources = [p for p in folder.rglob("*.ipynb") if not any(part[0] in "_." for part in p.relative_to(folder).parts)]
    sources.sort(key=lambda p: (p.parent != folder, p.name != "index.ipynb", p.as_posix()))
    pages = {page_of(p.relative_to(folder)): p for p in sources}
    titles = {page: p.stem if page.stem != "index" else "qcal_nb" for page, p in pages.items()}
    exporter = HTMLExporter(config={"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["no-input"]}})
    for page, source in pages.items():
        body, _ = exporter.from_notebook_node(prepared(source), resources={"metadata": {"name": titles[page]}})
        (out/page).parent.mkdir(parents=True, exist_ok=True)
        (out/page).write_text(re.sub(r"(<body[^>]*>)", lambda m, page=page: m[1]+nav(titles, page), body, count=1), encoding="utf-8")
    if (folder/"images").exists(): shutil.copytree(folder/"images", out/"images")
    print(f"{len(pages)} pages in {out.name}/")
    return out

if __name__ == "__main__":
    todo = sys.argv[1:] or ["readme", "docs"]
    for name in todo: {"readme": write_readme, "docs": docs}[name]()
