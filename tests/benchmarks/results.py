"""What a row says: numbers, targets, the table that is printed and the file that the page reads."""
import json
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .measuring import Agreement, Spread

FILE = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Result:
    """One line of the table. `reference` and `ours` are in `unit`; `ratio` is reference by ours, pair by pair; `limit`
    is how many times as long as one read of the observed tensors ours takes; `points` are what a line of growth was
    fitted to."""

    row: str
    unit: str
    ours: Spread
    reference: Spread | None = None
    ratio: Spread | None = None
    target: str = ""
    met: bool | None = None
    agreement: Agreement | None = None
    limit: float | None = None
    rounds: int = 0
    note: str = ""
    points: dict[str, Any] | None = None


Target = tuple[str, Callable[[Result], bool]]


def faster(n: float, aim: float | None = None) -> Target:
    "Ours is to be so many times faster."
    return f"≥ {n:g} × faster" + (f", aim {aim:g}" if aim else ""), lambda r: r.ratio.median >= n


def at_most(value: float, unit: str) -> Target:
    "Ours is to cost no more than that."
    return f"≤ {value:g} {unit}".strip(), lambda r: r.ours.median <= value


def judged(result: Result, target: Target | None) -> Result:
    "The result with its target and whether it is met; scales that differ meet none."
    if target is None: return result
    same = result.agreement is None or result.agreement.differ == 0
    return replace(result, target=target[0], met=bool(target[1](result) and same))


def ratios(above: Iterable[float], below: Iterable[float]) -> Spread:
    return Spread.of(a / b for a, b in zip(above, below))


def timing(
    row: str, times: dict[str, list[float]], target: Target | None = None, agreement: Agreement | None = None,
    note: str = ""
) -> Result:
    "A line about seconds: `times` of `ours`, and of `reference` and `limit` if they were measured."
    ours, theirs, limit = times["ours"], times.get("reference"), times.get("limit")
    result = Result(
        row, "s", Spread.of(ours), Spread.of(theirs) if theirs else None, ratios(theirs, ours) if theirs else None,
        agreement=agreement, limit=ratios(ours, limit).median if limit else None, rounds=len(ours), note=note
    )
    return judged(result, target)


def overhead(
    row: str, times: dict[str, list[float]], target: Target | None = None, agreement: Agreement | None = None,
    note: str = ""
) -> Result:
    """A line about the percentage that a pass takes longer than a `bare` one; its ratio, with a reference, is that of
    whole passes."""
    def more(name: str) -> Spread: return Spread.of(100 * (t / b - 1) for t, b in zip(times[name], times["bare"]))
    extra = [t - b for t, b in zip(times["ours"], times["bare"])]
    theirs, limit = times.get("reference"), times.get("limit")
    result = Result(
        row, "%", more("ours"), more("reference") if theirs else None,
        ratios(theirs, times["ours"]) if theirs else None, agreement=agreement,
        limit=ratios(extra, limit).median if limit else None, rounds=len(extra), note=note
    )
    return judged(result, target)


def multiple(row: str, ours: list[float], other: list[float], target: Target | None = None, note: str = "") -> Result:
    "A line about how many times as long as something else ours takes."
    return judged(Result(row, "×", ratios(ours, other), rounds=len(ours), note=note), target)


# --- the table ---


def amount(value: float, unit: str) -> str:
    "A number with its unit, in three digits."
    if unit == "%": return f"{value:+.1f} %"
    if unit == "s": return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    return f"{value:.2f}" if unit == "exponent" else f"{value:.2f} {unit}"


def spread(value: Spread | None, unit: str = "") -> str:
    "A median and its quartiles."
    if value is None: return ""
    one = (lambda v: f"{v:.3g}") if unit in ("", "exponent") else (lambda v: amount(v, unit))
    return (
        one(value.median) if value.low == value.high else f"{one(value.median)} ({one(value.low)} … {one(value.high)})"
    )


COLUMNS = (
    "row", "reference", "ours", "reference / ours", "target", "met", "scales", "equal", "ties", "differ", "× one read",
    "rounds", "note"
)


def cells(r: Result) -> list[str]:
    "A line of the table, a string for each of COLUMNS."
    a = r.agreement
    counts = [f"{n:,}" for n in (a.scales, a.equal, a.ties, a.differ)] if a else [""] * 4
    return [
        r.row, spread(r.reference, r.unit), spread(r.ours, r.unit), spread(r.ratio), r.target,
        {None: "", True: "yes", False: "no"}[r.met], *counts, "" if r.limit is None else f"{r.limit:.3g}",
        str(r.rounds or ""), r.note
    ]


def table(results: Iterable[Result]) -> str:
    "All lines, aligned."
    lines = [list(COLUMNS), *map(cells, results)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


# --- the file ---


def machine() -> dict[str, Any]:
    "Where this runs: processor, cores, memory, versions."
    try:
        model = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
        )
    except (OSError, StopIteration): model = platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    packages = ("torch", "transformers", "compressed-tensors", "llmcompressor")
    return dict(
        processor=model, cores=os.cpu_count(), memory_gib=round(memory / 2**30), system=platform.system(),
        python=platform.python_version(), **{p: version(p) for p in packages}
    )


def write(name: str, what: str, results: Iterable[Result], file: Path = FILE) -> None:
    "Put the lines of one row into the file; those of other rows stay, each with its own date and machine."
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    # of the last minute, our own threads included: more than those means that the machine was shared
    load = round(os.getloadavg()[0], 1)
    known[name] = dict(
        what=what, date=date.today().isoformat(), load=load, machine=machine(), results=[asdict(r) for r in results]
    )
    file.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _revive(value: dict[str, Any]) -> Result:
    spreads = {k: Spread(**value[k]) for k in ("ours", "reference", "ratio") if value[k]}
    return Result(**value | spreads | ({"agreement": Agreement(**value["agreement"])} if value["agreement"] else {}))


def read(file: Path = FILE) -> dict[str, dict[str, Any]]:
    "By row: what it measures, when and where it was measured, and its `results`."
    rows = json.loads(file.read_text(encoding="utf-8"))
    return {name: row | dict(results=[_revive(r) for r in row["results"]]) for name, row in rows.items()}
