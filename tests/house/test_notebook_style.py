"""What keeps the notebooks readable, as numbers: budgets on size and prose, one lesson after each definition, outputs
that anyone can see.

Each rule is a function from a notebook to complaints, and each has an example below that it must complain about.
"""
import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("qcal_tools_drift", ROOT/"tools"/"drift.py")
drift = importlib.util.module_from_spec(spec); spec.loader.exec_module(drift)

MAX_CELLS, MAX_BYTES, MAX_LINES, MAX_COLUMNS = 80, 160_000, 70, 120    # a statement a line takes lines, and bytes
MAX_CLASS = 150     # lines of a cell that is one class
MIN_PROSE, MAX_HIDDEN, MIN_SHOWN = 0.25, 0.10, 0.90
SHOW_WITHIN = 3                                                           # cells after a definition
EXPORTS = {"export", "exports", "exporti"}
PRIVATE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|tmp|root|home|Users|opt|mnt|var)/[\w.-]")

def source(cell): return "".join(cell["source"])

def directives(cell):
    if cell["cell_type"] != "code": return set()
    return {m.split(":")[0] for m in re.findall(r"^#\|\s*([\w:]+)", source(cell), re.M)}

def code(cell): return re.sub(r"^#\|.*$", "", source(cell), flags=re.M)

def exported(nb): return [c for c in nb["cells"] if directives(c) & EXPORTS]

def names(cell):
    "Public functions and classes that a cell defines."
    defined = (
        n.name for n in ast.parse(code(cell)).body
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    )
    return [n for n in defined if not n.startswith("_")]

def shows_something(cell):
    "Is it a cell that a reader sees run: neither exported nor hidden nor imports alone?"
    if cell["cell_type"] != "code" or directives(cell) & (EXPORTS | {"hide"}): return False
    return any(not isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse(plain(cell)).body)

def plain(cell):
    "A cell's code as Python alone: magics and shell lines are comments"
    return re.sub(r"^(\s*)([%!]\w)", r"\1pass # \2", code(cell), flags=re.M)

def data_of(nb): return [(c, o) for c in nb["cells"] for o in c.get("outputs", [])]

# --- the rules ---

def size(nb):
    n, b = len(nb["cells"]), len(json.dumps(nb, indent=1, ensure_ascii=False).encode())
    return [f"{n} cells, at most {MAX_CELLS}"]*(n > MAX_CELLS) + [f"{b:,} bytes, at most {MAX_BYTES:,}"]*(b > MAX_BYTES)

def prose(nb):
    share = sum(c["cell_type"] == "markdown" for c in nb["cells"])/len(nb["cells"])
    return [f"{share:.0%} of the cells are prose, at least {MIN_PROSE:.0%}"]*(share < MIN_PROSE)

def hiding(nb):
    # one is always allowed: a short notebook may need it
    n = sum("hide" in directives(c) for c in nb["cells"])
    many = n > max(1, MAX_HIDDEN*len(nb["cells"]))
    return [f"{n} of {len(nb['cells'])} cells are hidden, at most {MAX_HIDDEN:.0%}"]*many

def title(nb):
    first = nb["cells"][0]
    good = first["cell_type"] == "markdown" and re.match(r"# \S.*\n\n> \S", source(first))
    return [] if good else ["does not begin with `# title`, an empty line and `> what it is`"]

def is_one_class(cell):
    "A class that is the subject of its chapter may have a cell for itself, however many short methods it has."
    return [type(node) for node in ast.parse(code(cell)).body] == [ast.ClassDef]

def cell_lines(nb):
    counts = [(len(code(c).strip("\n").splitlines()), c) for c in exported(nb)]
    most = lambda cell: MAX_CLASS if is_one_class(cell) else MAX_LINES
    return [f"cell {c['id']} exports {n} lines, at most {most(c)}" for n, c in counts if n > most(c)]

def width(nb):
    lines = [(c["id"], line) for c in nb["cells"] if c["cell_type"] == "code" for line in code(c).splitlines()]
    return [
        f"cell {i} has a line of {len(line)} columns, at most {MAX_COLUMNS}"
        for i, line in lines if len(line) > MAX_COLUMNS
    ]


GUARDS = ast.Return | ast.Raise | ast.Continue | ast.Break | ast.Pass


