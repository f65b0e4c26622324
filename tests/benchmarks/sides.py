"""The two sides of a comparison, llm-compressor and ourselves, on the same models, batches and tensors."""
import contextlib
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from harness import linears
from llmcompressor.modifiers.quantization import QuantizationModifier as Reference
from llmcompressor.observers import Observer as ReferenceObserver
from llmcompressor.observers.helpers import flatten_for_calibration
from torch import Tensor
from torch.nn import Linear, Module
from transformers import AutoModelForCausalLM, LlamaConfig

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.observers import Observer
from qcal_nb.observers import all_or_nothing
from qcal_nb.pipelines import as_batch, calibration_context, feed

from .measuring import Agreement, Found, Work, agreement, search_error

MODIFIERS = dict(reference=Reference, ours=QuantizationModifier)
OBSERVERS = dict(reference=ReferenceObserver, ours=Observer)
INT8 = dict(num_bits=8, type="int", symmetric=True)
INT8_TENSOR = INT8 | dict(strategy="tensor")
FP8_TENSOR = dict(num_bits=8, type="float", symmetric=True, strategy="tensor")
INT4_GROUP = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
NVFP4 = dict(
    num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
)


@dataclass(frozen=True)
class Size:
    "How large everything is, and how often it is measured (None: as often as there is time for)."

    hidden: int = 512
    intermediate: int = 1408
    layers: int = 4
    batch: tuple[int, int] = (8, 256)        # sequences, tokens in each
    weight: int = 2048                       # rows and columns
    small_weight: int = 1024
    mib: int = 64                            # of the tensor whose observation is looked at for memory
    rounds: int | None = None
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    depths: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    observers: tuple[int, ...] = (1, 2, 4, 8)
    model: str = "SmolLM2"                   # the real one, a name in peak.MODELS
    lengths: tuple[int, int, int] = (64, 512, 2048)     # tokens that it is fed
    long: int = 4096                         # tokens where memory is looked at, with the model's own attention
    many: int = 128                          # layers of the deep model
    deep: tuple[int, ...] = (32, 64, 96)     # layers at which each step is timed


FULL = Size()
QUICK = Size(hidden=128, intermediate=256, layers=1, batch=(1, 16), weight=256, small_weight=128, mib=1, rounds=2,
             batches=(1, 2), depths=(1, 2), observers=(1, 2), model="embedded Llama",
             lengths=(4, 6, 8), long=64, many=2, deep=(1, 2))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    "No progress bars and no warnings inside the block."
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try: yield
        finally: logging.disable(logging.NOTSET)


# --- models ---


