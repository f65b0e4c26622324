"""The rows of the benchmark. Each is a function of a `Size` that returns lines of the table, registered with a sentence on what it measures."""
import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver
from torch.nn import Linear, Module, Sequential

import harness
from qcal_nb.calibration import exclusive
from qcal_nb.observers import label_of
from qcal_nb.lifecycle import reset_quantization
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import load_tiny_llama
from qcal_nb.pipelines import calibrate, feed
from qcal_nb.records import new_collector, new_record, one_pass, recipe_to_record, record
from qcal_nb.session import Session
from qcal_nb.widgets import Workbench

from . import sides
from .measuring import FEW, Agreement, Found, Spread, Work, agreement, alternate, memory, one_read, threads
from .results import Result, at_most, faster, judged, overhead, timing
from .sides import FP8_TENSOR, INT4_GROUP, INT8, INT8_TENSOR, NVFP4, Size, a_pass, batch_of, distinct, inputs_of, linears, llama, quietly, watched

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2
SMALL = 25.0  # seconds for the rounds of a row about a few per cent, where noise matters most


@dataclass(frozen=True)
class Row:
    "A name to ask for, a sentence, and the function."

    name: str
    what: str
    run: Callable[[Size], list[Result]]


ROWS: list[Row] = []


def row(name: str, what: str) -> Callable:
    "Register a function as a row."
    def add(run: Callable[[Size], list[Result]]) -> Callable[[Size], list[Result]]:
        ROWS.append(Row(name, what, run))
        return run
    return add


# --- observers on a forward pass ---


def hooks(size: Size, name: str, observer: str, dtype: torch.dtype, target: Any) -> list[Result]:
    "A pass with one side's input observers on every Linear, beside a bare pass."
    model, batch, args = llama(size, dtype), batch_of(size.batch), INT8_TENSOR | dict(observer=observer)
    works = {"bare": a_pass(model, batch)} | {side: a_pass(watched(model, side, args), batch) for side in sides.MODIFIERS}
    works["limit"] = one_read(distinct(inputs_of(model, batch).values()))
    times = alternate(works, size.rounds, SMALL)
    within = {side: sides.in_hooks(watched(model, side, args), batch) for side in sides.MODIFIERS}
    with threads(1): agree = sides.hooks_agree(model, batch, args)
    note = f"by a clock around each hook: reference {within['reference']:+.1f} %, ours {within['ours']:+.1f} %"
    return [overhead(name, times, target, agree, note)]


@row("static_minmax hooks", "What a forward pass takes longer with `static_minmax` on the inputs of all Linears, int8 per tensor.")
def _(size: Size) -> list[Result]: return hooks(size, "static_minmax hooks", "static_minmax", torch.float32, at_most(2, "%"))


@row("mse hooks", "The same with `mse`, which searches for the best range of every tensor.")
def _(size: Size) -> list[Result]: return hooks(size, "mse hooks", "mse", torch.float32, at_most(20, "%"))


@row("mse hooks, bf16", "The same in a bf16 model.")
def _(size: Size) -> list[Result]: return hooks(size, "mse hooks, bf16", "mse", torch.bfloat16, None)


# --- searches, a tensor each ---


def searches(size: Size, name: str, observer: str, base_name: str, args: dict[str, Any], value: Tensor, target: Any) -> list[Result]:
    "One observer looks at one tensor."
    works = {side: sides.look_at(side, observer, base_name, args, value) for side in sides.OBSERVERS}
    times = alternate(works | {"limit": one_read([value])}, size.rounds)
    with threads(1), quietly():
        theirs, mine = (sides.found_by(sides.an_observer(side, observer, base_name, args)(value)) for side in sides.OBSERVERS)
        error = sides.error_of(observer, base_name, QuantizationArgs(**args), value)
        return [timing(name, times, target, agreement(theirs, mine, error))]


def a_weight(n: int) -> Tensor: return torch.randn(n, n, generator=torch.Generator().manual_seed(0)) / n**0.5


def an_activation(n: int, dtype: torch.dtype) -> Tensor:
    "Mostly a bell, with a few channels ten times as wide, as language models have them."
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, n, n, generator=generator) * torch.where(torch.arange(n) % 100 == 7, 10.0, 1.0)).to(dtype)


@row("memoryless_mse weight", "Search for the range of each group of 128 of a square weight, int4.")
def _(size: Size) -> list[Result]:
    return searches(size, "memoryless_mse weight, int4 group 128", "memoryless_mse", "weight", INT4_GROUP, a_weight(size.weight), faster(6, 15))


