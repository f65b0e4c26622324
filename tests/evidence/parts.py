"""What is measured. Each part adds rows to the file, those that are not there yet."""
import ast
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import Module

from benchmarks.measuring import Work, alternate, cpu_seconds
from qcal_nb.analysis import Finding, compare_observers, findings
from qcal_nb.calibration import args_in
from qcal_nb.evaluate import allocation_within, forecast, forecast_modules, model_choices, named_schemes
from qcal_nb.evaluate.budget import Choices, recipe_for, solve
from qcal_nb.evaluate.divergence import logits_of, undisturbed
from qcal_nb.lifecycle import QuantizationModifier, schemes_by_module
from qcal_nb.recipes import override
from qcal_nb.records import CalibrationRecord, observers_from_stats
from qcal_nb.records.module_costs import quantized, weight_results
from qcal_nb.schemes import has_groups, preset
from qcal_nb.session import Session

from .results import Part, Results
from .subjects import STATIC, Subject, recipe
from .tables import PLAIN


@dataclass(frozen=True)
class Kind:
    "A part: a name to ask for, a sentence, and the function."

    what: str
    run: Callable[[Subject, Part], None]


PARTS: dict[str, Kind] = {}


def part(name: str, what: str) -> Callable:
    "Register a function as a part."
    def add(run: Callable[[Subject, Part], None]) -> Callable[[Subject, Part], None]:
        PARTS[name] = Kind(what, run)
        return run
    return add


def forecast_row(subject: Subject, name: str, scheme: Any) -> dict[str, Any]:
    "What is forecast of a scheme, as plain values; seconds of the processor that it took."
    record = subject.record     # made before the clock runs
    began = time.process_time()
    found = forecast(record, subject.model, {name: scheme}).iloc[0]
    took = time.process_time() - began
    if found.why: return dict(why=found.why)
    known = {key: float(found[key]) for key in ("weights", "inputs", "spread")}
    return dict(forecast=float(found.kl), state=found.state, **known, seconds=took)


def fingerprint(subject: Subject, scheme: Any) -> str:
    "What a measured KL depends on, in a few letters: the recipe, and the length of texts."
    modifier, = named_schemes([scheme]).values()
    said = f"{subject.length} {modifier.resolved_config.model_dump_json()}"
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def judged(subject: Subject, rows: Part, name: str, scheme: Any, **more: Any) -> None:
    """Add a row: the forecast, and the KL of each held-out text; the latter alone where there is no forecast, with the
    reason."""
    said = forecast_row(subject, name, scheme)
    known = fingerprint(subject, scheme)
    rows.add(name, **more, **said, recipe=known, kls=rows.measured(known) or subject.kls(scheme))


# --- schemes ---

SCHEMES = (
    "FP8", "FP8_DYNAMIC", "W8A8", "INT8_STATIC", "W8A16", "W4A16", "NVFP4", "MXFP4", "NVFP4A16", "MXFP4A16", "MXFP8",
    "W4A16_ASYM", "W4AFP8", "W6A16", "W3A16", "W2A16",
)


def has_integer_groups(name: str) -> bool: return has_groups(name) and preset(name).weights.type == "int"


def schemes_of(subject: Subject) -> dict[str, Any]:
    "By name; those with groups of integers in the size that divides the model's columns."
    size = dict(group_size=subject.group_size)
    return {name: (name, size) if has_integer_groups(name) else name for name in SCHEMES}


@part("schemes", "Every Linear but the head under one scheme: forecast KL, and KL on texts that were not recorded.")
def schemes(subject: Subject, rows: Part) -> None:
    known = schemes_of(subject)
    for name in rows.missing(known):
        judged(subject, rows, name, known[name])


# --- other texts ---

SETS = 5


@part("texts", "The same forecasts from recordings of other texts, to see how much the choice of texts counts.")
def texts(subject: Subject, rows: Part) -> None:
    known = schemes_of(subject)
    for name in rows.missing(str(n) for n in range(1, SETS)):
        table = forecast(subject.of_texts(int(name)), subject.model, known)
        rows.add(name, forecasts=dict(zip(table.scheme, table.kl)))


# --- modules ---

RANKED = ("W4A16", "INT8_STATIC")


def by_forecast(subject: Subject, scheme: str) -> pd.Series:
    "The forecast of each module, the worst first."
    table = forecast_modules(subject.record, subject.model, schemes_of(subject)[scheme])
    return table.set_index("module").kl.sort_values(ascending=False, kind="stable")


