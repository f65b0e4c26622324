"""The rows about observers alone: on a forward pass, searching one tensor, and six of them at once."""
import functools
from copy import deepcopy
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor
from torch.nn import Linear, Module

import harness
from qcal_nb.observers import label_of
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import load_tiny_llama
from qcal_nb.records import record

from . import sides
from .measuring import Agreement, Found, Work, agreement, alternate, one_read, threads
from .registry import SMALL, row
from .results import Result, at_most, faster, overhead, timing
from .sides import (
    FP8_TENSOR, INT4_GROUP, INT8, INT8_TENSOR, NVFP4, Size, a_pass, batch_of, distinct, inputs_of, linears, llama,
    quietly, watched
)

# --- observers on a forward pass ---


def hooks(size: Size, name: str, observer: str, dtype: torch.dtype, target: Any) -> list[Result]:
    "A pass with one side's input observers on every Linear, beside a bare pass."
    model, batch, args = llama(size, dtype), batch_of(size.batch), INT8_TENSOR | dict(observer=observer)
    works = {"bare": a_pass(model, batch)} | {
        side: a_pass(watched(model, side, args), batch) for side in sides.MODIFIERS
    }
    works["limit"] = one_read(distinct(inputs_of(model, batch).values()))
    times = alternate(works, size.rounds, SMALL)
    within = {side: sides.in_hooks(watched(model, side, args), batch) for side in sides.MODIFIERS}
    with threads(1): agree = sides.hooks_agree(model, batch, args)
    note = f"by a clock around each hook: reference {within['reference']:+.1f} %, ours {within['ours']:+.1f} %"
    return [overhead(name, times, target, agree, note)]


@row(
    "static_minmax hooks",
    "What a forward pass takes longer with `static_minmax` on the inputs of all Linears, int8 per tensor.",
)
def _(size: Size) -> list[Result]:
    return hooks(size, "static_minmax hooks", "static_minmax", torch.float32, at_most(2, "%"))


@row("mse hooks", "The same with `mse`, which searches for the best range of every tensor.")
def _(size: Size) -> list[Result]: return hooks(size, "mse hooks", "mse", torch.float32, at_most(20, "%"))


@row("mse hooks, bf16", "The same in a bf16 model.")
def _(size: Size) -> list[Result]: return hooks(size, "mse hooks, bf16", "mse", torch.bfloat16, None)


# --- searches, a tensor each ---


def searches(
    size: Size, name: str, observer: str, base_name: str, args: dict[str, Any], value: Tensor, target: Any
) -> list[Result]:
    "One observer looks at one tensor."
    works = {side: sides.look_at(side, observer, base_name, args, value) for side in sides.OBSERVERS}
    times = alternate(works | {"limit": one_read([value])}, size.rounds)
    with threads(1), quietly():
        theirs, mine = (
            sides.found_by(sides.an_observer(side, observer, base_name, args)(value)) for side in sides.OBSERVERS
        )
        error = sides.error_of(observer, base_name, QuantizationArgs(**args), value)
        return [timing(name, times, target, agreement(theirs, mine, error))]


def a_weight(n: int) -> Tensor: return torch.randn(n, n, generator=torch.Generator().manual_seed(0)) / n**0.5


def an_activation(n: int, dtype: torch.dtype) -> Tensor:
    "Mostly a bell, with a few channels ten times as wide, as language models have them."
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, n, n, generator=generator) * torch.where(torch.arange(n) % 100 == 7, 10.0, 1.0)).to(dtype)


@row("memoryless_mse weight", "Search for the range of each group of 128 of a square weight, int4.")
def _(size: Size) -> list[Result]:
    return searches(
        size, "memoryless_mse weight, int4 group 128", "memoryless_mse", "weight", INT4_GROUP, a_weight(size.weight),
        faster(6, 15)
    )


@row("memoryless_mse activation", "Search for the one range of a square activation, int8 and fp8, fp32 and bf16.")
def _(size: Size) -> list[Result]:
    def one(format: str, args: dict[str, Any], dtype: torch.dtype, target: Any) -> list[Result]:
        name = f"memoryless_mse activation, {format}, {str(dtype).removeprefix('torch.')}"
        return searches(size, name, "memoryless_mse", "input", args, an_activation(size.weight, dtype), target)
    return [r for dtype in (torch.float32, torch.bfloat16) for r in (
        *one("int8 per tensor", INT8_TENSOR, dtype, faster(40)), *one("fp8 per tensor", FP8_TENSOR, dtype, None))]


@row(
    "nvfp4_expanded_mse weight", "Search, from 1.8 times the range down, for each group of 16 of a square weight, fp4."
)
def _(size: Size) -> list[Result]:
    return searches(
        size, "nvfp4_expanded_mse weight", "nvfp4_expanded_mse", "weight", NVFP4, a_weight(size.small_weight),
        faster(8, 20)
    )


@row(
    "imatrix_mse weight",
    "Search for each group of 128 of a square weight, int4, errors weighted by what the columns are fed.",
)
def _(size: Size) -> list[Result]:
    weight, fed = a_weight(size.small_weight), an_activation(size.small_weight, torch.float32)

    def heard(side: str) -> Module:
        layer = Linear(*weight.shape, bias=False)
        observer = sides.an_observer(side, "imatrix_mse", "weight", INT4_GROUP)
        layer.weight_observer = observer
        observer.attach(layer)
        with torch.no_grad(): layer(fed)
        return observer
    times = alternate(
        {side: Work(lambda o: o(weight), lambda side=side: heard(side)) for side in sides.OBSERVERS}
        | {"limit": one_read([weight])},
        size.rounds,
    )
    with threads(1):
        theirs, mine = (sides.found_by(heard(side)(weight)) for side in sides.OBSERVERS)
        error = sides.error_of(
            "imatrix_mse", "weight", QuantizationArgs(**INT4_GROUP), weight, importance=fed.pow(2).mean((0, 1))
        )
        return [timing("imatrix_mse weight, int4 group 128", times, faster(6), agreement(theirs, mine, error))]


# --- six observers at once ---

SIX = (
    "static_minmax", "minmax", "mse", ("mse", dict(grid=50.0)), ("mse", dict(norm=2.0)), ("mse", dict(maxshrink=0.5))
)


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