@row("memoryless_mse activation", "Search for the one range of a square activation, int8 and fp8, fp32 and bf16.")
def _(size: Size) -> list[Result]:
    def one(format: str, args: dict[str, Any], dtype: torch.dtype, target: Any) -> list[Result]:
        name = f"memoryless_mse activation, {format}, {str(dtype).removeprefix('torch.')}"
        return searches(size, name, "memoryless_mse", "input", args, an_activation(size.weight, dtype), target)
    return [r for dtype in (torch.float32, torch.bfloat16) for r in (
        *one("int8 per tensor", INT8_TENSOR, dtype, faster(40)), *one("fp8 per tensor", FP8_TENSOR, dtype, None))]


@row("nvfp4_expanded_mse weight", "Search, from 1.8 times the range down, for each group of 16 of a square weight, fp4.")
def _(size: Size) -> list[Result]:
    return searches(size, "nvfp4_expanded_mse weight", "nvfp4_expanded_mse", "weight", NVFP4, a_weight(size.small_weight), faster(8, 20))


@row("imatrix_mse weight", "Search for each group of 128 of a square weight, int4, errors weighted by what the columns are fed.")
def _(size: Size) -> list[Result]:
    weight, fed = a_weight(size.small_weight), an_activation(size.small_weight, torch.float32)

    def heard(side: str) -> Module:
        layer, observer = Linear(*weight.shape, bias=False), sides.an_observer(side, "imatrix_mse", "weight", INT4_GROUP)
        layer.weight_observer = observer
        observer.attach(layer)
        with torch.no_grad(): layer(fed)
        return observer
    times = alternate({side: Work(lambda o: o(weight), lambda side=side: heard(side)) for side in sides.OBSERVERS} | {"limit": one_read([weight])},
                      size.rounds)
    with threads(1):
        theirs, mine = (sides.found_by(heard(side)(weight)) for side in sides.OBSERVERS)
        error = sides.error_of("imatrix_mse", "weight", QuantizationArgs(**INT4_GROUP), weight, importance=fed.pow(2).mean((0, 1)))
        return [timing("imatrix_mse weight, int4 group 128", times, faster(6), agreement(theirs, mine, error))]


# --- six observers at once ---

SIX = ("static_minmax", "minmax", "mse", ("mse", dict(grid=50.0)), ("mse", dict(norm=2.0)), ("mse", dict(maxshrink=0.5)))


def recipe_for(asked: Any) -> dict[str, Any]:
    "W8A8 with one observer, by name or with arguments, on weights (per channel) and inputs (per tensor)."
    name, kwargs = (asked, {}) if isinstance(asked, str) else asked
    args = INT8 | dict(observer=name, observer_kwargs=kwargs)
    return linears(args | dict(strategy="channel"), args | dict(strategy="tensor")) | dict(ignore=["lm_head"])


@functools.cache
def tokenizer() -> Any: return load_tiny_llama()[1]  # oneshot wants one, though the data is token ids


def oneshot(model: Module, data: list, pipeline: str = "basic", **recipe: Any) -> dict[str, Tensor]:
    "The scales that the reference's `oneshot` leaves on the model."
    with quietly(): return harness.reference(model, data, tokenizer(), pipeline, **recipe)


def six_runs(models: list[Module], data: list) -> dict[tuple[str, str, str], Found]:
    "The reference: one calibration for each observer, each of a model of its own. By module, base name and observer."
    found = {}
    for asked, model in zip(SIX, models):
        scales = oneshot(model, data, **recipe_for(asked))
        for key in (k for k in scales if k.endswith("_scale")):
            name, base_name = key.removesuffix("_scale").rsplit(".", 1)
            found[name, base_name, label_of(asked)] = Found(scales[key], scales[key.replace("_scale", "_zero_point")])
    return found


def one_run(model: Module, data: list) -> Any:
    "Ours: one record with all six."
    recipe = linears(INT8 | dict(strategy="channel"), INT8_TENSOR) | dict(ignore=["lm_head"])
    with quietly(): return record(model, data, scheme=QuantizationModifier(**recipe), observers=SIX, progress=False)


def six_agree(model: Module, batch: dict[str, Tensor]) -> Agreement:
    "Every scale of the six runs beside what the one record concludes."
    theirs, mine = six_runs([deepcopy(model) for _ in SIX], [batch]), one_run(model, [batch]).results
    asked, inputs, total = {label_of(a): a for a in SIX}, inputs_of(model, batch), Agreement()
    for key, found in theirs.items():
        (name, base_name, label), conclusion = key, mine[key]
        value = inputs[name] if base_name == "input" else model.get_submodule(name).weight.detach()
        observer, kwargs = (asked[label], {}) if isinstance(asked[label], str) else asked[label]
        error = sides.error_of(observer, base_name, conclusion.args, value, kwargs.get("norm"))
        total += agreement(found, Found(conclusion.scale, conclusion.zero_point), error)
    return total


