"""Names of the package: a page a module, comments of parameters as their descriptions, links from the API to the
chapters and from words in prose to the API."""
import builtins
import importlib
import inspect
import pkgutil
import re
from collections import Counter
from functools import cache
from types import ModuleType

import toc

import qcal_nb
from docutils import nodes
from fastcore.docments import docments
from sphinx.addnodes import pending_xref
from sphinx.util.nodes import make_refnode

# Doors, written by hand: they hand on what their modules define.
PACKAGES = ["qcal_nb", *(f"qcal_nb.{info.name}" for info in pkgutil.iter_modules(qcal_nb.__path__) if info.ispkg)]
INSIDE_CLASS = ("method", "property", "attribute")


# --- pages of the API ---

def is_made(value: object) -> bool:
    "Is it a class or a function (one of numba or with a cache, too), and no constant?"
    wrapped = hasattr(value, "__wrapped__") or hasattr(value, "py_func")
    return inspect.isclass(value) or inspect.isfunction(value) or wrapped


@cache
def members(name: str) -> tuple[list[str], list[tuple[str, str]]]:
    "Public names that a module defines, and (name, module) of those that it hands on."
    module = importlib.import_module(name)
    homes = {public: home(module, public) for public in module.__all__}
    own = [n for n, at in homes.items() if at == name and n[0] != "_"]
    return own, [(n, at) for n, at in homes.items() if at != name]


def home(module: ModuleType, name: str) -> str:
    "The module of ours that defines a name: that of a class or function is known, a constant is looked for."
    value = getattr(module, name)
    at = getattr(value, "__module__", None)
    if is_made(value) and at in toc.modules():
        return at
    return next(m for m in [module.__name__, *toc.modules()] if assigns(m, name))


def assigns(module: str, name: str) -> bool:
    "Is a name bound to a value in a module, and not imported?"
    source = inspect.getsource(importlib.import_module(module))
    return bool(re.search(rf"^(\w+, )*{name}\b[^=\n(]*=", source, re.M))


def api_page(name: str) -> str:
    own, others = members(name)
    chapter = toc.modules().get(name)
    lines = [name, "=" * len(name), ""]
    if chapter:
        lines += [".. rst-class:: where", "", f"Explained in the chapter :doc:`{toc.title(chapter)} </{chapter}>`.", ""]
    made = [n for n in own if is_made(getattr(importlib.import_module(name), n))]
    lines += [f".. automodule:: {name}"] + [f"   :members: {', '.join(made)}"] * bool(made) + [""]
    lines += [line for n in own if n not in made for line in (f".. autodata:: {name}.{n}", "")]
    if others:
        lines += [".. rubric:: Defined elsewhere, imported from here as well", ""]
        lines += [f"- :py:obj:`{n} <{at}.{n}>`: {first_line(at, n)}" for n, at in others]
    return "\n".join([*lines, ""])


def first_line(module: str, name: str) -> str:
    value = getattr(importlib.import_module(module), name)
    said = inspect.getdoc(value) if is_made(value) else None
    return escaped(said.split("\n")[0]) if said else "a constant"


def api_index() -> str:
    every = [*PACKAGES, *toc.modules()]
    about = "Public names, a page a module, in the order of the chapters; :ref:`all names <genindex>`."
    lines = ["API", "===", "", about, ""]
    for name in every:
        chapter = toc.modules().get(name)
        said = toc.summary(chapter).replace("`", "``") if chapter else importlib.import_module(name).__doc__
        lines += [f":doc:`{name} <{name}>`", f"   {said}", ""]
    return "\n".join([*lines, ".. toctree::", "   :hidden:", "", *(f"   {name}" for name in every), ""])


def api_pages() -> dict[str, str]:
    pages = {f"api/{name}.rst": api_page(name) for name in [*PACKAGES, *toc.modules()]}
    return {"api/index.rst": api_index(), **pages}


def compiled_as_functions() -> None:
    "numba's functions are objects without a signature: autodoc is shown the Python that they were made from."
    for name in toc.modules():
        module = importlib.import_module(name)
        for public in module.__all__:
            value = getattr(module, public)
            if hasattr(value, "py_func"):
                setattr(module, public, value.py_func)


# --- docstrings ---

