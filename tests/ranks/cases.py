"""What ranks do, for tests/calibration/test_ranks.py. Under torchrun, or as one process:

    python cases.py FOLDER SECONDS CASE [CASE ...]

SECONDS is the process group's limit. Each rank saves what its cases returned in FOLDER/{rank}.pt, and its process id in FOLDER/{rank}.pid.
"""
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from qcal_nb.calibration import observe, observer_of, update_qparams
from qcal_nb.lifecycle import QuantizationModifier, State, phase_of, reset_quantization
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.observers import Counts, Observer
from qcal_nb.pipelines import calibrate, calibration_context
from qcal_nb.calibration.ranks import agree
from qcal_nb.calibration import differing_qparams, observe_weights, rank_and_size, sync_statistics, together
from qcal_nb.records import all_ranks, record
from qcal_nb.schemes import preset

LIMIT = float(sys.argv[2])
WEIGHTS = dict(weights=dict(num_bits=8, strategy="channel"))


def said(function, *args, **kwargs):
    "The error that a call ends with, as text."
    try: function(*args, **kwargs)
    except Exception as error: return f"{type(error).__name__}: {error}"
    return "no error"


def scales(model): return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(("_scale", "_zero_point"))}


def texts():
    "Four texts: all of them for one process, three for the first rank and one for the second."
    rank, size = rank_and_size()
    return calibration_texts()[:4] if size == 1 else [calibration_texts()[:3], calibration_texts()[3:4]][rank]


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
    return calibrated(dict(pipeline="sequential", propagate="quantized"), scheme="INT8_STATIC", input_observer="static_minmax", weight_observer="mse")


def searched(): return calibrated(scheme="W4A16", weight_observer="memoryless_mse")


def counted(): return calibrated(scheme="FP8", input_observer="percentile")


def importance(): return calibrated(scheme="W4A16", weight_observer="imatrix_mse")


def cache():
    args = dict(num_bits=8, type="float", strategy="attn_head", symmetric=True, dynamic=False, observer="static_minmax")
    return calibrated(scheme="FP8_DYNAMIC", kv_cache_scheme=args)


def experts():
    "A mixture of eight experts; the second rank has two tokens, so that most experts are seen on the first alone."
    from transformers import MixtralConfig, MixtralForCausalLM
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                                             num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=1, max_position_embeddings=64)).eval()
    rank, size = rank_and_size()
    data = [torch.arange(i, 64, 3)[None] for i in range(3)] + [torch.tensor([[7, 9]])]
    if size == 2: data = [data[:3], data[3:]][rank]
    modifier = QuantizationModifier(scheme="INT8_STATIC", input_observer="static_minmax", ignore=["lm_head"])
    calibrate(model, data, modifier, all_experts=False, progress=False, on_uncalibrated="skip")
    seen = {row.module for row in modifier.coverage if row.base_name == "input" and row.observations and ".experts." in row.module}
    return dict(scales=scales(model), differing=differing_qparams(model), seen=seen)


def every_layer_by_itself():
    "Scales are computed layer by layer, as sequential calibration does, and the last of them at the end."
    model, tokenizer = load_tiny_llama()
    modifier, state = QuantizationModifier(scheme="NVFP4", ignore=["lm_head"], input_observer="static_minmax"), State(model)
    modifier.on_initialize(state)
    modifier.on_start(state)
    with calibration_context(model):
        for text in texts(): model(**tokenizer(text, return_tensors="pt"))
    for layer in model.model.layers[:3]: modifier.on_sequential_epoch_end(state, None, layer.modules())
    modifier.on_end(state)
    return dict(scales=scales(model), differing=differing_qparams(model))


# --- records: each rank saves its part ---

def recorded(name, model, data, **options):
    "This rank's part of a record, saved beside the results."
    rank, _ = rank_and_size()
    before = {n: len(m._forward_pre_hooks) for n, m in model.named_modules()}
    run = record(model, data, progress=False, **options)
    run.save(Path(sys.argv[1])/f"{name}.{rank}.record")
    return dict(batches=run.spans, tokens=run.tokens, clean=before == {n: len(m._forward_pre_hooks) for n, m in model.named_modules()})


def record_texts():
    model, tokenizer = load_tiny_llama()
    return recorded("texts", model, texts(), tokenizer=tokenizer, max_length=64, observers=["static_minmax", "percentile", "minmax"])


