"nbs/_toc.yml as Python, and what the site asks of a notebook: its title, its sentence, its module."
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
UNLISTED = ("app", "train_tiny_llama")  # linked to from chapters, so they have pages, but they are no chapters


@dataclass(frozen=True)
class Chapter:
    "A notebook that is read: `doc` is its path in nbs/ without .ipynb, `place` is `3 of 8` where parts are numbered."
    doc: str
    part: str
    place: str


def parts() -> list[dict]:
    return yaml.safe_load((NBS / "_toc.yml").read_text(encoding="utf-8"))


def chapters() -> list[Chapter]:
    "All chapters in reading order."
    found = []
    for part in parts():
        docs = part["chapters"]
        places = [f"{i} of {len(docs)}" if part.get("numbered") else "" for i in range(1, len(docs) + 1)]
        found += [Chapter(doc, part["part"], place) for doc, place in zip(docs, places, strict=True)]
    return found


def notebooks() -> list[str]:
    "Every notebook below nbs/, as _toc.yml would name it."
    paths = (p.relative_to(NBS) for p in sorted(NBS.rglob("*.ipynb")))
    return [p.with_suffix("").as_posix() for p in paths if not any(part[0] in "_." for part in p.parts)]


@cache
def cells(doc: str) -> list[tuple[str, str]]:
    "(kind, source) of each cell of a notebook."
    notebook = json.loads((NBS / f"{doc}.ipynb").read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def title(doc: str) -> str:
    return re.match(r"# (.+)", cells(doc)[0][1])[1]


def summary(doc: str) -> str:
    "The sentence below the title: `> what it is`."
    return re.search(r"^> (.+)", cells(doc)[0][1], re.M)[1]


def module(doc: str) -> str | None:
    "The dotted module that a notebook exports to."
    code = "\n".join(text for kind, text in cells(doc) if kind == "code")
    found = re.findall(r"^#\|\s*default_exp\s+(\S+)", code, re.M)
    return f"qcal_nb.{found[-1]}" if found else None


@cache
def modules() -> dict[str, str]:
    "Module → the notebook that exports it, in reading order."
    return {name: c.doc for c in chapters() if (name := module(c.doc))}