@row("six observers", "Six observers on every input and weight: the reference calibrates six times, ours records once.")
def _(size: Size) -> list[Result]:
    model, batch = llama(size), batch_of(size.batch)
    weights = [m.weight.detach() for n, m in model.named_modules() if isinstance(m, Linear) and n != "lm_head"]
    times = alternate({
        "reference": Work(lambda models: six_runs(models, [batch]), lambda: [deepcopy(model) for _ in SIX]),
        "ours": Work(lambda _: one_run(model, [batch])),
        "limit": one_read(distinct([*inputs_of(model, batch).values(), *weights])),
    }, size.rounds)
    part = {name: value[:max(1, len(value) // 4)] for name, value in batch.items()}  # enough to compare scales on
    with threads(1): return [timing("six observers on every tensor", times, faster(20), six_agree(model, part))]


# --- records ---


def recording(model: Module, batch: dict[str, Tensor], base_names: tuple[str, ...]) -> Work:
    "A pass whose tensors are recorded, as `record` does for each batch; the same record goes on."
    recipe, numbers = recipe_to_record(), itertools.count()
    collector = new_collector(model, recipe, base_names, False, observers=("static_minmax",))
    held = [new_record(model, collector)]

    def run(_: None) -> None:
        with exclusive(model, "a benchmark"): held[0] = one_pass(model, iter([(next(numbers), batch)]), collector, held[0])
    return Work(run)


def shown_to(observer: Module, place: int) -> Callable[..., None]:
    "A hook that shows an observer what a module is fed (place 0) or returns (place 1)."
    def hook(_: Module, *args: Any) -> None: observer(args[1] if place else args[0][0])
    return hook


def torch_histograms(model: Module, output: bool = False) -> Module:
    "A copy with torch's HistogramObserver on the input (and output) of every Linear but lm_head."
    model = deepcopy(model)
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or name == "lm_head": continue
        module.register_forward_pre_hook(shown_to(HistogramObserver(), 0))
        if output: module.register_forward_hook(shown_to(HistogramObserver(), 1))
    return model


@contextmanager
def outputs_of(model: Module) -> Iterator[list[Tensor]]:
    "The outputs of the Linears but lm_head, from passes inside the block."
    seen: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _, args, out: seen.append(out.detach())) for n, m in model.named_modules()
               if isinstance(m, Linear) and n != "lm_head"]
    yield seen
    for handle in handles: handle.remove()


@row("record", "What a forward pass takes longer when all inputs (and then all outputs) are recorded: ranges, channels, histogram, sums.")
def _(size: Size) -> list[Result]:
    model, batch, results = llama(size), batch_of(size.batch), []
    note = "reference: torch's HistogramObserver"
    for name, output, target in (("record, inputs", False, at_most(12, "%")), ("record, inputs and outputs", True, at_most(50, "%"))):
        with outputs_of(model) as outputs: tensors = distinct(inputs_of(model, batch).values())
        works = {"bare": a_pass(model, batch), "reference": a_pass(torch_histograms(model, output), batch),
                 "ours": recording(deepcopy(model), batch, ("input", "output") if output else ("input",)),
                 "limit": one_read(tensors + outputs * output)}
        results.append(overhead(name, alternate(works, size.rounds, SMALL), target, note=note))
    return results


# --- the workbench ---


def at_data(model: Module, data: list, tab: str = "") -> Any:
    "A session that will observe, in calibration; with a tab the workbench's own, which draws while batches run."
    made = Workbench(model, data, scheme="INT8_STATIC") if tab else Session(model, data, scheme="INT8_STATIC")
    if tab: made.turn_to(tab)
    made.initialize()
    made.start()
    return made


@row("live plots", "What feeding all batches of a session takes longer while a panel of the workbench follows it, without a browser.")
def _(size: Size) -> list[Result]:
    model, data = llama(size), [batch_of(size.batch, seed) for seed in range(4 * size.layers)]
    feeding = {tab: Work(lambda made: made.feed_all(), lambda tab=tab: at_data(deepcopy(model), data, tab)) for tab in ("", "Ranges", "Histogram")}
    times = alternate(feeding, size.rounds, SMALL)
    return [overhead(f"live plots, {tab}", dict(bare=times[""], ours=times[tab]), at_most(5, "%")) for tab in ("Ranges", "Histogram")]


# --- import ---


def importing(*statements: str) -> tuple[list[float], set[str]]:
    """A fresh interpreter imports torch and compressed-tensors, then runs statements: the seconds from there to the end of each,
    and which packages for the screen are loaded then."""
    clock = "; ".join(f"{s}; print(time.perf_counter() - t)" for s in statements)
    code = (f"import sys, time; import torch, compressed_tensors.quantization; t = time.perf_counter(); {clock}; "
            "print(*{'matplotlib', 'ipywidgets'} & set(sys.modules))")
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(THREADS))
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=True)
    *times, loaded = done.stdout.split("\n")[-len(statements) - 2:-1]
    return [float(t) for t in times], set(loaded.split())


