"""What ranks do, for tests/calibration/test_ranks.py. Under torchrun, or as one process:

    python cases.py FOLDER SECONDS CASE [CASE ...]

SECONDS is the process group's limit. Each rank saves what its cases returned in FOLDER/{rank}.pt, and its process id in
FOLDER/{rank}.pid. What ranks do with records and with statistics is in record_cases.py and statistics_cases.py.
"""
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from qcal_nb.lifecycle import QuantizationModifier, State, phase_of, reset_quantization
from qcal_nb.models import load_tiny_llama
from qcal_nb.pipelines import calibrate, calibration_context
from qcal_nb.calibration.ranks import agree
from qcal_nb.calibration import differing_qparams, rank_and_size, sync_statistics, together

import record_cases
import statistics_cases
from common import WEIGHTS, mixture, said, scales, texts

LIMIT = float(sys.argv[2])


def calibrated(options=None, **recipe):
    "Scales of the embedded model, how many differ between ranks, and which weights this rank looked at."
    model, tokenizer = load_tiny_llama()
    modifier = QuantizationModifier(ignore=["lm_head"], **recipe)
    data = texts() if modifier.requires_calibration_data else None
    calibrate(model, data, modifier, tokenizer=tokenizer, progress=False, **(options or {}))
    looked = [row.module for row in modifier.coverage if row.base_name == "weight" and row.observations]
    return dict(scales=scales(model), differing=differing_qparams(model), looked=looked, phase=phase_of(model))


# --- the embedded model ---

def static(): return calibrated(scheme="INT8_STATIC", input_observer="static_minmax")


def minmax(): return calibrated(scheme="INT8_STATIC", input_observer="minmax")


def averages():
    "This rank's own moving averages of each Linear's input range, by a plain loop that knows nothing of observers."
    model, tokenizer = load_tiny_llama()
    found = {}
    def hook(name):
        def look(module, args):
            new = torch.stack([args[0].min(), args[0].max()])
            found[name] = found[name] * (1.0 - 0.01) + new * 0.01 if name in found else new
        return look
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head": module.register_forward_pre_hook(hook(name))
    with calibration_context(model):
        for text in texts(): model(**tokenizer(text, return_tensors="pt"))
    return found


def w4a16(): return calibrated(scheme="W4A16", weight_observer="memoryless_minmax")


def nvfp4a16(): return calibrated(scheme="NVFP4A16")


def nvfp4(): return calibrated(scheme="NVFP4", input_observer="static_minmax")


def sequential(): return calibrated(dict(pipeline="sequential"), scheme="INT8_STATIC", input_observer="static_minmax")


def sequential_quantized():
    return calibrated(
        dict(pipeline="sequential", propagate="quantized"), scheme="INT8_STATIC", input_observer="static_minmax",
        weight_observer="mse"
    )


def searched(): return calibrated(scheme="W4A16", weight_observer="memoryless_mse")


def counted(): return calibrated(scheme="FP8", input_observer="percentile")


def importance(): return calibrated(scheme="W4A16", weight_observer="imatrix_mse")


def cache():
    args = dict(num_bits=8, type="float", strategy="attn_head", symmetric=True, dynamic=False, observer="static_minmax")
    return calibrated(scheme="FP8_DYNAMIC", kv_cache_scheme=args)


def experts():
    torch.manual_seed(0)
    model, data = mixture()
    modifier = QuantizationModifier(scheme="INT8_STATIC", input_observer="static_minmax", ignore=["lm_head"])
    calibrate(model, data, modifier, all_experts=False, progress=False, on_uncalibrated="skip")
    seen = {
        row.module for row in modifier.coverage
        if row.base_name == "input" and row.observations and ".experts." in row.module
    }
    return dict(scales=scales(model), differing=differing_qparams(model), seen=seen)