@part("modules", "Single Linears quantized alone: a fair sample by the rank of their forecast.")
def modules(subject: Subject, rows: Part) -> None:
    for scheme in RANKED:
        said = by_forecast(subject, scheme)
        name_of = {module: f"{scheme}, {module}" for module in subject.sample(said.index)}
        missing = rows.missing(name_of.values())
        if not missing: continue
        whole = fingerprint(subject, schemes_of(subject)[scheme])
        with subject.quantized(schemes_of(subject)[scheme]) as measure:
            for module, name in name_of.items():
                if name not in missing: continue
                known = f"{whole} {module}"
                rows.add(name, scheme=scheme, module=module, forecast=float(said[module]), recipe=known,
                         kls=rows.measured(known) or measure([module]))


# --- budgets ---

SHARES = (0.1, 0.3, 0.6, 0.9)   # of the way from W4A16 everywhere to W8A16 everywhere, in bytes
UNIFORM = ("W4A16", "W8A16")


@torch.no_grad()
def relative_error(record: CalibrationRecord, modules: Mapping[str, Module], scheme: Any) -> float:
    "Σ over modules of ‖ΔW‖² / ‖W‖² times the number of weights: what is often taken for the cost of a unit."
    if scheme is None: return 0.0
    weights = {name: module.weight.detach() for name, module in modules.items()}
    results = weight_results(record, weights, args_in(scheme, "weight"))
    total = 0.0
    for name, weight in weights.items():
        error = (quantized(weight, results[name]).float() - weight.float()).square().sum()
        total += float(error / weight.float().square().sum()) * weight.numel()
    return total


def costs(choices: Choices, of: Callable[[tuple[str, ...], Any], float]) -> np.ndarray:
    "A cost for each unit and candidate (units, labels), infinite where it does not fit."
    pairs = zip(choices.units.values(), choices.schemes)
    found = [[of(names, scheme) for scheme in offered] for names, offered in pairs]
    return np.where(np.isfinite(choices.cost), np.array(found), np.inf)


def measured_alone(subject: Subject, choices: Choices) -> np.ndarray:
    "The KL of each unit alone, by candidate: what forwards for every unit would tell."
    found = np.zeros_like(choices.cost)
    for i in range(len(choices.labels)):
        everywhere = recipe_for(choices, [i] * len(choices.units))
        if everywhere is None: continue
        with subject.quantized(everywhere) as measure:
            found[:, i] = [float(np.mean(measure(names))) for names in choices.units.values()]
    return found


def mix_of(choices: Choices, choice: Iterable[int]) -> str:
    "How many units have each candidate."
    counts = np.bincount(np.array(choice, int), minlength=len(choices.labels))
    return ", ".join(f"{label} {n}" for label, n in zip(choices.labels, counts) if n)


class Budgets:
    "The choices of a model as a checkpoint in bfloat16, and the ways to choose."

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.model = subject.in_bfloat16
        self.record = subject.recording(self.model)
        self.choices = model_choices(self.record, self.model, None, (), "evidence")
        self.costs = dict(forecast=self.choices.cost, error=self._error())
        if subject.every == 1:
            self.costs["measured"] = measured_alone(subject, self.choices)

    def _error(self) -> np.ndarray:
        def of(names: tuple[str, ...], scheme: Any) -> float:
            return relative_error(self.record, {name: self.model.get_submodule(name) for name in names}, scheme)
        return costs(self.choices, of)

    def uniform(self, label: str) -> np.ndarray:
        return np.full(len(self.choices.units), self.choices.labels.index(label))

    def budget(self, share: float) -> float:
        small, large = (self.choices.total(self.uniform(label))[1] for label in UNIFORM)
        return small + share * (large - small)

    def choice(self, way: str, share: float) -> np.ndarray:
        "By the cheapest sum of costs within a budget."
        return solve(self.costs[way], self.choices.size, self.budget(share) - self.choices.rest)

    def judge(self, rows: Part, name: str, choice: np.ndarray, **more: Any) -> None:
        _, size = self.choices.total(choice)
        judged(self.subject, rows, name, recipe_for(self.choices, choice), bytes=size, mix=mix_of(self.choices, choice),
               **more)


WAYS = ("forecast", "error", "measured")