def llama(size: Size, dtype: torch.dtype = torch.float32, **other: Any) -> Module:
    "A Llama with random weights, the same every time; seven Linears a layer and lm_head."
    shape = dict(hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers) | other
    heads = max(1, shape["hidden_size"] // 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, **shape
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.config.dtype = dtype
    return model


def batch_of(shape: tuple[int, int], seed: int = 1) -> dict[str, Tensor]:
    "Random token ids with their mask."
    ids = torch.randint(0, 1024, shape, generator=torch.Generator().manual_seed(seed))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def watched(model: Module, side: str, args: dict[str, Any]) -> Module:
    "A copy of the model with one side's observers and hooks on the inputs of its Linears."
    model = deepcopy(model)
    modifier = MODIFIERS[side](**deepcopy(linears(inputs=args)), ignore=["lm_head"])
    with quietly():
        modifier.initialize_quantization(model)
        modifier.start_calibration(model)
    return model


def a_pass(model: Module, batch: dict[str, Tensor], attention: str = "eager") -> Work:
    """A forward pass as in a calibration: eager attention or the model's own, no product of lm_head. With our
    observers, a failure would undo the whole batch."""
    def run(_: None) -> None:
        with calibration_context(model, attention), all_or_nothing(): feed(model, as_batch(batch))
    return Work(run)


def clock_hooks(model: Module) -> list[float]:
    "Put a clock around each hook before a module's forward; the list gets the seconds of every call."
    seconds: list[float] = []
    def clocked(hook: Callable) -> Callable:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            try: return hook(*args)
            finally: seconds.append(time.perf_counter() - began)
        return run
    for module in model.modules():
        for key, hook in module._forward_pre_hooks.items(): module._forward_pre_hooks[key] = clocked(hook)
    return seconds


def in_hooks(model: Module, batch: dict[str, Tensor], passes: int = 5) -> float:
    """Per cent of the rest of a pass that a watched model spends in its hooks; median. Less noisy than the difference
    of two passes, but blind to what hooks do to the processor's caches."""
    found, seconds, work = [], clock_hooks(model), a_pass(model, batch)
    work.run(None)
    for _ in range(passes):
        seconds.clear()
        began = time.perf_counter()
        work.run(None)
        found.append(100 * sum(seconds) / (time.perf_counter() - began - sum(seconds)))
    return statistics.median(found)


def inputs_of(model: Module, batch: dict[str, Tensor], attention: str = "eager") -> dict[str, Tensor]:
    "What each Linear but lm_head is fed, by name; several may be fed the same tensor."
    seen, handles = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or name == "lm_head": continue
        handles.append(
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
        )
    a_pass(model, batch, attention).run(None)
    for handle in handles: handle.remove()
    return seen


def distinct(tensors: Any) -> list[Tensor]:
    "Each tensor once."
    return list({id(t): t for t in tensors}.values())


# --- observers by themselves ---


def an_observer(side: str, name: str, base_name: str, args: dict[str, Any]) -> Module:
    "A fresh observer."
    return OBSERVERS[side].load_from_registry(name, base_name=base_name, args=QuantizationArgs(observer=name, **args))


def look_at(side: str, name: str, base_name: str, args: dict[str, Any], value: Tensor) -> Work:
    "A fresh observer looks at a tensor."
    return Work(lambda observer: observer(value), lambda: an_observer(side, name, base_name, args))


def found_by(observer: Module) -> Found:
    "What an observer concludes. The reference forgets its statistics when asked, so they are read before."
    stats, searched = observer.get_statistics(), None
    if observer.args.strategy == "tensor_group":  # candidates were tried with scales that are not rounded to fp8
        searched = calculate_qparams(
            stats["min_vals"], stats["max_vals"], observer.args.model_copy(update={"scale_dtype": None})
        )[0]
    return Found(**observer.get_qparams(), searched=searched)


NORMS = dict(mse=2.4, memoryless_mse=2.4, nvfp4_expanded_mse=2.4, imatrix_mse=3.0)


def error_of(name: str, base_name: str, args: QuantizationArgs, value: Tensor, norm: float | None = None,
             importance: Tensor | None = None) -> Callable[[Found], Tensor] | None:
    """How good a conclusion about a tensor is; None where ties do not count: without a search, or in bf16, whose sums
    are exact."""
    if name not in NORMS or (value.dtype != torch.float32 and name != "imatrix_mse"): return None
    if importance is not None:
        importance = flatten_for_calibration(
            (importance / importance.mean()).expand(value.shape[0], -1), base_name, args
        )
    return search_error(flatten_for_calibration(value, base_name, args), args, norm or NORMS[name], importance)


def hooks_agree(
    model: Module, batch: dict[str, Tensor], args: dict[str, Any], attention: str = "eager"
) -> Agreement:
    "Compare what the input observers of both sides conclude after one pass."
    sides, total = {side: watched(model, side, args) for side in MODIFIERS}, Agreement()
    for side in sides.values(): a_pass(side, batch, attention).run(None)
    for name, value in inputs_of(model, batch, attention).items():
        theirs, mine = (sides[side].get_submodule(f"{name}.input_observer") for side in ("reference", "ours"))
        total += agreement(found_by(theirs), found_by(mine), error_of(args["observer"], "input", mine.args, value))
    return total
