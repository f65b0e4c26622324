"""The rows of the benchmark. Each is a function of a `Size` that returns lines of the table, registered with a sentence
on what it measures. Those about observers alone are in observer_rows.py and come first; those on a real model and on
deep ones are in model_rows.py and come last."""
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver
from torch.nn import Linear, Module, Sequential

import harness
from qcal_nb.calibration import exclusive
from qcal_nb.lifecycle import reset_quantization
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import as_batch, calibrate, feed
from qcal_nb.records import new_collector, new_record, one_pass, recipe_to_record, record
from qcal_nb.session import Session
from qcal_nb.widgets import Workbench

from . import sides
from .measuring import FEW, Agreement, Found, Spread, Work, agreement, alternate, memory, one_read, threads
from .observer_rows import a_weight, an_activation, oneshot
from .registry import SMALL, row
from .results import Result, at_most, judged, overhead, timing
from .sides import INT4_GROUP, INT8, INT8_TENSOR, Size, a_pass, batch_of, distinct, inputs_of, linears, llama, quietly

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2


# --- records ---


def recording(
    model: Module, data: list[dict[str, Tensor]], base_names: tuple[str, ...] = ("input",), scheme: Any = None,
    observers: Any = ("static_minmax",), attention: str = "eager"
) -> Work:
    "A pass whose tensors are recorded, as `record` does for all batches; the same record goes on."
    recipe, numbers = recipe_to_record(scheme), itertools.count()
    collector = new_collector(model, recipe, base_names, scheme is not None, observers=observers, owner="a benchmark")
    held = [new_record(model, collector)]

    def run(_: None) -> None:
        stream = (as_batch(batch, next(numbers)) for batch in data)
        with exclusive(model, "a benchmark"):
            held[0] = one_pass(model, stream, collector, held[0], attention=attention)
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


@row(
    "record",
    "What a forward pass takes longer when all inputs (and then all outputs) are recorded: ranges, channels, "
    "histogram, sums.",
)
def _(size: Size) -> list[Result]:
    model, batch, results = llama(size), batch_of(size.batch), []
    note = "reference: torch's HistogramObserver"
    for name, output, target in (
        ("record, inputs", False, at_most(12, "%")), ("record, inputs and outputs", True, at_most(50, "%"))
    ):
        with outputs_of(model) as outputs: tensors = distinct(inputs_of(model, batch).values())
        works = {"bare": a_pass(model, batch), "reference": a_pass(torch_histograms(model, output), batch),
                 "ours": recording(deepcopy(model), [batch], ("input", "output") if output else ("input",)),
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


@row(
    "live plots",
    "What feeding all batches of a session takes longer while a panel of the workbench follows it, without a browser.",
)
def _(size: Size) -> list[Result]:
    model, data = llama(size), [batch_of(size.batch, seed) for seed in range(4 * size.layers)]
    feeding = {
        tab: Work(lambda made: made.feed_all(), lambda tab=tab: at_data(deepcopy(model), data, tab))
        for tab in ("", "Ranges", "Histogram")
    }
    times = alternate(feeding, size.rounds, SMALL)
    return [
        overhead(f"live plots, {tab}", dict(bare=times[""], ours=times[tab]), at_most(5, "%"))
        for tab in ("Ranges", "Histogram")
    ]


# --- import ---


def importing(*statements: str) -> tuple[list[float], set[str]]:
    """A fresh interpreter imports torch and compressed-tensors, then runs statements: the seconds from there to the end
    of each, and which packages for the screen are loaded then."""
    clock = "; ".join(f"{s}; print(time.perf_counter() - t)" for s in statements)
    code = (f"import sys, time; import torch, compressed_tensors.quantization; t = time.perf_counter(); {clock}; "
            "print(*{'matplotlib', 'ipywidgets'} & set(sys.modules))")
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(THREADS))
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=True
    )
    *times, loaded = done.stdout.split("\n")[-len(statements) - 2:-1]
    return [float(t) for t in times], set(loaded.split())


