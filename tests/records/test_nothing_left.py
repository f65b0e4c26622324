"""A recording leaves nothing behind on the model, whatever ends it."""
import itertools
import math
import random
import sys
from collections import Counter

import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model
from torch.nn import Linear, Sequential

from qcal_nb.calibration import ModelBusyError, exclusive
from qcal_nb.modeling import all_experts, tokens_per_expert
from qcal_nb.lifecycle import QuantizationModifier, unfuse_experts
from qcal_nb.stats import NonFiniteError
from qcal_nb.records import record, record_equal, unequal_parts
from tests.records.samples import OPTIONS, QUIET, concluded_bits


class Broken(Exception): pass


def failing(model, where, error, after=2):
    "Raise in the middle of a forward pass: the `after`-th time that a layer ends."
    seen = itertools.count(1)
    def hook(*_):
        if next(seen) == after: raise error
    return where.register_forward_hook(hook)


def test_nothing_is_left_by_success(batches_and_whole):
    for name, options in itertools.product(
        ("llama_gqa", "mixtral", "gemma2"), ({}, dict(scheme="NVFP4", observers=["imatrix_mse", "mse"]))
    ):
        model = make_model(name)
        before = fingerprint(model)
        record(model, make_batches(1), **options, **QUIET)
        assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("name", ["llama_gqa", "mixtral"])
@pytest.mark.parametrize(
    "what", ["bad data", "late bad data", "forward", "interrupt", "raise", "mask", "indices", "strange error"]
)
def test_nothing_is_left_by_what_fails(name, what):
    model, data = make_model(name), make_batches(3)
    options = dict(observers=["minmax", "imatrix_mse"], **QUIET)
    handle, layer = None, model.model.layers[1].self_attn.o_proj
    if what == "forward": handle = failing(model, layer, Broken("in the middle"))
    if what == "interrupt": handle = failing(model, layer, KeyboardInterrupt())
    if what == "strange error": handle = failing(model, layer, SystemExit(3))
    if what == "raise":
        with torch.no_grad(): model.model.embed_tokens.weight[int(data[1]["input_ids"][1, 3])] = math.nan
        options |= dict(nonfinite="raise", base_names="input")
    if what == "bad data": data = ["a text without a tokenizer"]
    if what == "late bad data": data = [data[0], "a text without a tokenizer"]
    if what == "mask": options |= dict(mask=lambda batch: batch["attention_mask"])
    if what == "indices": options |= dict(batch_indices=[0, 1])
    before = fingerprint(model)
    expected = {
        "forward": Broken, "interrupt": None, "raise": NonFiniteError, "strange error": SystemExit
    }.get(what, ValueError)
    if expected is None: assert record(model, data, **options).batches == 1
    else:
        with pytest.raises(expected): record(model, data, **options)
    assert differences(before, fingerprint(model)) == []
    if handle: handle.remove()
    if what == "raise": return
    assert record(model, make_batches(1), **QUIET).batches == 1  # and nobody holds it


def test_a_nan_is_refused_with_its_name_and_place():
    model, x = Sequential(Linear(4, 4)), torch.ones(2, 3, 4)
    x[1, 2, 3] = math.inf
    with pytest.raises(
        NonFiniteError, match=r"0, input: 1 non-finite value, the first \(inf\) at position \(1, 2, 3\) of batch 1"
    ):
        record(model, [torch.ones(2, 3, 4), x], nonfinite="raise", **QUIET)
    with torch.no_grad(): model[0].weight[2, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"0, weight: .* at position \(2, 1\)"):
        record(model, [x], nonfinite="raise", **QUIET)


@pytest.mark.parametrize("name", ["llama_gqa", "mixtral"])
@pytest.mark.parametrize("finished", [0, 1, 2])
def test_an_interrupt_in_the_middle_of_a_batch(name, finished):
    "What is left is the record of the batches that were finished, conclusions and routed tokens included."
    model, data = make_model(name), make_batches(3)
    handle = failing(model, model.model.layers[1].self_attn.o_proj, KeyboardInterrupt(), after=finished + 1)
    some = record(model, data, **OPTIONS)
    handle.remove()
    assert some.batches == finished
    if not finished:
        assert some.tokens == 0 and all(s.count == 0 for (_, b), s in some.tensors.items() if b == "input")
        return
    right = record(model, data[:finished], **OPTIONS)
    assert unequal_parts(some, right) == [] and some.expert_tokens == right.expert_tokens
    for key, c in right.results.items(): assert concluded_bits(some.results[key]) == concluded_bits(c), key