def chosen_ways(subject: Subject) -> dict[str, tuple[str, float]]:
    "Name of a row -> how it is chosen, and the share of the way that its budget is."
    ways = WAYS if subject.every == 1 else WAYS[:2]     # of a large model, not every unit is measured alone
    return {f"{share:.0%} {way}": (way, share) for share in SHARES for way in ways}


@part("budget", "Recipes for so many bytes, chosen by forecast and otherwise, beside uniform schemes.")
def budget(subject: Subject, rows: Part) -> None:
    names = chosen_ways(subject)
    missing = rows.missing([*UNIFORM, *names])
    if not missing: return
    found = Budgets(subject)
    for name in missing:
        if name in UNIFORM:
            found.judge(rows, name, found.uniform(name), way="uniform")
            continue
        way, share = names[name]
        choice = found.choice(way, share)
        same = allocation_within(found.choices, found.budget(share))
        assert way != "forecast" or math.isclose(same.kl, found.choices.total(choice)[0])
        found.judge(rows, name, choice, way=way, share=share, budget=found.budget(share))


# --- advice ---

def remedied(subject: Subject) -> list[Finding]:
    "The findings of the record that say what can be done, in their order."
    return [finding for finding in findings(subject.record, progress=False) if finding.remedies]


ORDINALS = ("first", "second")


def named_by(subject: Subject, ordinal: str) -> list[str]:
    "The modules that one of these findings is about, in model order."
    record = subject.record
    keys = remedied(subject)[ORDINALS.index(ordinal)].keys
    named = {name for key in keys for name in record.readers.get(key, key[:1])}
    return [name for name in record.types if name in named]


def as_said(subject: Subject, ordinal: str) -> QuantizationModifier:
    "The scheme with what a finding says to write: the modules to leave unquantized."
    remedies = remedied(subject)[ORDINALS.index(ordinal)].remedies
    code = next(remedy.code for remedy in remedies if remedy.code.startswith("ignore="))
    return recipe(scheme=STATIC, ignore=ast.literal_eval(code.removeprefix("ignore=")))


def spared(names: Iterable[str]) -> QuantizationModifier:
    "The scheme with these modules left as they are."
    return recipe(scheme=STATIC, ignore=["lm_head", *names])


def mixed(names: Iterable[str], other: str) -> QuantizationModifier:
    "The scheme with another one, a preset, for these modules."
    groups = dict(rest=preset(STATIC), others=preset(other, targets=list(names)))
    return recipe(config_groups=groups)


def worst_units(subject: Subject, n: int) -> list[str]:
    "The modules of the `n` units with the highest forecast: vLLM wants q, k and v alike, and gate and up."
    table = forecast_modules(subject.record, subject.model, STATIC)
    order = table.groupby("unit").kl.sum().sort_values(ascending=False, kind="stable")
    return list(table[table.unit.isin(order.index[:n])].module)


def best_by_sqnr(subject: Subject) -> QuantizationModifier:
    "The scheme with the observer of the highest SQNR for each input, of those that follow from the record."
    plain = recipe(scheme=STATIC)
    args = args_in(preset(STATIC), "input")
    table = compare_observers(subject.record, ["minmax", *observers_from_stats()], args=args, progress=False)
    table = table[(table.base_name == "input") & table.sqnr_db.notna()]
    best = table.loc[table.groupby("module").sqnr_db.idxmax()]
    chosen = {name: dict(input=row.observer) for row in best.itertuples() for name in row.readers}
    return override(plain, chosen, subject.model)


def best_by_forecast(subject: Subject, spare: Iterable[str] = (), **options: Any) -> QuantizationModifier:
    """The scheme with the observer that is forecast to cost least for each input, as a session keeps it when it has
    asked the model on the texts of the record."""
    session = Session(subject.model, subject.feeds, record=subject.record, scheme=STATIC, ignore=["lm_head", *spare])
    session.use_best("input", **options)
    return session.recipe()


def clipped(subject: Subject, names: Iterable[str]) -> QuantizationModifier:
    "The scheme with `percentile` for the inputs of these modules."
    return override(recipe(scheme=STATIC), {name: dict(input="percentile") for name in names}, subject.model)


def best_but_for(subject: Subject, names: Iterable[str]) -> QuantizationModifier:
    "The same unasked, but for some modules, which keep the scheme's observer."
    session = Session(subject.model, subject.feeds, record=subject.record, scheme=STATIC)
    chosen = session.use_best("input", check=False)
    left = {name: observer for name, observer in chosen.items() if name not in names}
    return override(recipe(scheme=STATIC), left, subject.model)


