"Code cells and their outputs as HTML. A picture becomes a file, a progress bar goes, solutions and long imports are folded."
import ast
import base64
import re
import struct
from dataclasses import dataclass
from html import escape

from nbconvert.filters import strip_ansi
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from .names import Name
from .notebooks import Cell, Notebook, joined

LEXER, FORMATTER = get_lexer_by_name("ipython3"), HtmlFormatter()
BAR = re.compile(r"\d+%\|.*\|\s*\S+/\S+ \[")                              # tqdm's
WIDGET = re.compile(r"\w+\((children=\(|.*layout=Layout)")               # how ipywidgets print themselves
SCOPED = re.compile(r"<style scoped>.*?</style>\s*", re.S)                # pandas' own; the site's style sheet has its rules
LIVE = "A picture of a live panel: in JupyterLab it answers to mouse and keyboard."
NO_PICTURE = "A live panel stands here when the notebook runs in JupyterLab."

@dataclass
class Picture:
    "A PNG of an output; `url` relative to _docs/."
    url: str
    png: bytes

    @property
    def size(self) -> tuple[int, int]:
        "Width and height on the page: a picture drawn with more than 100 dots per inch is shown in its inches, sharper."
        width, height = struct.unpack(">II", self.png[16:24])
        at = self.png[:200].find(b"pHYs")
        dots = struct.unpack(">I", self.png[at+4:at+8])[0]*0.0254 if at > 0 else 0
        shrink = 100/dots if dots > 100 else 1
        return round(width*shrink), round(height*shrink)

def terminal_text(text: str) -> str:
    "Text as a terminal would leave it: no colours, what was overwritten and progress bars are gone."
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in strip_ansi(text).split("\n")]
    return "\n".join(line for line in lines if not BAR.search(line)).strip("\n")

def text_html(text: str, kind: str = "") -> str:
    shown = terminal_text(text)
    return f'<pre class="text {kind}" tabindex="0">{escape(shown, quote=False)}</pre>' if shown.strip() else ""

def alt(source: str, section: str) -> str:
    "What a picture shows, in words: titles that the code gives it, else the function that draws it, else its section."
    titles = [t for t in re.findall(r'(?:suptitle\(|title\(|title=)f?"([^"]+)"', source) if "{" not in t]
    drawn = sorted(set(re.findall(r"\b(plot_\w+)\(", source)))
    return f"Picture: {'; '.join(titles or drawn)}" if titles or drawn else f"Picture of the section “{section}”"

def picture_html(picture: Picture, up: str, words: str, note: str = "") -> str:
    width, height = picture.size
    caption = f"<figcaption>{note}</figcaption>" if note else ""
    return f'<figure><img src="{up}{picture.url}" alt="{escape(words)}" width="{width}" height="{height}" loading="lazy">{caption}</figure>'

def merged(outputs: list[dict]) -> list[dict]:
    "Outputs with streams of one name that follow each other in one piece."
    found: list[dict] = []
    for output in outputs:
        if found and output["output_type"] == "stream" and found[-1].get("name") == output["name"]:
            found[-1] = found[-1] | dict(text=joined(found[-1]["text"])+joined(output["text"]))
        else: found.append(output)
    return found

def only_imports(cell: Cell) -> bool:
    "Is a cell the long list of what a module imports, which no reader of the chapter waits for?"
    if not cell.exported or cell.outputs or cell.text.count("\n") < 5: return False
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(cell.text).body)

def add_solution(body: list[str], code: str) -> None:
    "Fold the code of a solution: together with its words, where the cell above has them folded already."
    summary = "<summary>Solution</summary>"
    there = body and summary in body[-1] and body[-1].rstrip().endswith("</details>")
    above = body.pop().rstrip() if there else f"<details>{summary}\n</details>"
    body.append(f"{above.removesuffix('</details>')}{code}</details>\n")

@dataclass
class CodeCells:
    "Renders the code of one page; `pictures` collects its files."
    book: Notebook
    names: dict[str, list[Name]]                                          # by the cell that defines them
    pictures: list[Picture]

    def html(self, cell: Cell, section: str) -> str:
        source = self.source_html(cell) if cell.text and "echo:false" not in cell.tags else ""
        outputs = [self.output_html(o, f"{cell.id}-{i}", alt(cell.text, section)) for i, o in enumerate(merged(cell.outputs))]
        shown = "\n".join(f'<div class="output">{o}</div>' for o in outputs if o)
        body = f'<div class="cell{" exported" if cell.exported else ""}" id="cell-{cell.id}">\n{source}{shown}\n</div>\n'
        return f'<details class="imports"><summary>Imports of the module</summary>\n{body}</details>\n' if only_imports(cell) else body

    def source_html(self, cell: Cell) -> str:
        "Highlighted code; the name in each public definition carries its anchor."
        lines = highlight(cell.text, LEXER, FORMATTER).split("\n")
        for name in self.names.get(cell.id, []):
            short = name.name.rpartition(".")[2]
            anchored = rf'<span class="\1" id="{name.anchor}">{short}</span>'
            marked = re.sub(rf'<span class="(\w+)">{short}</span>', anchored, lines[name.line-1], count=1)
            if marked == lines[name.line-1]: raise ValueError(f"{self.book.path}: no place for the anchor of {name.name} in {cell.id}")
            lines[name.line-1] = marked
        return "\n".join(lines)

    def output_html(self, output: dict, name: str, words: str) -> str:
        if output["output_type"] == "stream": return text_html(joined(output["text"]), output["name"])
        data = output.get("data", {})
        text = joined(data.get("text/plain", output.get("traceback", "")))
        live = WIDGET.match(text) is not None or any("widget-view" in mime for mime in data)
        if "image/png" in data: return picture_html(self.kept(name, joined(data["image/png"])), self.book.up, words, LIVE if live else "")
        if "text/html" in data: return f'<div class="scroll" tabindex="0">{SCOPED.sub("", joined(data["text/html"]))}</div>'
        return f'<p class="note">{NO_PICTURE}</p>' if live else text_html(text)

    def kept(self, name: str, encoded: str) -> Picture:
        page = self.book.url.removesuffix(".html").replace("/", "-")
        self.pictures.append(Picture(f"pictures/{page}-{name}.png", base64.b64decode(encoded)))
        return self.pictures[-1]
