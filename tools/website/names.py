"Public names of the package: where each is defined, what it looks like, and which words in prose mean it."
import ast
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .notebooks import Cell, Notebook

@dataclass
class Name:
    "A public name; `line` counts from 1 in the shown text of cell `cell`; a name that no chapter defines has no `page`."
    name: str
    kind: str
    signature: str
    summary: str
    line: int = 0
    module: str = ""
    page: str = ""
    cell: str = ""
    methods: list["Name"] = field(default_factory=list)

    @property
    def anchor(self) -> str: return f"def-{self.name}"
    @property
    def url(self) -> str: return f"{self.page}#{self.anchor}" if self.page else f"api.html#{self.module}"

def summary(node: ast.AST) -> str:
    text = ast.get_docstring(node) or ""
    return " ".join(text.split("\n\n")[0].split())

def parameters(node: ast.FunctionDef, method: bool = False) -> str:
    "`(x: int, *, y=2) -> str` of a function; a method without its `self`."
    shown = ast.unparse(node.args)
    if method and not any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list): shown = re.sub(r"^\w+(, )?(/, )?", "", shown)
    return f"({shown})"+(f" -> {ast.unparse(node.returns)}" if node.returns else "")

def is_dataclass(node: ast.ClassDef) -> bool: return any("dataclass" in ast.unparse(d) for d in node.decorator_list)

def class_signature(node: ast.ClassDef) -> str:
    "What one calls: the parameters of `__init__`, the fields of a dataclass or named tuple, else the bases."
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init: return parameters(init, method=True).removesuffix(" -> None")
    fields = [ast.unparse(n).split("=")[0].strip() for n in node.body if isinstance(n, ast.AnnAssign) and n.target.id[0] != "_"]
    bases = [ast.unparse(b) for b in node.bases]
    if fields and (is_dataclass(node) or {"NamedTuple", "TypedDict"} & set(bases)): return f"({', '.join(fields)})"
    return f"({', '.join(bases)})" if bases else ""

def method(owner: str, node: ast.FunctionDef) -> Name:
    kind = "property" if any("property" in ast.unparse(d) for d in node.decorator_list) else "method"
    shown = parameters(node, method=True)
    return Name(f"{owner}.{node.name}", kind, shown.removeprefix("()") if kind == "property" else shown, summary(node), node.lineno)

def assigned(node: ast.Assign | ast.AnnAssign, lines: list[str]) -> list[Name]:
    "Constants with their comment: behind the first line, or on the line above."
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    comment = re.search(r"\s#\s*(.+)$", lines[node.lineno-1])
    above = re.match(r"#\s*(.+)$", lines[node.lineno-2]) if node.lineno > 1 else None
    words = comment[1] if comment else above[1] if above else ""
    found = [t for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)]
    return [Name(t.id, "constant", f": {ast.unparse(node.annotation)}" if isinstance(node, ast.AnnAssign) else "", words, t.lineno) for t in found]

