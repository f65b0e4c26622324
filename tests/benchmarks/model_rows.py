"""Rows on a real model, SmolLM2-135M with its 210 Linears, and on a Llama of many layers. This module imports all
others, so `ROWS` is complete here."""
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module

from qcal_nb.analysis import compare_observers, findings
from qcal_nb.evaluate import observers_to_compare
from qcal_nb.lifecycle import State, match_report, reset_quantization
from qcal_nb.models import calibration_texts
from qcal_nb.records import record
from qcal_nb.session import Session

from . import sides
from .measuring import FEW, LEAST, MOST, Agreement, Spread, Work, alternate, cpu_seconds, one_read, seconds, threads
from .peak import MODELS
from .registry import ROWS as ROWS
from .registry import SMALL, row
from .results import Result, at_most, judged, multiple, overhead, timing
from .rows import (
    ROOT, SHORT, STATIC, THREADS, a_modifier, calibrated, deep, growth, recording, torch_histograms
)
from .sides import INT8_TENSOR, Size, a_pass, batch_of, distinct, hooks_agree, inputs_of, quietly, watched

# --- what observing adds to a pass ---

HOOKS = ("static_minmax", "mse")
TARGETS = {"record": (30, 10, None), "static_minmax hooks": (8, 4, None), "mse hooks": (40, 15, None)}  # %, by length
COMPARED = 128      # tokens on which scales are compared: for 2,048 the reference's search takes half a minute


@functools.lru_cache(maxsize=1)
def real(name: str, dtype: torch.dtype = torch.float32) -> Module: return MODELS[name](dtype=dtype)[0]


def watched_by(model: Module, sides: Iterable[str]) -> dict[str, Module]:
    "Copies of the model with the hooks of each side, by the name of their work."
    return {
        f"{observer} hooks, {side}": watched(model, side, INT8_TENSOR | dict(observer=observer))
        for observer in HOOKS for side in sides
    }


def passes(model: Module, copies: dict[str, Module], batch: dict[str, Tensor], attention: str) -> dict[str, Work]:
    "A bare pass, one that is recorded, and one of each copy."
    return {
        "bare": a_pass(model, batch, attention),
        "record, ours": recording(model, [batch], attention=attention),
    } | {name: a_pass(copy, batch, attention) for name, copy in copies.items()}


def overheads(
    what: str, times: dict[str, list[float]], targets: dict[str, float | None], same: dict[str, Agreement]
) -> list[Result]:
    "A line for `record` and for the hooks of each observer."
    lines = []
    for name, most in targets.items():
        mine = {side: times[f"{name}, {side}"] for side in ("ours", "reference") if f"{name}, {side}" in times}
        mine |= {key: times[key] for key in ("bare", "limit") if key in times}
        some = "reference" in mine and len(mine["reference"]) < len(mine["ours"])
        note = f"the reference in the first {len(mine['reference'])} of the rounds" if some else ""
        lines.append(overhead(f"{what}: {name}", mine, most and at_most(most, "%"), same.get(name), note))
    return lines