def every_layer_by_itself():
    "Scales are computed layer by layer, as sequential calibration does, and the last of them at the end."
    model, tokenizer = load_tiny_llama()
    modifier = QuantizationModifier(scheme="NVFP4", ignore=["lm_head"], input_observer="static_minmax")
    state = State(model)
    modifier.on_initialize(state)
    modifier.on_start(state)
    with calibration_context(model):
        for text in texts(): model(**tokenizer(text, return_tensors="pt"))
    for layer in model.model.layers[:3]: modifier.on_sequential_epoch_end(state, None, layer.modules())
    modifier.on_end(state)
    return dict(scales=scales(model), differing=differing_qparams(model))


# --- branches that do not run everywhere ---

class Branches(torch.nn.Module):
    "`both` always runs, `second` where the batch says so, `never` never."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.both, self.second, self.never, self.last = (torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, route):
        x = self.both(x)
        return self.last(self.second(x) if route.any() else x)


def branch_data(rank):
    generator = torch.Generator().manual_seed(rank)
    return [
        dict(x=torch.randn(5, 8, generator=generator) * (1 + rank), route=torch.tensor([rank == 1]))
        for _ in range(3 - rank)
    ]


def branches(observer="static_minmax"):
    rank, size = rank_and_size()
    data = branch_data(rank) if size == 2 else branch_data(0) + branch_data(1)
    model, modifier = Branches(), QuantizationModifier(scheme="INT8_STATIC", input_observer=observer)
    refused = said(calibrate, model, data, modifier, progress=False)
    phase = phase_of(model)
    reset_quantization(model)
    calibrate(model, data, modifier, progress=False, on_uncalibrated="skip")
    uncovered = [f"{row.module}.{row.base_name}" for row in modifier.coverage if not row.computed]
    enabled = {name: m.quantization_enabled for name, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    return dict(
        scales=scales(model), refused=refused, phase=phase, differing=differing_qparams(model), uncovered=uncovered,
        enabled=enabled
    )


def branches_minmax(): return branches("minmax")


def only_the_second():
    "What one process finds that sees the second rank's batches alone."
    model = Branches()
    modifier = QuantizationModifier(scheme="INT8_STATIC", input_observer="minmax", ignore=["never"])
    calibrate(model, branch_data(1), modifier, progress=False)
    return scales(model)


def refused_end():
    "An end that is refused leaves each rank's own statistics; more data, and it succeeds."
    rank, _ = rank_and_size()
    model, modifier = Branches(), QuantizationModifier(scheme="INT8_STATIC", input_observer="minmax", ignore=["never"])
    state = State(model)
    modifier.on_initialize(state)
    modifier.on_start(state)
    with torch.no_grad():
        for batch in branch_data(0): model(**batch)
    own = model.both.input_observer.min_vals
    refused = said(modifier.on_end, state)
    kept = model.both.input_observer.min_vals is own and not model.second.input_observer.has_statistics
    weights = [m.weight_observer.has_statistics for m in (model.both, model.second, model.last)]
    with torch.no_grad():
        if rank == 1: model(**branch_data(1)[0])
    modifier.on_end(state)
    return dict(refused=refused, kept=kept, weights=weights, scales=scales(model), differing=differing_qparams(model))


# --- failures ---

def bad_batch():
    "The second rank's second text is beyond the vocabulary."
    rank, _ = rank_and_size()
    model, tokenizer = load_tiny_llama()
    good = torch.tensor([[1, 2, 3]])
    modifier = QuantizationModifier(scheme="FP8", ignore=["lm_head"])
    start = time.monotonic()
    error = said(
        calibrate, model, [good, good, good] if rank == 0 else [good, torch.tensor([[99999]])], modifier, progress=False
    )
    seconds, phase = time.monotonic() - start, phase_of(model)
    reset_quantization(model)
    calibrate(model, [good], modifier, progress=False)
    return dict(error=error, seconds=seconds, phase=phase, again=phase_of(model), differing=differing_qparams(model))


def no_data():
    rank, _ = rank_and_size()
    modifier = QuantizationModifier(scheme="INT8_STATIC")
    return said(
        calibrate, torch.nn.Sequential(torch.nn.Linear(4, 4)), [torch.ones(2, 4)] if rank == 0 else [], modifier,
        progress=False
    )


def bad_weight():
    "The smaller weight, which falls to the second rank, holds a NaN."
    model = torch.nn.Sequential(*(torch.nn.Linear(8, n) for n in (16, 8)))
    with torch.no_grad(): model[1].weight[0, 0] = torch.nan
    modifier = QuantizationModifier(scheme=WEIGHTS)
    error = said(calibrate, model, None, modifier, progress=False)
    own = [m.weight_observer.has_statistics for m in model]
    return dict(error=error, own=own, phase=phase_of(model), unset=[m.weight_scale.isnan().all().item() for m in model])


def another_scheme():
    rank, _ = rank_and_size()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    modifier = QuantizationModifier(scheme="FP8" if rank == 0 else "INT8_STATIC")
    return said(calibrate, model, [torch.ones(2, 8)], modifier, progress=False)


def another_model():
    rank, _ = rank_and_size()
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3 - rank)))
    return said(calibrate, model, [torch.ones(2, 8)], QuantizationModifier(scheme="FP8"), progress=False)


