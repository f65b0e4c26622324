"""Notebooks as pages: nbdev's directives, solutions, positions; and the pages that no notebook is: contents and API.

All of them are written into Sphinx's source folder (build/docs) when a build begins. A file that would not change is
left alone, so that a second build reads only what did.
"""
import ast
import json
import re
import struct
from base64 import b64decode
from pathlib import Path

import names
import toc

BAR = re.compile(r"\d+%\|.*\|\s*\S+/\S+ \[")  # tqdm's
WIDGET = re.compile(r"\w+\((children=\(|.*layout=Layout)")  # how ipywidgets print themselves
LIVE = "{.note}\nA picture of a live panel: in JupyterLab it answers to mouse and keyboard."
FOLD = "<details><summary>Solution</summary>"


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def markdown(text: str) -> dict:
    return dict(cell_type="markdown", metadata={}, source=text)


def directives(source: str) -> set[str]:
    "The `#|` directives of a cell, each as one word: `#| echo: false` is `echo:false`."
    return {re.sub(r":\s*", ":", found.strip()) for found in re.findall(r"^#\|\s*(.+)$", source, re.M)}


# --- one cell ---

def assigned(node: ast.stmt) -> list[str]:
    "The names that a statement binds: of a definition, of `A = 1`, of `A, B = 1, 2`."
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def defined(code: str) -> list[str]:
    "Public names that a cell defines."
    try:
        body = ast.parse(code).body
    except SyntaxError:  # a magic or a shell line
        return []
    return [name for node in body for name in assigned(node) if not name.startswith("_")]


def alt(source: str, section: str) -> str:
    "What a picture shows: titles that the code gives it, else the function that draws it, else its section."
    titles = [t for t in re.findall(r'(?:suptitle\(|title\(|title=)f?"([^"]+)"', source) if "{" not in t]
    drawn = sorted(set(re.findall(r"\b(plot_\w+)\(", source)))
    return f"Picture: {'; '.join(titles or drawn)}" if titles or drawn else f"Picture of the section “{section}”"


def inches(png: bytes) -> int:
    "The width of a picture in CSS pixels: one drawn with more than 100 dots per inch is shown in its inches, sharper."
    width = struct.unpack(">I", png[16:20])[0]
    at = png[:200].find(b"pHYs")
    dots = struct.unpack(">I", png[at + 4:at + 8])[0] * 0.0254 if at > 0 else 0
    return round(width * 100 / dots) if dots > 100 else width


def terminal(text: str) -> str:
    "Text as a terminal would leave it: no colours, no progress bars, nothing that was overwritten."
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in plain.split("\n")]
    return "\n".join(line for line in lines if not BAR.search(line))


def tidy(outputs: list[dict]) -> list[dict]:
    "Outputs without progress bars, pictures with their size."
    for output in outputs:
        if "text" in output:
            output["text"] = terminal(joined(output["text"]))
        if "image/png" in output.get("data", {}):
            width = inches(b64decode(joined(output["data"]["image/png"])))
            output["metadata"]["image/png"] = dict(width=width)
    return [o for o in outputs if o["output_type"] != "stream" or o["text"].strip()]


def is_live(output: dict) -> bool:
    data = output.get("data", {})
    return "image/png" in data and bool(WIDGET.match(joined(data.get("text/plain", ""))))


def code_cells(cell: dict, section: str, anchored: set[str]) -> list[dict]:
    "What a page shows for a code cell: nothing, or the cell, below anchors for names that it is the first to define."
    text = joined(cell["source"])
    words = directives(text)
    text = re.sub(r"^#\|.*\n?", "", text, flags=re.M).strip("\n")
    outputs = tidy(cell["outputs"])
    if words & {"hide", "include:false"} or not (text or outputs):
        return []
    metadata = dict(mystnb=dict(image=dict(alt=alt(text, section))))
    shown = [cell | dict(source=text, outputs=outputs, metadata=metadata)]
    if "echo:false" in words:
        metadata["tags"] = ["remove-input"]
    if "export" in words:
        found = defined(text)
        prompt = "Source: " + ", ".join(found) if found else "Source"
        metadata["tags"] = ["hide-input"]
        metadata["mystnb"] |= dict(code_prompt_show=prompt, code_prompt_hide=prompt)
        new = [name for name in dict.fromkeys(found) if name not in anchored]
        anchored |= set(new)
        if new:
            anchors = [f'<span class="defined" id="def-{name}"></span>' for name in new]
            shown.insert(0, markdown("".join(anchors)))
    return shown + [markdown(LIVE)] * any(map(is_live, outputs))


# --- a whole notebook ---

def with_dark(text: str, folder: Path) -> str:
    "Markdown with both pictures where `x-dark.png` lies beside `x.png`."
    def both(found: re.Match) -> str:
        words, path = found.groups()
        dark = path.replace(".png", "-dark.png")
        if not (folder / dark).is_file():
            return found[0]
        return f"![{words}]({path}){{.only-light}} ![{words}]({dark}){{.only-dark}}"
    return re.sub(r"!\[([^\]]*)\]\(([^)\s:]+\.png)\)", both, text)