def other_observers(subject: Subject) -> Iterator[tuple[str, Callable[[], QuantizationModifier]]]:
    "Other observers for all inputs: a name and the recipe, made when it is needed. Nobody advises them."
    yield PLAIN, lambda: recipe(scheme=STATIC)
    for name in ("static_minmax", "percentile", "entropy", "mse"):
        yield f"inputs by {name}", lambda name=name: recipe(scheme=STATIC, input_observer=name)
    yield "inputs by the highest SQNR", lambda: best_by_sqnr(subject)
    yield "inputs by fisher_mse", lambda: recipe(scheme=STATIC, input_observer="fisher_mse")
    yield "percentile for the first finding's", lambda: clipped(subject, named_by(subject, "first"))
    yield "use best, unasked", lambda: best_by_forecast(subject, check=False)
    yield "use best, unasked, not for the first finding's", lambda: best_but_for(subject, named_by(subject, "first"))


def advised(subject: Subject) -> Iterator[tuple[str, Callable[[], QuantizationModifier]]]:
    "What forecast and findings advise."
    for n in (1, 5, 10):
        yield f"spare the worst {n} by forecast", lambda n=n: spared(worst_units(subject, n))
    yield "use best", lambda: best_by_forecast(subject)
    yield "use best, of llm-compressor's observers", lambda: best_by_forecast(subject, production=True)
    yield "use best and spare the worst 10", lambda: best_by_forecast(subject, spare=worst_units(subject, 10))
    for ordinal in ORDINALS[:subject.findings]:
        yield f"spare the {ordinal} finding's", lambda ordinal=ordinal: as_said(subject, ordinal)
        for other in ("FP8", "W8A8"):
            name = f"{other} for the {ordinal} finding's"
            yield name, lambda ordinal=ordinal, other=other: mixed(named_by(subject, ordinal), other)


Makes = dict[str, Callable[[], QuantizationModifier]]


def everything(subject: Subject) -> Makes: return dict(other_observers(subject)) | dict(advised(subject))


def count_spared(subject: Subject, made: QuantizationModifier) -> int:
    "How many modules a recipe leaves unquantized, beside the head."
    with_all, left = (schemes_by_module(subject.model, one.resolved_config) for one in (recipe(scheme=STATIC), made))
    return len(with_all) - len(left)


@part("advice", "INT8_STATIC, and what might be done about it; all on the same texts.")
def advice(subject: Subject, rows: Part) -> None:
    good = dict(advised(subject))
    todo = everything(subject)
    for name in rows.missing(todo):
        made = todo[name]()
        judged(subject, rows, name, made, advised=name in good, spared=count_spared(subject, made))


# --- what counts besides ---

SHORT = 64
SHORT_SCHEMES = ("FP8", "W8A8", "INT8_STATIC", "W4A16")


@part("length", f"The same model on texts of {SHORT} tokens: recorded on them and measured on them.")
def length(subject: Subject, rows: Part) -> None:
    missing = rows.missing(SHORT_SCHEMES)
    if not missing: return
    short = subject.cut_to(SHORT)
    for name in missing:
        judged(short, rows, name, schemes_of(short)[name], tokens=SHORT)


ROUNDS = 3


def _forward(subject: Subject) -> Callable[[Any], None]:
    def run(_: Any) -> None:
        with undisturbed(subject.model, "evidence"):
            for ids in subject.feeds:
                logits_of(subject.model, dict(input_ids=ids))
    return run


@part("cost", "Seconds of the processor, at one thread: a bare forward pass over the recorded texts, and recordings.")
def cost(subject: Subject, rows: Part) -> None:
    if not rows.missing(["recording"]): return
    works = {
        "forward": Work(_forward(subject)),
        "record": Work(lambda _: subject.recording(subject.model, gradients=False)),
        "gradients": Work(lambda _: subject.recording(subject.model)),
    }
    times = alternate(works, ROUNDS, clock=cpu_seconds)
    parameters = sum({id(p): p.numel() for p in subject.model.parameters()}.values())
    rows.add("recording", parameters=parameters, tokens=subject.recorded * subject.length, **times)


def run(subject: Subject, chosen: Iterable[str], results: Results) -> None:
    "These parts of a model."
    for name in chosen:
        PARTS[name].run(subject, Part(results, subject.name, name))
        results.finish(subject.name, name)