def another_weight():
    "One bit of one weight, in the layer that the first rank looks at."
    rank, _ = rank_and_size()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
    if rank == 1: model[0].weight.data[3, 4] *= 1.5
    error = said(calibrate, model, None, QuantizationModifier(scheme=WEIGHTS), progress=False)
    return dict(error=error, unset=[m.weight_scale.isnan().all().item() for m in model])


def another_shape():
    rank, _ = rank_and_size()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8 + rank))
    return said(calibrate, model, None, QuantizationModifier(scheme=WEIGHTS), progress=False)


def another_step():
    "The first rank synchronises, the second is done."
    rank, _ = rank_and_size()
    if rank == 0: return said(sync_statistics, [])
    return said(agree, "go home")


def nested():
    "An error inside of an inner block, on one rank, while the other has gone on to the next step: told once, to both."
    rank, _ = rank_and_size()
    def work():
        with together("finish"):
            if rank == 1: raise KeyError("lost")
            with together("work"): pass
            with together("never reached"): pass
    errors = [said(work), said(work)]
    agree("still in step")
    return errors


def local_observers():
    "Memoryless observers on activations stay apart, and that is said."
    rank, _ = rank_and_size()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    modifier = QuantizationModifier(scheme="INT8_STATIC", input_observer="memoryless_minmax")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(model, [torch.ones(2, 8) * (1 + rank)], modifier, progress=False)
    return dict(warnings=[str(w.message) for w in caught], differing=differing_qparams(model))


# --- what cannot go on in the same processes ---

def hang():
    "One rank never comes."
    if rank_and_size()[0] == 1: time.sleep(600)
    return said(agree, "meet")


def falls_silent():
    "One rank comes later than the limit allows."
    rank, _ = rank_and_size()
    if rank == 1: time.sleep(LIMIT + 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    return said(calibrate, model, [torch.ones(2, 4)], QuantizationModifier(scheme="FP8"), progress=False)


def dies():
    "One rank ends in the middle, without a word; the other does not catch what comes of it."
    if rank_and_size()[0] == 1: os._exit(3)
    calibrate(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), [torch.ones(2, 4)], QuantizationModifier(scheme="FP8"),
        progress=False
    )


def uncaught():
    "As in a script that catches nothing."
    rank, _ = rank_and_size()
    data = [torch.ones(2, 4)] if rank == 0 else [torch.ones(2, 4) * torch.nan]
    calibrate(torch.nn.Sequential(torch.nn.Linear(4, 4)), data, QuantizationModifier(scheme="FP8"), progress=False)


if __name__ == "__main__":
    folder, cases = Path(sys.argv[1]), sys.argv[3:]
    torch.set_num_threads(1)
    if "RANK" in os.environ: dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    rank, size = rank_and_size()
    (folder/f"{rank}.pid").write_text(str(os.getpid()))
    results, known = {}, vars(record_cases) | vars(statistics_cases) | globals()
    for case in cases:
        torch.manual_seed(0)
        results[case] = known[case]()
        torch.save(results, folder/f"{rank}.pt")
    if dist.is_initialized(): dist.destroy_process_group()