def record_experts():
    from transformers import MixtralConfig, MixtralForCausalLM
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                                             num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=1, max_position_embeddings=64)).eval()
    rank, size = rank_and_size()
    data = [torch.arange(i, 64, 3)[None] for i in range(3)] + [torch.tensor([[7, 9]])]
    return recorded("experts", model, data if size == 1 else [data[:3], data[3:]][rank], scheme="NVFP4", observers=["static_minmax"])


def record_by_hand():
    "Global indices given: rank 0 has the even ones. No rank asks another."
    rank, size = rank_and_size()
    data = [torch.full((2, 8), float(i + 1)) for i in range(5)]
    mine = range(5) if size == 1 else range(rank, 5, 2)
    return recorded("by_hand", torch.nn.Sequential(torch.nn.Linear(8, 8)), [data[i] for i in mine], batch_indices=mine)


def record_one_without_data():
    rank, size = rank_and_size()
    data = [torch.ones(2, 8), torch.ones(3, 8)]
    return recorded("no_data", torch.nn.Sequential(torch.nn.Linear(8, 8)), data if rank == 0 or size == 1 else [])


def record_together():
    "All parts on every rank; and parts of two models, which no rank may take for one."
    model, tokenizer = load_tiny_llama()
    rank, _ = rank_and_size()
    part = record(model, texts(), tokenizer=tokenizer, max_length=64, observers=["percentile"], progress=False)
    whole = all_ranks(part)
    whole.save(Path(sys.argv[1])/f"together.{rank}.record")
    other = record(torch.nn.Sequential(torch.nn.Linear(8, 8 + rank)), [torch.ones(2, 8)], progress=False)
    return dict(batches=whole.spans, own=part.spans, error=said(all_ranks, other))


def record_bad_data():
    "The second rank's data cannot be read: all hear of it, and can go on."
    rank, _ = rank_and_size()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    error = said(record, model, [torch.ones(2, 8)] if rank == 0 else [object()], progress=False)
    return dict(error=error, again=record(model, [torch.ones(2, 8)], progress=False).spans)


def record_bad_argument():
    "One rank's arguments are wrong: found before the ranks speak to each other, and yet told to all."
    rank, _ = rank_and_size()
    return said(record, torch.nn.Sequential(torch.nn.Linear(8, 8)), [torch.ones(2, 8)], observers="mse" if rank == 0 else "msee", progress=False)


def record_bad_forward():
    "A forward pass fails on the second rank alone; the first one's part is not lost."
    rank, _ = rank_and_size()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    error = said(record, model, [torch.ones(2, 8 + rank)], progress=False)
    agree("still in step")
    return error


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
    return [dict(x=torch.randn(5, 8, generator=generator) * (1 + rank), route=torch.tensor([rank == 1])) for _ in range(3 - rank)]


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
    return dict(scales=scales(model), refused=refused, phase=phase, differing=differing_qparams(model), uncovered=uncovered, enabled=enabled)


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
    error = said(calibrate, model, [good, good, good] if rank == 0 else [good, torch.tensor([[99999]])], modifier, progress=False)
    seconds, phase = time.monotonic() - start, phase_of(model)
    reset_quantization(model)
    calibrate(model, [good], modifier, progress=False)
    return dict(error=error, seconds=seconds, phase=phase, again=phase_of(model), differing=differing_qparams(model))


def no_data():
    rank, _ = rank_and_size()
    modifier = QuantizationModifier(scheme="INT8_STATIC")
    return said(calibrate, torch.nn.Sequential(torch.nn.Linear(4, 4)), [torch.ones(2, 4)] if rank == 0 else [], modifier, progress=False)


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


# --- statistics of all kinds, against plain arithmetic ---

AVG, SUM, MIN, MAX = (getattr(dist.ReduceOp, name) for name in ("AVG", "SUM", "MIN", "MAX"))


class Kept(Observer):
    "An observer whose statistics are put there by hand."

    statistics = ("a", "b")
    def update_statistics_from_observed(self, observed): raise AssertionError("nobody observes")