def cut(batch: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    return {name: value[:, :tokens] for name, value in batch.items()}


def beside(
    what: str, model: Module, copies: dict[str, Module], batch: dict[str, Tensor], size: Size,
    targets: dict[str, float | None], attention: str = "eager", rounds: int | None = None
) -> list[Result]:
    "All passes of a batch in turn, and the scales of both sides on its first tokens."
    works = passes(model, copies, batch, attention)
    works["limit"] = one_read(distinct(inputs_of(model, batch, attention).values()))
    slow = [name for name in works if name.endswith("reference")]
    for name in slow: a_pass(copies[name], cut(batch, 4), attention).run(None)  # its first pass, off the clock
    times = alternate(works, size.rounds or rounds, SMALL, seldom=slow)
    part = cut(batch, COMPARED)
    with threads(1):
        same = {f"{observer} hooks": hooks_agree(model, part, INT8_TENSOR | dict(observer=observer), attention)
                for observer in HOOKS}
    return overheads(what, times, targets, same)


def all_copies(model: Module) -> dict[str, Module]:
    "Those of both sides; the reference of a record is torch's HistogramObserver."
    return {"record, reference": torch_histograms(model)} | watched_by(model, sides.MODIFIERS)


def no_targets() -> dict[str, float | None]: return dict.fromkeys(TARGETS)


def at_length(place: int) -> dict[str, float | None]: return {name: most[place] for name, most in TARGETS.items()}


def on_smollm2(size: Size, dtype: torch.dtype, targets: Callable[[int], dict[str, float | None]]) -> list[Result]:
    "The three overheads at each length."
    model, lines = real(size.model, dtype), []
    copies, name = all_copies(model), dict(float32="fp32", bfloat16="bf16")[str(dtype).removeprefix("torch.")]
    for place, tokens in enumerate(size.lengths):
        long = tokens > 1000
        if long: del copies["mse hooks, reference"]  # a minute for a pass
        what, batch = f"{size.model}, {name}, {tokens:,} tokens", batch_of((1, tokens))
        lines += beside(what, model, copies, batch, size, targets(place), rounds=FEW if long else None)
    return lines


@row(
    "SmolLM2 fp32",
    "What an eager pass of a real model with 210 Linears takes longer with `record`, `static_minmax` hooks and `mse` "
    "hooks, for short and long batches of one sequence.",
    real=True,
)
def _(size: Size) -> list[Result]: return on_smollm2(size, torch.float32, at_length)


@row("SmolLM2 bf16", "The same in bf16, where the pass itself is quicker.", real=True)
def _(size: Size) -> list[Result]: return on_smollm2(size, torch.bfloat16, lambda place: no_targets())


@row("SmolLM2 own attention", "The same in fp32 with the model's own attention (sdpa) instead of eager.", real=True)
def _(size: Size) -> list[Result]:
    model, tokens = real(size.model), size.lengths[1]
    what = f"{size.model}, own attention, {tokens:,} tokens"
    return beside(what, model, all_copies(model), batch_of((1, tokens)), size, at_length(1), "model")


@row(
    "SmolLM2 CPU",
    "The same in seconds of the processor instead of the clock, at one thread, where other programs disturb less; ours "
    "alone.",
    real=True,
)
def _(size: Size) -> list[Result]:
    model, lines = real(size.model), []
    copies = watched_by(model, ["ours"])
    for place, attention in ((0, "eager"), (1, "eager"), (1, "model")):
        tokens = size.lengths[place]
        with threads(1):
            works = passes(model, copies, batch_of((1, tokens)), attention)
            times = alternate(works, size.rounds, clock=cpu_seconds)
        what = f"{size.model}, CPU, {'own attention, ' * (attention == 'model')}{tokens:,} tokens"
        lines += overheads(what, times, at_length(place), {})
    return lines


@row(
    "128 layers",
    "The same on a Llama of 128 tiny layers with 896 Linears, which hardly has any arithmetic: what each module costs.",
)
def _(size: Size) -> list[Result]:
    model = deep(size.many)
    return beside(f"{size.many} layers, 64 tokens", model, all_copies(model), SHORT, size, no_targets())


# --- a session ---

FED = 4     # batches in a feed


def feeding(model: Module, data: list[dict[str, Tensor]]) -> Work:
    "A session in calibration is fed all of `data`, and at the next call again."
    with quietly():
        session = Session(model, data * (MOST + 2), scheme="INT8_STATIC")
        session.initialize()
        session.start()
    return Work(lambda _: session.feed(len(data)))


@row(
    "SmolLM2 session",
    "What a session's feed with the six observers that it compares takes, over `record` with one observer, and over "
    "`record` with the same six.",
    real=True,
)
def _(size: Size) -> list[Result]:
    model, lines = real(size.model), []
    data = [batch_of((1, size.lengths[0]), seed) for seed in range(FED)]
    recipe = a_modifier(dict(scheme="INT8_STATIC", ignore=["lm_head"]))
    both = ("input", "weight")
    for name, clock, n in (("", seconds, THREADS), (", CPU", cpu_seconds, 1)):
        with threads(n):
            times = alternate({
                "one": recording(model, data, both, recipe),
                "six": recording(model, data, both, recipe, observers_to_compare(recipe)),
                "session": feeding(deepcopy(model), data),
            }, size.rounds, clock=clock)
        lines += [
            multiple(f"{size.model}, feed over record{name}", times["session"], times["one"]),
            multiple(
                f"{size.model}, feed over record with six{name}", times["session"], times["six"], at_most(1.3, "×")
            ),
        ]
    return lines


# --- questions to a record ---


@row(
    "SmolLM2 analysis",
    "Seconds of the processor for `findings` and `compare_observers` of a record with 420 tensors that was never asked "
    "before.",
    real=True,
)
def _(size: Size) -> list[Result]:
    model, tokenizer = MODELS[size.model]()
    texts, length = calibration_texts()[:FED], size.lengths[1]
    with quietly():
        made = record(model, texts, scheme="INT8_STATIC", tokenizer=tokenizer, max_length=length, progress=False)
    # what is known of a record is remembered with the object, and a copy is another one
    def asking(question: Callable) -> Work: return Work(lambda r: question(r, progress=False), lambda: deepcopy(made))
    asked = {"findings": (asking(findings), 3), "compare_observers": (asking(compare_observers), 2)}
    with threads(1):
        times = alternate({name: work for name, (work, _) in asked.items()}, size.rounds or LEAST, clock=cpu_seconds)
    note = "seconds of the processor"
    return [timing(f"{size.model}, {name}, CPU", dict(ours=times[name]), at_most(most, "s"), note=note)
            for name, (_, most) in asked.items()]


# --- memory of a long batch ---


def peak_of(what: str, size: Size) -> float:
    "MiB that one pass adds, in a process of its own."
    env = os.environ | dict(
        PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(__file__).parents[1])]), OMP_NUM_THREADS=str(THREADS)
    )
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peak", size.model, what, str(size.long)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    return after - before