@row(
    "import", "What importing takes on top of `import torch, compressed_tensors.quantization`, in a fresh interpreter."
)
def _(size: Size) -> list[Result]:
    package, names, theirs, loaded = [], [], [], set[str]()
    for _ in range(size.rounds or 5):
        theirs += importing("from llmcompressor import oneshot")[0]
        (a, b), screen = importing("import qcal_nb", "from qcal_nb import calibrate, record")
        package, names, loaded = [*package, a], [*names, b], loaded | screen
    light = at_most(0.3, "s")
    note = f"reference: from llmcompressor import oneshot; for the screen ours loads {', '.join(loaded) or 'nothing'}"
    target = (f"{light[0]}, no matplotlib, no ipywidgets", lambda r: light[1](r) and not loaded)
    return [
        timing("import qcal_nb", dict(ours=package), target, note="its names are imported when they are first used"),
        timing("from qcal_nb import calibrate, record", dict(ours=names, reference=theirs), note=note),
    ]


# --- memory ---


def peak(name: str, ours: Work, reference: Work, target: Any = None, note: str = "") -> Result:
    "MiB of temporaries: the highest point less what is kept afterwards."
    (top, kept), (their_top, their_kept) = memory(ours), memory(reference)
    found = Result(name, "MiB", Spread.of([top - kept]), Spread.of([their_top - their_kept]),
                   note=f"kept: ours {round(kept, 2) + 0:.2f}, reference {round(their_kept, 2) + 0:.2f} MiB" + note)
    return judged(found, target)


@row(
    "temporaries",
    "Temporaries while one large fp32 tensor is observed: the highest point of live bytes less what is kept.",
)
def _(size: Size) -> list[Result]:
    side, limit = 2**int(np.log2(size.mib * 2**18) / 2), at_most(8, "MiB")
    value, weight = an_activation(side, torch.float32)[0], a_weight(side)
    cases = [
        ("static_minmax", "input", INT8_TENSOR, value), ("mse", "input", INT8_TENSOR, value),
        ("memoryless_mse", "weight", INT4_GROUP, weight)
    ]
    results = [
        peak(
            f"temporaries: {name}, {base_name}, {value.nbytes / 2**20:g} MiB",
            sides.look_at("ours", name, base_name, args, tensor),
            sides.look_at("reference", name, base_name, args, tensor), limit
        )
        for name, base_name, args, tensor in cases
    ]
    model, batch = Sequential(Linear(side, 1, bias=False)), dict(input=value)
    seen, theirs = recording(model, [batch]), HistogramObserver()
    seen.run(None)  # what is kept is there before: looked at are temporaries of a later batch
    theirs(value)
    note = "; the record exists already; reference: torch's HistogramObserver"
    return [
        *results,
        peak(
            f"temporaries: record, input, {value.nbytes / 2**20:g} MiB", seen, Work(lambda _: theirs(value)), limit,
            note
        ),
    ]


# --- whole calibrations ---

STATIC = linears(
    INT8 | dict(strategy="channel"), INT8_TENSOR | dict(observer="static_minmax")
) | dict(ignore=["lm_head"])


def a_modifier(recipe: dict[str, Any] = STATIC) -> QuantizationModifier: return QuantizationModifier(**deepcopy(recipe))


def calibrated(model: Module, data: list, pipeline: str = "basic", **options: Any) -> Module:
    "Ours: INT8, weights per channel, inputs `static_minmax`."
    with quietly(): return calibrate(model, data, a_modifier(), pipeline=pipeline, progress=False, **options)


def fed(model: Module, data: list) -> Work:
    "A bare pass of all batches."
    def run(_: None) -> None:
        with sides.calibration_context(model):
            for i, batch in enumerate(data): feed(model, as_batch(batch, i))
    return Work(run)