OPS = [(MIN, MAX), (AVG, AVG), (SUM, SUM), (MAX, SUM), (SUM, AVG)]
KINDS = [type(f"Kept{i}", (Kept,), {"sync_ops": dict(zip("ab", ops))}) for i, ops in enumerate(OPS)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(rank):
    "What a rank knows in the game of statistics: for each observer (kind, values of a and b, or None). Everyone can draw everyone's."
    world, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + rank)
    found = []
    for i in range(60):
        kind, shape = i % len(KINDS), [(), (1,), (3,), (2, 5), (2, 1, 3)][int(torch.randint(5, (), generator=world))]
        pair = []
        for op in OPS[kind]:
            dtype = DTYPES[int(torch.randint(4, (), generator=world))]
            value = (torch.randn(shape, generator=own) * 100).to(dtype)
            pair.append(value.to(torch.int64) if op == SUM and i % 2 else value)
        present = torch.rand((), generator=own).item() < (0, 0.3, 0.6, 1)[i % 4]
        found.append((kind, pair if present else None))
    return found


def statistics():
    "All observers of the game, synchronised twice, and what they hold."
    rank, _ = rank_and_size()
    observers, originals = [], []
    for kind, pair in drawn(rank):
        observer = KINDS[kind](base_name="input", args=preset("INT8_STATIC").input_activations)
        if pair: observer.a, observer.b = pair
        observers.append(observer)
        originals.append(pair and [p.clone() for p in pair])
    before = [(o.__dict__.get("a"), o.__dict__.get("b")) for o in observers]
    sync_statistics(observers)
    after = [(o.__dict__.get("a"), o.__dict__.get("b")) for o in observers]
    untouched = all(torch.equal(x, y) for pair, old in zip(before, originals) if old for x, y in zip(pair, old))
    sync_statistics(observers)
    same = all(x is y for o, pair in zip(observers, after) for x, y in zip((o.__dict__.get("a"), o.__dict__.get("b")), pair))
    own_storage = all(t.untyped_storage().nbytes() == t.numel() * t.itemsize for pair in after for t in pair if t is not None)
    return dict(after=after, untouched=untouched, twice_is_once=same, own_storage=own_storage, counts=[o.counts == Counts() for o in observers])


def consumed():
    "Statistics that were written into a scale count as nothing: on one rank only, and on all."
    rank, _ = rank_and_size()
    layer = torch.nn.Linear(4, 4)
    QuantizationModifier(scheme="INT8_STATIC", input_observer="static_minmax").on_initialize(State(layer))
    observer = Observer.load_from_registry("static_minmax", base_name="input", args=preset("INT8_STATIC").input_activations)
    layer.input_observer = observer
    observer(torch.tensor([[-9.0 - rank, 9.0]]))
    update_qparams(layer, "input")
    old = observer.min_vals
    sync_statistics([observer])
    kept = observer.min_vals is old and observer.consumed
    if rank == 1: observer(torch.tensor([[-2.0, 3.0]]))
    sync_statistics([observer])
    return dict(kept=kept, range=(observer.min_vals.item(), observer.max_vals.item()), fresh=not observer.consumed)


def weights_by_hand():
    "A second look at weights that nobody changed is no look; one rank's share is the other's gap."
    model = torch.nn.Sequential(*(torch.nn.Linear(4, n) for n in (4, 5, 6, 7)))
    modifier = QuantizationModifier(scheme=WEIGHTS)
    modifier.on_initialize(State(model))
    modifier.on_start(State(model))
    observe_weights(model.children())
    observers = [observer_of(m, "weight") for m in model]
    first, looks = [o.min_vals for o in observers], [o.counts.observations for o in observers]
    observe_weights(model.children())
    same = all(torch.equal(o.min_vals, f) for o, f in zip(observers, first))
    observe(model.children(), "weight")
    right = all(torch.equal(o.min_vals, m.weight.amin(-1, keepdim=True)) for o, m in zip(observers, model))
    return dict(looks=looks, same=same, right=right, again=[o.counts.observations for o in observers])


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
    calibrate(torch.nn.Sequential(torch.nn.Linear(4, 4)), [torch.ones(2, 4)], QuantizationModifier(scheme="FP8"), progress=False)


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
    results = {}
    for case in cases:
        torch.manual_seed(0)
        results[case] = globals()[case]()
        torch.save(results, folder/f"{rank}.pt")
    if dist.is_initialized(): dist.destroy_process_group()