def behind_a_colon(node) -> bool:
    "Does a statement's block stand on its own line, though it is no guard (`if x: return y`)?"
    if not isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try): return False
    is_guard = isinstance(node, ast.If) and len(node.body) == 1 and isinstance(node.body[0], GUARDS)
    return node.body[0].lineno == node.lineno and not is_guard


def neighbours(node):
    "Pairs of statements that follow each other in a block of `node`."
    bodies = [getattr(node, field, None) for field in ("body", "orelse", "finalbody")]
    return [pair for body in bodies if isinstance(body, list) for pair in zip(body, body[1:])]


def one_statement_a_line(nb):
    found = []
    for cell in (c for c in nb["cells"] if c["cell_type"] == "code"):
        tree = ast.parse(plain(cell))
        pairs = [pair for node in ast.walk(tree) for pair in neighbours(node)]
        found += [f"cell {cell['id']}: two statements on line {b.lineno}" for a, b in pairs if a.end_lineno == b.lineno]
        found += [
            f"cell {cell['id']}: a statement behind a colon on line {n.lineno}"
            for n in ast.walk(tree) if behind_a_colon(n)
        ]
    return found


def shown(nb):
    cells = nb["cells"]
    defining = [
        (i, ", ".join(names(c))) for i, c in enumerate(cells) if directives(c) & {"export", "exports"} and names(c)
    ]
    missing = [n for i, n in defining if not any(map(shows_something, cells[i+1:i+1+SHOW_WITHIN]))]
    if len(missing) <= (1-MIN_SHOWN)*len(defining): return []
    return [
        f"{len(missing)} of {len(defining)} definitions without a demonstration within {SHOW_WITHIN} cells: "
        f"{'; '.join(missing)}"
    ]

def output_kinds(nb):
    kinds = {mime for _, o in data_of(nb) for mime in o.get("data", {})}
    bad = sorted(k for k in kinds if not k.startswith("text/") and k != "image/png")
    errors = [o["ename"] for _, o in data_of(nb) if o["output_type"] == "error"]
    state = ["saved widget state in the metadata"]*("widgets" in nb["metadata"])
    return [f"output of kind {k}" for k in bad] + [f"a cell failed with {e}" for e in errors] + state

def texts(nb):
    "What the outputs say."
    return [
        "".join(t) for _, o in data_of(nb)
        for t in [o.get("text", ""), *(v for k, v in o.get("data", {}).items() if k.startswith("text/"))]
    ]

def private_paths(nb):
    return [
        f"output shows a path of one machine: {text[max(0, m.start()-20):m.end()+30]!r}"
        for text in texts(nb) for m in PRIVATE_PATH.finditer(text)
    ]

def strangers(nb):
    "What a lesson of another notebook registered, and a process that ran both still knew."
    own = "".join(source(c) for c in nb["cells"])
    said = {name for text in texts(nb) for name in re.findall(r"\blesson_\w+", text)}
    found = sorted(name for name in said if name not in own)
    return [f"output names {name}, which no cell does: run the notebook alone" for name in found]

def folded(nb):
    "JupyterLab folds a solution, and what it prints: both would answer the exercise above them."
    solutions = [c for c in nb["cells"] if "solution" in c["metadata"].get("tags", [])]
    shows = [
        (c["id"], part) for c in solutions
        for part in ("source", "outputs") if not c["metadata"].get("jupyter", {}).get(f"{part}_hidden")
    ]
    return [f"the solution {cell} shows its {part}" for cell, part in shows]

RULES = [
    size, prose, hiding, title, cell_lines, width, one_statement_a_line, shown, output_kinds, private_paths,
    strangers, folded
]

# --- our notebooks ---

@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
@pytest.mark.parametrize(
    "path", drift.notebooks(ROOT), ids=lambda p: p.relative_to(ROOT/"nbs").as_posix().removesuffix(".ipynb")
)
def test_style(path, rule):
    assert rule(json.loads(path.read_text(encoding="utf-8"))) == []

def test_one_notebook_one_module(): assert {m: n for m, n in drift.modules(ROOT).items() if len(n) > 1} == {}

def test_a_notebook_lies_where_its_module_lies():
    homes = {p.relative_to(ROOT/"nbs").as_posix(): drift.default_exp(p) for p in drift.notebooks(ROOT)}
    assert {p: m for p, m in homes.items() if m and p != m.replace(".", "/")+".ipynb"} == {}


