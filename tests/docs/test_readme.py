"README.md and CONTRIBUTING.md: what they link to exists, and what they tell one to type is understood."
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from qcal_nb.cli import parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md"]


def text_of(page: str) -> str:
    if page != "index": return (ROOT / page).read_text(encoding="utf-8")
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def headings(path: Path) -> set[str]:
    "Anchors of a markdown file or a notebook, as GitHub (markdown) and JupyterLab (notebook) make them."
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        titles = re.findall(r"^#+ (.+)$", prose, re.M)
        return {t.replace("`", "").replace(" ", "-") for t in titles}
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def broken(page: Path) -> list[str]:
    "Relative links and pictures of a markdown file that lead nowhere."
    links = re.findall(r"\]\(([^)\s]+)", re.sub(r"(?s)```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8")))
    wrong = []
    for link in (x for x in links if not re.match(r"\w+:", x)):
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in headings(target)): wrong.append(link)
    return wrong


def typed(text: str, program: str) -> list[str]:
    "Commands that begin with `program`, from shell blocks and from inline code, without comments."
    blocks = [line for block in re.findall(r"(?s)```sh\n(.*?)```", text) for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"(?s)```.*?```", "", text))
    return [line.split(" #")[0].strip() for line in blocks + inline if re.match(rf"{program}\s+\S", line)]


def targets() -> dict[str, set[str]]:
    "Makefile's targets, and the variables that it reads."
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return dict(targets=set(re.findall(r"^([a-z][a-z-]*):", text, re.M)), variables=set(re.findall(r"\$\((\w+)", text)))


def unknown(command: str) -> list[str]:
    "The words of a `make` command that Makefile does not know."
    known, words = targets(), shlex.split(command)[1:]
    def is_known(word): return word.split("=")[0] in known["variables" if "=" in word else "targets"]
    return [word for word in words if not is_known(word)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page): assert broken(ROOT / page) == []


def test_a_broken_link_is_seen(tmp_path):
    text = "# One two\n\n[x](#one-two) [y](#three) ![p](no.png) [z](https://x.org) `[c](no.md)`"
    (tmp_path / "a.md").write_text(text)
    assert broken(tmp_path / "a.md") == ["#three", "no.png"]


@pytest.mark.parametrize("page", [*PAGES, "index"])
def test_make_knows_every_command(page):
    commands = typed(text_of(page), "make")
    assert len(commands) >= 2 and not [(c, unknown(c)) for c in commands if unknown(c)]


def test_an_unknown_target_is_seen():
    assert unknown("make lab PORT=1") == []
    assert unknown("make tea") == ["tea"] and unknown("make lab SUGAR=1") == ["SUGAR=1"]


def understood(command: str) -> bool:
    "Does the command line's own parser take it? `--help` counts, a usage error does not."
    try: parser().parse_args(shlex.split(command)[1:])
    except SystemExit as end: return end.code == 0
    return True


@pytest.mark.parametrize("page", ["README.md", "index"])
def test_the_command_line_knows_every_command(page, capsys):
    commands = typed(text_of(page), "qcal-nb")
    assert {shlex.split(c)[1] for c in commands} == {"lab", "calibrate", "report"}
    assert [c for c in commands if not understood(c)] == []


def test_an_unknown_flag_is_seen(capsys):
    assert not understood("qcal-nb calibrate tiny --out run --sugar") and not understood("qcal-nb brew tiny")


@pytest.mark.slow
def test_the_first_example_runs_as_it_stands_and_prints_what_is_shown(tmp_path):
    "By itself, in a process of its own, elsewhere."
    code, shown = re.search(r"(?s)```python\n(.*?)\n```\n\n```text\n(.*?)\n```", text_of("README.md")).groups()
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 10
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.rstrip() == shown


def test_the_readme_is_current():
    spec = importlib.util.spec_from_file_location("qcal_tools_readme", ROOT / "tools" / "readme.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text, pictures = tool.readme(ROOT)
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run `make readme`"
    for path, png in pictures.items(): assert (ROOT / path).read_bytes() == png, f"{path}: run `make readme`"