@row("import", "What importing takes on top of `import torch, compressed_tensors.quantization`, in a fresh interpreter.")
def _(size: Size) -> list[Result]:
    package, names, theirs, loaded = [], [], [], set[str]()
    for _ in range(size.rounds or 5):
        theirs += importing("from llmcompressor import oneshot")[0]
        (a, b), screen = importing("import qcal_nb", "from qcal_nb import calibrate, record")
        package, names, loaded = [*package, a], [*names, b], loaded | screen
    light, note = at_most(0.3, "s"), f"reference: from llmcompressor import oneshot; for the screen ours loads {', '.join(loaded) or 'nothing'}"
    target = (f"{light[0]}, no matplotlib, no ipywidgets", lambda r: light[1](r) and not loaded)
    return [timing("import qcal_nb", dict(ours=package), target, note="its names are imported when they are first used"),
            timing("from qcal_nb import calibrate, record", dict(ours=names, reference=theirs), note=note)]


# --- memory ---


def peak(name: str, ours: Work, reference: Work, target: Any = None, note: str = "") -> Result:
    "MiB of temporaries: the highest point less what is kept afterwards."
    (top, kept), (their_top, their_kept) = memory(ours), memory(reference)
    found = Result(name, "MiB", Spread.of([top - kept]), Spread.of([their_top - their_kept]),
                   note=f"kept: ours {round(kept, 2) + 0:.2f}, reference {round(their_kept, 2) + 0:.2f} MiB" + note)
    return judged(found, target)


@row("temporaries", "Temporaries while one large fp32 tensor is observed: the highest point of live bytes less what is kept.")
def _(size: Size) -> list[Result]:
    side, limit = 2**int(np.log2(size.mib * 2**18) / 2), at_most(8, "MiB")
    value, weight = an_activation(side, torch.float32)[0], a_weight(side)
    cases = [("static_minmax", "input", INT8_TENSOR, value), ("mse", "input", INT8_TENSOR, value), ("memoryless_mse", "weight", INT4_GROUP, weight)]
    results = [peak(f"temporaries: {name}, {base_name}, {value.nbytes / 2**20:g} MiB", sides.look_at("ours", name, base_name, args, tensor),
                    sides.look_at("reference", name, base_name, args, tensor), limit) for name, base_name, args, tensor in cases]
    model, batch = Sequential(Linear(side, 1, bias=False)), dict(input=value)
    seen, theirs = recording(model, batch, ("input",)), HistogramObserver()
    seen.run(None)  # what is kept is there before: looked at are temporaries of a later batch
    theirs(value)
    note = "; the record exists already; reference: torch's HistogramObserver"
    return [*results, peak(f"temporaries: record, input, {value.nbytes / 2**20:g} MiB", seen, Work(lambda _: theirs(value)), limit, note)]


# --- whole calibrations ---

STATIC = linears(INT8 | dict(strategy="channel"), INT8_TENSOR | dict(observer="static_minmax")) | dict(ignore=["lm_head"])


def calibrated(model: Module, data: list, pipeline: str = "basic") -> Module:
    "Ours: INT8, weights per channel, inputs `static_minmax`."
    with quietly(): return calibrate(model, data, QuantizationModifier(**deepcopy(STATIC)), pipeline=pipeline, progress=False)


def fed(model: Module, data: list) -> Work:
    "A bare pass of all batches."
    def run(_: None) -> None:
        with sides.calibration_context(model):
            for i, batch in enumerate(data): feed(model, batch, i)
    return Work(run)


