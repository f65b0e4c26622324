"""README.md, CONTRIBUTING.md, index and walkthroughs: what they link to exists, what they tell you to type is
understood, and the README is short. That the README is current: test_generated."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from qcal_nb.cli.commands import parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md"]
WALKTHROUGHS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nbs" / "tutorials").glob("*.ipynb"))
MAX_BYTES = 12_000


def prose(path: Path) -> str:
    "The text of a markdown file, or of the markdown cells of a notebook."
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb": return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def text_of(page: str) -> str: return prose(ROOT / ("nbs/index.ipynb" if page == "index" else page))


def headings(path: Path) -> set[str]:
    "Anchors of a markdown file or a notebook, as GitHub (markdown) and JupyterLab (notebook) make them."
    if path.suffix == ".ipynb":
        return {t.replace("`", "").replace(" ", "-") for t in re.findall(r"^#+ (.+)$", prose(path), re.M)}
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.+)$", prose(path), re.M)}


def broken(page: Path) -> list[str]:
    "Relative links and pictures of a markdown file or a notebook that lead nowhere."
    links = re.findall(r"\]\(([^)\s]+)", re.sub(r"(?s)```.*?```|`[^`\n]*`", "", prose(page)))
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
    return [
        w for w in words
        if ("=" in w and w.split("=")[0] not in known["variables"]) or ("=" not in w and w not in known["targets"])
    ]


def test_the_readme_is_short():
    size = (ROOT / "README.md").stat().st_size
    assert size < MAX_BYTES, f"{size:,} bytes: what teaches belongs into nbs/tutorials/quickstart.ipynb"


def test_the_readme_names_every_walkthrough():
    linked = re.findall(r"\]\((nbs/tutorials/[^)#]+)\)", text_of("README.md"))
    assert sorted(linked) == WALKTHROUGHS and len(WALKTHROUGHS) > 8


@pytest.mark.parametrize("page", [*PAGES, "nbs/index.ipynb", *WALKTHROUGHS])
def test_links_lead_somewhere(page): assert broken(ROOT / page) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "a.md").write_text(
        "# One two\n\n[x](#one-two) [y](#three) ![p](no.png) [z](https://x.org) `[c](no.md)`"
    )
    assert broken(tmp_path / "a.md") == ["#three", "no.png"]


def test_a_broken_link_of_a_notebook_is_seen(tmp_path):
    words = dict(cell_type="markdown", source=["# One `two`\n\n[x](a.ipynb#One-two) [y](a.ipynb#one-two)"])
    (tmp_path / "a.ipynb").write_text(json.dumps(dict(cells=[words, dict(cell_type="code", source=["[z](no.md)"])])))
    assert broken(tmp_path / "a.ipynb") == ["a.ipynb#one-two"]


@pytest.mark.parametrize("page", [*PAGES, "index"])
def test_make_knows_every_command(page):
    commands = typed(text_of(page), "make")
    assert len(commands) >= 2 and not [(c, unknown(c)) for c in commands if unknown(c)]


def test_an_unknown_target_is_seen():
    assert unknown("make lab PORT=1") == [] and unknown("make tea") == ["tea"]
    assert unknown("make lab SUGAR=1") == ["SUGAR=1"]


def understood(command: str) -> bool:
    "Does the command line's own parser take it? `--help` counts, a usage error does not."
    try: parser().parse_args(shlex.split(command)[1:])
    except SystemExit as end: return end.code == 0
    return True


@pytest.mark.parametrize("page", ["README.md", "index"])
def test_the_command_line_knows_every_command(page, capsys):
    commands = typed(text_of(page), "qcal-nb")
    assert {shlex.split(c)[1] for c in commands} == {"lab", "calibrate", "plan", "report"}
    assert [c for c in commands if not understood(c)] == []


def test_an_unknown_flag_is_seen(capsys):
    assert not understood("qcal-nb calibrate tiny --out run --sugar") and not understood("qcal-nb brew tiny")


def words_and_numbers(text: str) -> tuple[list[str], list[float]]:
    """A text without its decimal fractions, and those: their last digits depend on the processor, whose matrix products
    sum in an order of their own."""
    fraction = r"\d+\.\d+"
    return re.sub(fraction, "#", text).split(), [float(number) for number in re.findall(fraction, text)]


@pytest.mark.slow
def test_the_code_runs_as_it_stands_and_prints_what_is_shown(tmp_path):
    """All of the README's Python, in one process of its own, elsewhere. Ten lines for your own model, imports not
    counted."""
    blocks, shown = (re.findall(rf"(?s)```{kind}\n(.*?)\n```", text_of("README.md")) for kind in ("python", "text"))
    assert len([line for line in blocks[0].splitlines() if line and "import" not in line]) <= 10
    ran = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    words, numbers = words_and_numbers(ran.stdout)
    words_shown, numbers_shown = words_and_numbers("\n".join(shown))
    assert words == words_shown and not list(tmp_path.iterdir())
    assert numbers == pytest.approx(numbers_shown, rel=0.01, abs=0.002)