ANCHOR = re.compile(r"(\]\([^)\s]*\.ipynb#)([^)\s]+)\)")


def with_anchors(text: str) -> str:
    "Links to headings, which JupyterLab writes with capitals, as the site writes them."
    return ANCHOR.sub(lambda found: f"{found[1]}{found[2].lower()})", text)


BESIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(\w+\.md)(?:#[^)\s]*)?\)")


def without_files(text: str) -> str:
    "Links to files of the repository that the site lacks, as words and the file's name."
    return BESIDE.sub(r"\1 (`\2`)", text)


def solved(words: str, code: str) -> str:
    "The words of a solution, still open at their end; the copy of its code, which JupyterLab needs, is dropped."
    words = words.replace(f"```python\n{code}\n```", "").rstrip()
    if FOLD in words and words.endswith("</details>"):
        return words.removesuffix("</details>")
    return f"{words}\n\n{FOLD}\n"


def pages_cells(cells: list[dict], folder: Path) -> list[dict]:
    "The cells of a page; code of a solution stands in the fold of its words."
    found, section, folded, anchored = [], "", False, set()
    for cell in cells:
        source = joined(cell["source"])
        solution = cell["cell_type"] == "code" and "solution" in cell["metadata"].get("tags", [])
        if folded and not solution:
            found.append(markdown("</details>"))
        if solution and not folded:
            found[-1]["source"] = solved(found[-1]["source"], source)
        folded = solution
        if cell["cell_type"] == "markdown":
            section = ([section] + re.findall(r"^#+ (.+)", source, re.M))[-1]
            found.append(markdown(with_dark(with_anchors(without_files(source)), folder)))
        elif cell["cell_type"] == "code":
            found += code_cells(cell, section, anchored)
    return found + [markdown("</details>")] * folded


def where(chapter: toc.Chapter) -> str:
    "The line under a title: part and position, module, notebook."
    module = toc.module(chapter.doc)
    said = [f"{chapter.part}, {chapter.place}" if chapter.place else chapter.part]
    said += [f"module {{doc}}`{module} </api/{module}>`"] if module else []
    return "{.where}\n" + " · ".join([*said, f"notebook `nbs/{chapter.doc}.ipynb`"])


def page(doc: str) -> dict:
    "A notebook as myst-nb reads it."
    path = toc.NBS / f"{doc}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"] = pages_cells(notebook["cells"], path.parent)
    chapter = next((c for c in toc.chapters() if c.doc == doc), None)
    first = notebook["cells"][0]
    if chapter is None:
        notebook["metadata"]["orphan"] = True
    elif doc != "index":
        first["source"] = re.sub(r"^# .+\n", lambda m: f"{m[0]}\n{where(chapter)}\n", first["source"], count=1)
    if doc == "index":
        notebook["cells"].append(markdown(sidebar()))
    for i, cell in enumerate(notebook["cells"]):
        cell["id"] = f"cell-{i}"
    return notebook


# --- pages that no notebook is ---

def toctree(caption: str, docs: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", *docs, "```"])


def sidebar() -> str:
    "The order of all pages, for the index, which is the root of the site."
    trees = [toctree(part["part"], [f"/{doc}" for doc in part["chapters"]]) for part in toc.parts()]
    trees[0] = trees[0].replace("/index\n", "self\n/contents\n/api/index\n")
    return "\n\n".join(trees)


def contents() -> str:
    "Every chapter with the sentence that it says of itself."
    lines = ["# Contents"]
    for part in toc.parts():
        lines += ["", f"## {part['part']}", "", part["about"], ""]
        mark = "1." if part.get("numbered") else "-"
        lines += [f"{mark} [{toc.title(doc)}](/{doc}.ipynb): {toc.summary(doc)}" for doc in part["chapters"]]
    return "\n".join(lines) + "\n"


def files() -> dict[str, str | bytes]:
    "Every file of Sphinx's source folder, by its path."
    found = {f"{doc}.ipynb": json.dumps(page(doc)) for doc in toc.notebooks()}
    found |= {p.relative_to(toc.NBS).as_posix(): p.read_bytes() for p in toc.NBS.rglob("*.png")}
    return found | {"contents.md": contents(), **names.api_pages()}


def write(app) -> None:
    "Bring the source folder up to date."
    folder, wanted = Path(app.srcdir), files()
    for old in folder.rglob("*.*"):
        if old.is_file() and old.relative_to(folder).as_posix() not in wanted:
            old.unlink()
    for path, content in wanted.items():
        data = content if isinstance(content, bytes) else content.encode()
        target = folder / path
        if not target.is_file() or target.read_bytes() != data:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


def keep_pictures(app, *_) -> None:
    "myst-nb puts the pictures of outputs beside the site's folder; they belong to what is remembered between builds."
    app.env.mystnb_config.output_folder = str(Path(app.doctreedir) / "pictures")


def setup(app) -> None:
    app.connect("builder-inited", write)
    app.connect("env-before-read-docs", keep_pictures)