def escaped(line: str) -> str:
    "A line of ours as reStructuredText: `code` stays, stars and bars outside of it are only signs."
    pieces = re.split(r"(`+[^`]*`+)", line)
    return "".join(p if i % 2 else re.sub(r"([*|])", r"\\\1", p) for i, p in enumerate(pieces))


def parameters(obj: object) -> dict[str, str]:
    "The comments of a signature; `return` is the result."
    try:
        found = docments(obj, full=False)
    except (AttributeError, OSError, TypeError, ValueError):  # no source, no signature
        return {}
    return {name: " ".join(str(said).split()) for name, said in found.items() if said and name not in ("self", "cls")}


def constant(name: str, value: object) -> list[str]:
    "What a constant is: the comment behind it, and its value where it is short. Its type's docstring says nothing."
    module, _, short = name.rpartition(".")
    source = inspect.getsource(importlib.import_module(module)) if module in [*PACKAGES, *toc.modules()] else ""
    comment = re.search(rf"^{short}\b[^#\n]*=[^#\n]*#\s*(.+)$", source, re.M)
    shown = repr(value)
    said = [escaped(comment[1]), ""] if comment else []
    return said + ([f"``{shown}``"] if len(shown) <= 100 and " at 0x" not in shown else [])


def docstring(app, what: str, name: str, obj: object, options, lines: list[str]) -> None:
    if what == "data":
        lines[:] = constant(name, obj)
        return
    lines[:] = [escaped(line) for line in lines]
    if what not in ("function", "method", "class"):
        return
    fields = {n: escaped(said) for n, said in parameters(obj).items()}
    if fields:
        lines += ["", *(f":returns: {said}" if n == "return" else f":param {n}: {said}" for n, said in fields.items())]


def chapter_of(domain: str, info: dict) -> str | None:
    "Where [source] leads: to the cell of the chapter that defines the name."
    doc = toc.modules().get(info["module"])
    return f"../{doc}.html#def-{info['fullname'].split('.')[0]}" if doc else None


def plain_types(app, doctree: nodes.document) -> None:
    "Types of Python in a signature are nothing of ours: `bytes` is not `Allocation.bytes`."
    for ref in list(doctree.findall(pending_xref)):
        if ref.get("reftype") == "class" and ref["reftarget"] in vars(builtins):
            ref.replace_self(nodes.Text(ref["reftarget"]))


# --- words in prose ---

@cache
def arguments() -> set[str]:
    "Names of parameters: such a word in prose may mean the parameter."
    found = set()
    for name in toc.modules():
        module = importlib.import_module(name)
        for value in (getattr(module, public) for public in members(name)[0]):
            if inspect.isfunction(value):
                found |= set(inspect.signature(value).parameters)
    return found


def meanings(app) -> dict[str, tuple[str, object]]:
    "Words → (name, object of Sphinx) for those that mean one thing: `calibrate`, `Workbench.feed`."
    found, count = {}, Counter()
    for name, entry in app.env.get_domain("py").objects.items():
        word = ".".join(name.split(".")[-2 if entry.objtype in INSIDE_CLASS else -1:])
        if entry.objtype == "module" or entry.aliased:
            continue
        found[word] = name, entry
        count[word] += 1
    return {word: meant for word, meant in found.items() if count[word] == 1 and word not in arguments()}


def sure(word: re.Match) -> bool:
    "A common word, such as `ranges`, means a name only where it is called."
    return bool(word[2]) or "_" in word[1] or word[1] != word[1].lower()


def link_words(app, doctree: nodes.document, docname: str) -> None:
    meant = app.env.temp_data.setdefault("meanings", meanings(app))
    for literal in list(doctree.findall(nodes.literal)):
        word = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)?)(\(.*\))?", literal.astext(), re.S)
        if not word or word[1] not in meant or not sure(word):
            continue
        name, entry = meant[word[1]]
        if entry.docname == docname or isinstance(literal.parent, nodes.reference | nodes.title):
            continue
        link = make_refnode(app.builder, docname, entry.docname, entry.node_id, literal.deepcopy(), name)
        literal.replace_self(link)


def setup(app) -> None:
    app.connect("builder-inited", lambda app: compiled_as_functions())
    app.connect("autodoc-process-docstring", docstring)
    app.connect("doctree-read", plain_types)
    app.connect("doctree-resolved", link_words)