def test_no_number_in_a_name_says_what_to_read_next():
    assert [p.name for p in drift.notebooks(ROOT) if re.match(r"\d", p.name)] == []

# --- the rules can complain ---

def md(text): return dict(cell_type="markdown", id="m", metadata={}, source=[text])

def py(text, *outputs): return dict(md(text), cell_type="code", id="c", execution_count=None, outputs=list(outputs))

def book(*cells, **metadata):
    return dict(cells=[md("# name\n\n> One line."), *cells], metadata=metadata, nbformat=4, nbformat_minor=5)

def out(**data):
    return dict(output_type="display_data", metadata={}, data={k.replace("_", "/", 1): v for k, v in data.items()})

BAD = [
    (size, book(*[md("x")]*MAX_CELLS), "81 cells"),
    (size, book(md("x"*MAX_BYTES)), "bytes"),
    (prose, book(*[py("1")]*4), "20% of the cells are prose"),
    (hiding, book(md("x"), py("#| hide\n1"), py("#| hide\n2")), "2 of 4"),
    (title, dict(book(), cells=[py("1")]), "does not begin"),
    (title, dict(book(), cells=[md("# name")]), "does not begin"),
    (title, dict(book(), cells=[md("## name\n\n> line")]), "does not begin"),
    (cell_lines, book(py("#| export\n" + "x = 1\n"*(MAX_LINES+1))), "exports 71 lines"),
    (width, book(py("x = 1  # " + "x"*MAX_COLUMNS)), "has a line of 129 columns"),
    (one_statement_a_line, book(py("x = 1; y = 2")), "two statements on line 1"),
    (one_statement_a_line, book(py("if x: y = 1")), "a statement behind a colon on line 1"),
    (one_statement_a_line, book(py("for x in y: print(x)")), "a statement behind a colon"),
    (one_statement_a_line, book(py("with a: b()")), "a statement behind a colon"),
    (one_statement_a_line, book(py("if x: return_ = 1; y = 2")), "two statements"),
    (shown, book(py("#| export\ndef f(): pass"), py("from a import b")), "1 of 1"),
    (shown, book(py("#| export\nclass A: pass"), md("prose"), md("prose"), md("prose"), py("A()")), "A"),
    (shown, book(py("#| export\ndef f(): pass"), py("#| hide\nf()")), "f"),
    (
        shown,
        book(py("#| export\ndef f(): pass"), py("#| export\ndef g(): pass"), *[md("prose")]*2, py("f()")),
        "1 of 2",
    ),
    (output_kinds, book(py("w", out(**{"application_vnd.jupyter.widget-view+json": {}}))), "widget-view"),
    (output_kinds, book(py("w", out(image_jpeg="x"))), "image/jpeg"),
    (output_kinds, book(widgets={}), "widget state"),
    (
        output_kinds,
        book(py("1/0", dict(output_type="error", ename="ZeroDivisionError", evalue="", traceback=[]))),
        "ZeroDivisionError",
    ),
    (private_paths, book(py("p", out(text_plain=["'/home/me/x'"]))), "/home/me"),
    (
        folded,
        book(dict(py("42"), metadata=dict(tags=["solution"], jupyter=dict(source_hidden=True)))),
        "the solution c shows its outputs",
    ),
    (private_paths, book(py("p", dict(output_type="stream", name="stdout", text=["in /tmp/abc"]))), "/tmp/abc"),
    (strangers, book(py("names()", out(text_plain=["['lesson_own', 'mse']"]))), "output names lesson_own"),
]

@pytest.mark.parametrize("rule, nb, complaint", BAD, ids=[f"{r.__name__}-{c}" for r, _, c in BAD])
def test_a_bad_notebook_is_seen(rule, nb, complaint):
    assert complaint in " ".join(rule(nb))

def test_a_good_notebook_passes():
    good = book(md("Why."), py("#| default_exp name"), py("#| export\ndef f(x): return x"), md("It returns x."),
                py("f(1)", out(text_plain=["1"])),
                py("def g(x):\n    if x: return 1\n    return 2\n\ndef h(): return 1"),
                md("Relative paths and addresses are fine."),
                py("p", out(text_html=["<a href='https://a.org/opt/x'>"], image_png="iVBO")),
                py("register('lesson_own')", out(text_plain=["'lesson_own'"])))
    assert [c for rule in RULES for c in rule(good)] == []