def defined(cell: Cell) -> list[Name]:
    "Every name that a cell defines at its top level, methods of classes beneath them."
    lines, found = cell.text.split("\n"), []
    for node in ast.parse(cell.text).body:
        if isinstance(node, ast.FunctionDef): found.append(Name(node.name, "function", parameters(node), summary(node), node.lineno))
        elif isinstance(node, ast.ClassDef):
            methods = {n.name: method(node.name, n) for n in node.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"}
            found.append(Name(node.name, "class", class_signature(node), summary(node), node.lineno, methods=list(methods.values())))
        elif isinstance(node, ast.Assign | ast.AnnAssign): found += assigned(node, lines)
    return found

class Sources:
    "Modules of a package as syntax trees, each read once and never run."
    def __init__(self, package: Path): self.package, self.trees = package, {}

    def path(self, module: str) -> Path:
        base = self.package.joinpath(*filter(None, module.split(".")))
        return base/"__init__.py" if base.is_dir() else base.with_suffix(".py")

    def tree(self, module: str) -> ast.Module:
        if module not in self.trees: self.trees[module] = ast.parse(self.path(module).read_text(encoding="utf-8"))
        return self.trees[module]

    def public(self, module: str) -> list[str]:
        "A module's `__all__`."
        lists = [ast.literal_eval(n.value) for n in self.tree(module).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        return [name for names in lists for name in names]

    def imported(self, module: str) -> dict[str, str]:
        "Names that a module imports from within its package → the module that they come from (`observers.base`; the top is the empty string)."
        inside, found = self.path(module).relative_to(self.package).parent.parts, {}
        for node in ast.walk(self.tree(module)):
            if not isinstance(node, ast.ImportFrom): continue
            if node.level: base = ".".join([*inside[:len(inside)-node.level+1], *filter(None, [node.module])])
            elif node.module.split(".")[0] == self.package.name: base = node.module.removeprefix(self.package.name).strip(".")
            else: continue
            found |= {a.asname or a.name: base for a in node.names}
        return found

@dataclass
class Module:
    "A module with a public list: `own` names that it defines, `others` that it hands on from where they are defined."
    name: str
    own: list[Name]
    others: list[Name]
    book: Notebook | None = None

    @property
    def dotted(self) -> str: return f"qcal_nb.{self.name}" if self.name else "qcal_nb"

def own_names(book: Notebook, listed: list[str]) -> list[Name]:
    "The public names of a chapter in the order of the chapter; a name that is defined twice counts where it was last."
    found: dict[str, Name] = {}
    for cell in book.cells:
        if cell.kind != "code" or not cell.exported: continue
        for name in defined(cell):
            if name.name not in listed: continue
            for n in (name, *name.methods): n.module, n.page, n.cell = f"qcal_nb.{book.module}", book.url, cell.id
            found.pop(name.name, None); found[name.name] = name
    return list(found.values())

def argument_names(name: Name) -> set[str]:
    if name.kind not in ("function", "method"): return set()
    args = ast.parse(f"def f{name.signature}: pass").body[0].args
    return {a.arg for a in [*args.posonlyargs, *args.args, *args.kwonlyargs]}

class Names:
    "All public names of a package, from its folder and its chapters: `modules` in the order of the chapters, the top level first."
    def __init__(self, package: Path, books: list[Notebook]):
        self.sources = Sources(package)
        chapters = [Module(b.module, own_names(b, self.sources.public(b.module)), [], b) for b in books if b.module]
        tops = [p.parent.relative_to(package).as_posix().replace("/", ".").strip(".") for p in sorted(package.rglob("__init__.py"))]
        inits = [Module(top, [], []) for top in tops if self.sources.public(top)]
        self.own = {(m.name, n.name): n for m in chapters for n in m.own}
        self.modules = [*inits, *chapters]
        for module in self.modules: self.complete(module)
        self.meanings = self.unambiguous()

    def home(self, module: str, name: str) -> Name | None:
        "Where `name` of `module` is defined, however many modules hand it on; None if no chapter defines it."
        while (module, name) not in self.own:
            source = self.sources.imported(module).get(name)
            if source is None or source == module: return None
            module = source
        return self.own[module, name]

    def complete(self, module: Module) -> None:
        "Fill in what a module hands on; what is written by hand in an `__init__.py` is shown as it stands there."
        for name in self.sources.public(module.name):
            home = self.home(module.name, name)
            if home is None: module.own.append(self.by_hand(module, name))
            elif home not in module.own: module.others.append(home)

    def by_hand(self, module: Module, name: str) -> Name:
        for node in self.sources.tree(module.name).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return Name(name, "constant", f" = {ast.unparse(node.value)}", "", module=module.dotted)
        raise ValueError(f"{module.dotted}.__all__ names {name!r}, which no chapter defines; `make export` may be due")

    def unambiguous(self) -> dict[str, Name]:
        "Names, and methods as `Class.method`, that mean one thing: defined once, and no function's parameter is called so."
        every = [n for m in self.modules for n in m.own if n.page]
        every += [m for n in every for m in n.methods]
        counts = Counter(n.name for n in every)
        arguments = set().union(*map(argument_names, every))
        return {n.name: n for n in every if counts[n.name] == 1 and n.name not in arguments}

    def link(self, text: str, book: Notebook) -> str | None:
        """The page that inline code means, relative to `book`'s; None if that is not certain.

        A common word (`ranges`, `calibrate`, which is a command too) means a name only where it is called and on the page that defines it.
        """
        word = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)?)(\(.*\))?", text, re.S)
        name = self.meanings.get(word[1]) if word else None
        if name is None: return None
        if name.page == book.url: return f"#{name.anchor}"
        sure = word[2] or "_" in name.name or name.name != name.name.lower()
        return f"{book.up}{name.url}" if sure else None