def test_an_interrupt_of_the_data():
    model, data = make_model("llama_gqa"), make_batches(3)
    def impatient(n):
        yield from data[:n]
        raise KeyboardInterrupt
    assert record_equal(record(model, impatient(2), **OPTIONS), record(model, data[:2], **OPTIONS))
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt): record(model, impatient(0), **OPTIONS)  # there is nothing to return
    assert differences(before, fingerprint(model)) == []


def test_an_interrupt_at_any_line():
    "Between looking, adding and keeping there is no line where statistics know more batches than conclusions do."
    torch.manual_seed(0)
    model, data = Sequential(Linear(8, 8), Linear(8, 8)), [torch.randn(2, 8) for _ in range(3)]
    options = dict(
        observers=["minmax", "imatrix_mse"], scheme=dict(weights=dict(num_bits=8, strategy="channel")), progress=False
    )
    right = {n: record(model, data[:n], **options) for n in (1, 2, 3)}
    files = (
        "records/collect.py", "records/observing.py", "records/tokens.py", "records/calibration_record.py",
        "stats/tensor.py"
    )
    lines = [0]
    def run(stop):
        lines[0] = 0
        def local(frame, event, _):
            if event == "line" and inside(frame):
                lines[0] += 1
                if lines[0] == stop: raise KeyboardInterrupt
            return local
        def inside(frame):
            back = frame
            while back is not None:
                if back.f_code.co_name == "one_pass": return True
                back = back.f_back
            return False
        def trace(frame, event, _):
            watched = (
                frame.f_code.co_filename.endswith(files)
                and frame.f_code.co_name not in ("_attached", "_module_hooks", "attached")
            )
            return local if watched and inside(frame) else None
        sys.settrace(trace)
        try: return record(model, data, **options)
        finally: sys.settrace(None)
    assert run(-1).batches == 3 and lines[0] > 500
    before, counts = fingerprint(model), Counter()
    for stop in random.Random(0).sample(range(1, lines[0]), 70):
        found = run(stop)
        counts[found.batches] += 1
        assert differences(before, fingerprint(model)) == []
        if found.batches:
            assert unequal_parts(found, right[found.batches]) == []
            for key, c in right[found.batches].results.items():
                assert concluded_bits(found.results[key]) == concluded_bits(c), (stop, key)
    assert min(counts[n] for n in (0, 1, 2)) > 5


def test_a_model_whose_experts_are_apart_keeps_its_own_count():
    model, data = make_model("mixtral"), make_batches(3)
    fresh = record(model, data, **QUIET)
    unfuse_experts(model)
    with torch.no_grad(), all_experts(model): model(**data[0])
    assert sum(row.tokens for row in tokens_per_expert(model)) == 2 * 2 * 32
    assert all(record(model, data, **QUIET).expert_tokens == fresh.expert_tokens for _ in range(2))
    before = fingerprint(model)
    record(model, data, **QUIET)
    assert differences(before, fingerprint(model)) == []
    assert sum(fresh.expert_tokens.values()) == 2 * 2 * 96  # two layers, two experts a token


def test_a_held_model_is_not_recorded():
    model = make_model("llama_gqa")
    with exclusive(model, "somebody"), torch.no_grad():
        import threading
        found = []
        def work():
            try: record(model, make_batches(1), **QUIET)
            except ModelBusyError as error: found.append(str(error))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(found) == 1 and "somebody" in found[0]


def test_a_calibrating_model_hears_nothing_of_a_recording():
    "Observers that are on the model already go on knowing what they knew."
    from qcal_nb.calibration import observers_in
    from qcal_nb.lifecycle import State
    model, modifier = make_model("llama_gqa"), QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"])
    modifier.on_initialize(State(model))
    modifier.on_start(State(model))
    with torch.no_grad(): model(**make_batches(1)[0])
    before = [o.counts for o in observers_in(model)]
    record(model, make_batches(2, seed=5), **QUIET)
    assert [o.counts for o in observers_in(model)] == before and before
