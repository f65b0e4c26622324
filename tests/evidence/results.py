"""The file of results: a line for each finished row, so that a run that was interrupted goes on where it was."""
import json
import os
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.results import machine

FILE = Path(__file__).with_name("results.json")
Key = tuple[str, str, str]     # model, part, name
Row = dict[str, Any]
_PACKAGES = ("torch", "transformers", "compressed-tensors")


def this_machine() -> str:
    "The machine in words."
    found = machine()
    said = ", ".join(f"{name} {found[name]}" for name in _PACKAGES)
    return f"{found['processor']}, {found['cores']} cores, Python {found['python']}, {said}"


def rounded(value: Any) -> Any:
    "Six digits of numbers, also inside of lists and dicts."
    if isinstance(value, list): return [rounded(one) for one in value]
    if isinstance(value, dict): return {key: rounded(one) for key, one in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Results:
    """Rows by (model, part, name), in a file. A row that is added replaces its earlier self and is written at once,
    with the date, the machine, and how busy that was (load average of a minute)."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or FILE
        self.outdated: set[Key] = set()     # in the file, but to be found again
        self.kept: dict[tuple[str, str], list[float]] = {}  # by model and recipe, what outdated rows have measured

    @property
    def rows(self) -> dict[Key, Row]:
        "All rows that are in the file; another model's may come from another process."
        lines = self.path.read_text(encoding="utf-8").splitlines()[1:-1] if self.path.exists() else []
        found = (json.loads(line.removesuffix(",")) for line in lines)
        return {(row["model"], row["part"], row["name"]): row for row in found}

    def of(self, model: str, part: str) -> dict[str, Row]:
        "The rows of a part, by name."
        return {name: row for (m, p, name), row in self.rows.items() if (m, p) == (model, part)}

    def missing(self, model: str, part: str, names: Iterable[str]) -> list[str]:
        "Those of these rows that are not there yet, or outdated, in order."
        known = self.rows.keys() - self.outdated
        return [name for name in names if (model, part, name) not in known]

    def add(self, model: str, part: str, name: str, values: Row) -> None:
        where = dict(date=date.today().isoformat(), machine=this_machine(), load=round(os.getloadavg()[0], 1))
        kept = {key: rounded(value) for key, value in values.items()}
        row = dict(model=model, part=part, name=name, **kept, **where)
        self._write(self.rows | {(model, part, name): row})
        self.outdated.discard((model, part, name))

    def outdate(self, model: str, part: str, keep_measured: bool) -> None:
        """The rows of a part are to be found again. `keep_measured`: what was measured of a recipe holds as long as the
        recipe stays the same, whatever is forecast of it."""
        old = self.of(model, part)
        self.outdated |= {(model, part, name) for name in old}
        if keep_measured:
            self.kept |= {(model, row["recipe"]): row["kls"] for row in old.values() if "recipe" in row}

    def finish(self, model: str, part: str) -> None:
        "Rows that were outdated and were not found again are gone: a part has no such row any more."
        gone = {key for key in self.outdated if key[:2] == (model, part)}
        if gone: self._write({key: row for key, row in self.rows.items() if key not in gone})
        self.outdated -= gone

    def _write(self, rows: Mapping[Key, Row]) -> None:
        draft = self.path.with_suffix(".tmp")
        lines = (json.dumps(row, ensure_ascii=False) for row in rows.values())
        draft.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        os.replace(draft, self.path)


class Part:
    "The rows of one part of one model, while they are found."

    def __init__(self, results: Results, model: str, name: str) -> None:
        self.results = results
        self.model = model
        self.name = name

    def missing(self, names: Iterable[str]) -> list[str]: return self.results.missing(self.model, self.name, names)

    def measured(self, recipe: str) -> list[float] | None:
        "The KL of each text that an outdated row of the model has for this very recipe."
        return self.results.kept.get((self.model, recipe))

    def add(self, row: str, **values: Any) -> None:
        self.results.add(self.model, self.name, row, values)
        print(f"{self.model}, {self.name}: {row}", flush=True)