@row(
    "calibrate",
    "A whole calibration, INT8 with `static_minmax` inputs, by `calibrate` and by `oneshot`: whole passes, and block "
    "by block.",
)
def _(size: Size) -> list[Result]:
    model, (rows, tokens) = llama(size), size.batch
    data = [batch_of((max(1, rows // 4), tokens), seed) for seed in range(4)]
    results = []
    for pipeline in ("basic", "sequential"):
        works = {"reference": Work(lambda m, p=pipeline: oneshot(m, data, p, **STATIC), lambda: deepcopy(model)),
                 "ours": Work(lambda m, p=pipeline: calibrated(m, data, p), lambda: deepcopy(model))}
        times = alternate(works | {"bare": fed(model, data)}, size.rounds)
        with threads(1):
            theirs = oneshot(deepcopy(model), data, pipeline, **STATIC)
            mine = harness.qparams(calibrated(deepcopy(model), data, pipeline))
        def found(scales: dict[str, Tensor], name: str) -> Found:
            return Found(scales[name], scales.get(name.replace("_scale", "_zero_point")))
        same = sum((agreement(found(theirs, k), found(mine, k)) for k in theirs if k.endswith("_scale")), Agreement())
        results.append(timing(
            f"calibrate, {pipeline}", times, None, same,
            f"the bare passes take {statistics.median(times['bare']):.3g} s"
        ))
    return results


@row("reset", "`reset_quantization` after a calibration, and how it grows with the model.")
def _(size: Size) -> list[Result]:
    model, batch = llama(size), batch_of((1, size.batch[1]))
    def resetting(m: Module, data: list) -> Work: return Work(reset_quantization, lambda: calibrated(deepcopy(m), data))
    times = alternate({"ours": resetting(model, [batch])}, size.rounds)
    return [
        timing("reset_quantization", times),
        growth("reset, layers", "layers", size.depths, lambda n: resetting(deep(n), [SHORT]), size),
    ]


# --- growth ---

LINEAR = ("≤ 1.1, last step ≤ 1.25", lambda r: r.ours.median <= 1.1 and r.points["last"] <= 1.25)
SHORT = batch_of((1, 64))


def deep(layers: int) -> Module: return llama(sides.QUICK, num_hidden_layers=layers)


def growth(
    name: str, axis: str, xs: tuple[int, ...], work_of: Callable[[int], Work], size: Size, target: Any = LINEAR,
    rounds: int = FEW
) -> Result:
    """Times for several sizes in turn, and the exponent of the straight line through them on logarithmic scales: 1 is
    linear."""
    times = alternate({str(x): work_of(x) for x in xs}, size.rounds or rounds)
    medians = [statistics.median(times[str(x)]) for x in xs]
    exponent, _ = np.polyfit(np.log(xs), np.log(medians), 1)
    last = float(np.log(medians[-1] / medians[-2]) / np.log(xs[-1] / xs[-2]))
    found = Result(
        f"growth: {name}",
        "exponent",
        Spread.of([float(exponent)]),
        rounds=len(times[str(xs[0])]),
        note=f"last step {last:.2f}",
        points=dict(axis=axis, x=list(xs), seconds=medians, exponent=float(exponent), last=last),
    )
    return judged(found, target)


def recorded(model: Module, data: list, observers: Any = ("static_minmax",)) -> Work:
    def run(_: None) -> None:
        with quietly(): record(model, data, observers=observers, progress=False)
    return Work(run)


@row(
    "growth",
    "Time of whole calibrations and records against tokens, modules and observers: exponents of straight lines, 1 is "
    "linear.",
)
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
        growth(
            "calibrate sequential, tokens", "tokens", tokens, lambda n: calibration(small, cut(n), "sequential"), size
        ),
        growth(
            "calibrate sequential, layers", "layers", size.depths,
            lambda n: calibration(deep(n), [SHORT], "sequential"), size
        ),
        growth("record, tokens", "tokens", tokens, lambda n: recorded(small, cut(n)), size),
        growth("record, layers", "layers", size.depths, lambda n: recorded(deep(n), [SHORT]), size),
        growth("record, observers", "observers", size.observers, lambda n: recorded(small, data[:2], grids[:n]), size),
    ]
