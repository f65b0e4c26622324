"Notebooks as they are committed: what is shown of a cell, and the order of the chapters, which nbs/index.ipynb gives."
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

LINK = re.compile(r"(\]\()([^)\s:]+\.ipynb)(#[^)]*)?\)")
WALKTHROUGHS, MEASURED = "Walkthroughs", "Measured"
# The rows of index.ipynb's table of chapters describe themselves in a sentence; here is a short name for each, by its first chapter.
LABELS = dict(models="The embedded model", compiled="Formats", histogram="Counting", **{"observers.base": "Observers"}, calibration="Calibration",
              experts="Large models", recipes="Recipes", parity=MEASURED, benchmarks=MEASURED, tensor_stats="Records", quality="Tables",
              divergence="Evaluation", figures="Pictures", provenance="Session", markup="Workbench", cli_inputs="Command line")

def joined(text: str | list[str]) -> str: return text if isinstance(text, str) else "".join(text)

def directives(source: str) -> set[str]:
    "The names of a cell's `#|` directives, `echo: false` as one word: `echo:false`."
    return {re.sub(r":\s*", ":", d.strip()) for d in re.findall(r"^#\|\s*(.+)$", source, re.M)}

def without_directives(source: str) -> str: return re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")

def hidden(source: str) -> bool: return bool({"hide", "include:false"} & directives(source))

@dataclass
class Cell:
    "A cell as a reader sees it: `text` has no directives."
    id: str
    kind: str
    text: str
    tags: frozenset[str]
    outputs: list[dict] = field(default_factory=list)

    @property
    def exported(self) -> bool: return "export" in self.tags
    @property
    def solution(self) -> bool: return self.kind == "code" and "solution" in self.tags

def read_cell(cell: dict) -> Cell:
    source = joined(cell["source"])
    tags = directives(source) | set(cell["metadata"].get("tags", []))
    return Cell(cell["id"], cell["cell_type"], without_directives(source), frozenset(tags), cell.get("outputs", []))

@dataclass
class Notebook:
    "A notebook of nbs/: `path` relative to that folder, `url` of its page relative to _docs/, `cells` that are shown."
    path: Path
    url: str
    cells: list[Cell]
    module: str | None

    @cached_property
    def title(self) -> str: return next(m[1].strip() for c in self.cells if c.kind == "markdown" and (m := re.search(r"^# (.+)", c.text, re.M)))
    @property
    def up(self) -> str: return "../"*self.url.count("/")

def page_of(notebook: Path) -> Path:
    "Where a notebook's page goes, relative to _docs/."
    from nbdev.config import nbpath2html
    return nbpath2html(notebook)

def drop_copies(cells: list[Cell]) -> None:
    "Take the code of a solution out of its words: JupyterLab hides the cell below them, the site does not."
    for words, cell in zip(cells, cells[1:]):
        if cell.solution: words.text = words.text.replace(f"```python\n{cell.text}\n```", "")

def read_notebook(folder: Path, path: Path) -> Notebook:
    raw = json.loads((folder/path).read_text(encoding="utf-8"))["cells"]
    sources = [joined(c["source"]) for c in raw if c["cell_type"] == "code"]
    module = next((m[1] for s in sources if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))), None)
    cells = [read_cell(c) for c in raw if c["cell_type"] == "markdown" or c["cell_type"] == "code" and not hidden(joined(c["source"]))]
    drop_copies(cells)
    return Notebook(path, page_of(path).as_posix(), [c for c in cells if c.text or c.outputs], module)

def notebooks(folder: Path) -> dict[str, Notebook]:
    "Every notebook of `folder` that is not hidden, by its path in it."
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*.ipynb"))
    return {p.as_posix(): read_notebook(folder, p) for p in paths if not any(part[0] in "_." for part in p.parts)}

def rows(index: Notebook) -> list[list[str]]:
    "The notebooks that each row of index.ipynb's tables links to in its first column."
    lines = [line for c in index.cells if c.kind == "markdown" for line in c.text.splitlines() if line.startswith("|")]
    found = [[m[2] for m in LINK.finditer(line.split("|")[1])] for line in lines]
    return [row for row in found if row]

def grouped(books: dict[str, Notebook]) -> dict[str, list[Notebook]]:
    "Notebooks in reading order under the headings of the sidebar; a chapter that index.ipynb does not name is an error."
    groups: dict[str, list[Notebook]] = {"Start": [books["index.ipynb"]], WALKTHROUGHS: []}
    for row in rows(books["index.ipynb"]):
        first = books[row[0]]
        label = WALKTHROUGHS if first.path.parent.name == "tutorials" else LABELS.get(first.title, first.title)
        groups.setdefault(label, []).extend(books[name] for name in row)
    groups[MEASURED] = groups.pop(MEASURED, [])                           # parity and benchmarks come last, wherever their rows stand
    missing = books.keys() - {b.path.as_posix() for group in groups.values() for b in group}
    if missing: raise ValueError(f"no table of nbs/index.ipynb names {', '.join(sorted(missing))}; every chapter needs a row")
    return {label: group for label, group in groups.items() if group}