@row("calibrate", "A whole calibration, INT8 with `static_minmax` inputs, by `calibrate` and by `oneshot`: whole passes, and block by block.")
def _(size: Size) -> list[Result]:
    model, (rows, tokens) = llama(size), size.batch
    data = [batch_of((max(1, rows // 4), tokens), seed) for seed in range(4)]
    results = []
    for pipeline in ("basic", "sequential"):
        works = {"reference": Work(lambda m, p=pipeline: oneshot(m, data, p, **STATIC), lambda: deepcopy(model)),
                 "ours": Work(lambda m, p=pipeline: calibrated(m, data, p), lambda: deepcopy(model))}
        times = alternate(works | {"bare": fed(model, data)}, size.rounds)
        with threads(1):
            theirs, mine = oneshot(deepcopy(model), data, pipeline, **STATIC), harness.qparams(calibrated(deepcopy(model), data, pipeline))
        def found(scales: dict[str, Tensor], name: str) -> Found: return Found(scales[name], scales.get(name.replace("_scale", "_zero_point")))
        same = sum((agreement(found(theirs, k), found(mine, k)) for k in theirs if k.endswith("_scale")), Agreement())
        results.append(timing(f"calibrate, {pipeline}", times, None, same, f"the bare passes take {statistics.median(times['bare']):.3g} s"))
    return results


@row("reset", "`reset_quantization` after a calibration, and how it grows with the model.")
def _(size: Size) -> list[Result]:
    model, batch = llama(size), batch_of((1, size.batch[1]))
    def resetting(m: Module, data: list) -> Work: return Work(reset_quantization, lambda: calibrated(deepcopy(m), data))
    times = alternate({"ours": resetting(model, [batch])}, size.rounds)
    return [timing("reset_quantization", times), growth("reset, layers", "layers", size.depths, lambda n: resetting(deep(n), [SHORT]), size)]


# --- growth ---

LINEAR = ("≤ 1.1, last step ≤ 1.25", lambda r: r.ours.median <= 1.1 and r.points["last"] <= 1.25)
SHORT = batch_of((1, 64))


def deep(layers: int) -> Module: return llama(sides.QUICK, num_hidden_layers=layers)


def growth(name: str, axis: str, xs: tuple[int, ...], work_of: Callable[[int], Work], size: Size) -> Result:
    "Times for several sizes in turn, and the exponent of the straight line through them on logarithmic scales: 1 is linear."
    times = alternate({str(x): work_of(x) for x in xs}, size.rounds or FEW)
    medians = [statistics.median(times[str(x)]) for x in xs]
    exponent, _ = np.polyfit(np.log(xs), np.log(medians), 1)
    last = float(np.log(medians[-1] / medians[-2]) / np.log(xs[-1] / xs[-2]))
    found = Result(f"growth: {name}", "exponent", Spread.of([float(exponent)]), rounds=len(times[str(xs[0])]), note=f"last step {last:.2f}",
                   points=dict(axis=axis, x=list(xs), seconds=medians, exponent=float(exponent), last=last))
    return judged(found, LINEAR)


def recorded(model: Module, data: list, observers: Any = ("static_minmax",)) -> Work:
    def run(_: None) -> None:
        with quietly(): record(model, data, observers=observers, progress=False)
    return Work(run)


@row("growth", "Time of whole calibrations and records against tokens, modules and observers: exponents of straight lines, 1 is linear.")
def _(size: Size) -> list[Result]:
    small = llama(size, hidden_size=min(256, size.hidden), intermediate_size=512, num_hidden_layers=2)
    data = [batch_of((2, min(128, size.batch[1])), seed) for seed in range(max(size.batches))]
    per_batch = data[0]["input_ids"].numel()
    tokens = tuple(n * per_batch for n in size.batches)
    def calibration(model: Module, data: list, pipeline: str = "basic") -> Work:
        return Work(lambda m: calibrated(m, data, pipeline), lambda: deepcopy(model))
    def cut(n: int) -> list: return data[:n // per_batch]
    grids = tuple(("mse", dict(grid=100.0 + i)) for i in range(max(size.observers)))
    return [
        growth("calibrate, tokens", "tokens", tokens, lambda n: calibration(small, cut(n)), size),
        growth("calibrate, layers", "layers", size.depths, lambda n: calibration(deep(n), [SHORT]), size),
        growth("calibrate sequential, tokens", "tokens", tokens, lambda n: calibration(small, cut(n), "sequential"), size),
        growth("calibrate sequential, layers", "layers", size.depths, lambda n: calibration(deep(n), [SHORT], "sequential"), size),
        growth("record, tokens", "tokens", tokens, lambda n: recorded(small, cut(n)), size),
        growth("record, layers", "layers", size.depths, lambda n: recorded(deep(n), [SHORT]), size),
        growth("record, observers", "observers", size.observers, lambda n: recorded(small, data[:2], grids[:n]), size),
    ]