@row(
    "SmolLM2 memory",
    "How much higher the highest point of memory is when a pass of 4,096 tokens with the model's own attention is "
    "recorded, each pass in a process of its own.",
    real=True,
)
def _(size: Size) -> list[Result]:
    pairs = [(peak_of("bare", size), peak_of("record", size)) for _ in range(size.rounds or 2)]
    bare = Spread.of(bare for bare, _ in pairs)
    found = Result(
        f"{size.model}, memory of record, {size.long:,} tokens", "MiB", Spread.of(seen - bare for bare, seen in pairs),
        rounds=len(pairs), note=f"above the bare pass, which takes {bare.median:.0f} MiB"
    )
    return [judged(found, at_most(100, "MiB"))]


# --- growth of each step ---


def by_name(model: Module) -> dict[str, Any]:
    "The recipe of whole calibrations with a target for each module, as the best observers of a session leave it."
    names = [name for name, m in model.named_modules() if isinstance(m, Linear) and name != "lm_head"]
    groups = {group: scheme.model_copy(update=dict(targets=names)) for group, scheme in STATIC["config_groups"].items()}
    return STATIC | dict(config_groups=groups)


class Steps:
    "A model, and the steps of a calibration one by one."

    def __init__(self, model: Module, recipe: dict[str, Any]) -> None:
        self.model = deepcopy(model)
        self.modifier, self.state = a_modifier(recipe), State(self.model)

    def initialize(self) -> None: self.modifier.on_initialize(self.state)
    def start(self) -> None: self.modifier.on_start(self.state)
    def feed(self) -> None: a_pass(self.model, SHORT).run(None)
    def end(self) -> None: self.modifier.on_end(self.state)
    def reset(self) -> None: reset_quantization(self.model)
    def match_report(self) -> None: match_report(self.model, self.modifier)


ORDER = ("initialize", "start", "feed", "end", "reset")
EACH = 5    # rounds of a step, which is short


def stepping(model: Module, step: str, recipe: dict[str, Any] = STATIC) -> Work:
    "One step, of a model that has been through all steps before it."
    def prepared() -> Steps:
        made = Steps(model, recipe)
        for earlier in ORDER[:ORDER.index(step)] if step in ORDER else (): getattr(made, earlier)()
        return made
    return Work(lambda made: getattr(made, step)(), prepared)


def in_blocks(model: Module, propagate: str) -> Work:
    "A calibration block by block."
    return Work(lambda m: calibrated(m, [SHORT], "sequential", propagate=propagate), lambda: deepcopy(model))


@row(
    "growth of steps",
    "How the time of each step of a calibration grows from 32 to 96 tiny layers: exponents of straight lines, 1 is "
    "linear.",
)
def _(size: Size) -> list[Result]:
    models = {n: deep(n) for n in size.deep}
    target = at_most(1.1, "")

    def grown(name: str, work_of: Callable[[Module], Work], rounds: int = FEW) -> Result:
        return growth(name, "many layers", size.deep, lambda n: work_of(models[n]), size, target, rounds)
    return [
        *(grown(f"{step}, many layers", lambda m, step=step: stepping(m, step), EACH) for step in ORDER),
        *(grown(f"{step} by name, many layers", lambda m, step=step: stepping(m, step, by_name(m)), EACH)
          for step in ("initialize", "match_report")),
        *(grown(f"sequential {propagate}, many layers", lambda m, p=propagate: in_blocks(m, p))
          for propagate in ("float", "quantized")),
    ]
