"""Parts of a record add up to the whole, and what cannot be put together says so."""
import math
import random

import pytest
import torch
from helpers import make_model
from torch.nn import Linear, Sequential

from qcal_nb.records import CalibrationRecord, record, record_equal, unequal_parts
from tests.records.samples import QUIET, concluded_bits, exact, merged, mixture


@pytest.mark.parametrize("seed", range(3))
def test_parts_of_a_record_add_up(batches_and_whole, seed):
    model, data, options, whole = batches_and_whole
    rng = random.Random(seed)
    owner = [rng.randrange(3) for _ in data]
    parts = []
    for p in range(3):
        mine = [i for i in range(len(data)) if owner[i] == p]
        rng.shuffle(mine)
        if mine: parts.append(record(model, [data[i] for i in mine], batch_indices=mine, **options))
    found = merged(parts, rng)
    assert unequal_parts(found, whole) == [] and record_equal(found, whole)
    for key in whole.tensors: assert exact(found[key]) == exact(whole[key]), key
    assert found.expert_tokens == whole.expert_tokens
    assert found.tokens == whole.tokens == sum(b["input_ids"].numel() for b in data)
    lasting = [k for k, c in whole.results.items() if k[2] in ("static_minmax", "percentile")]
    assert lasting and all(concluded_bits(found.results[k]) == concluded_bits(whole.results[k]) for k in lasting)


def test_moving_averages_do_not_merge_and_say_so(batches_and_whole):
    model, data, options, whole = batches_and_whole
    a, b = record(model, data[:2], **options), record(model, data[2:], batch_indices=range(2, len(data)), **options)
    both = a | b
    for name, words in (("minmax", "depends on the order"), ("mse", "depends on the order")):
        moving = [c for k, c in both.results.items() if k[1:] == ("input", name)]
        assert moving and all(words in c.reason and c.scale is None and c.low is None for c in moving)
        assert all(
            concluded_bits(both.results[k])[3:] == concluded_bits(c)[3:]
            for k, c in a.results.items() if k[1:] == ("weight", name)
        )
    weighed = [c for k, c in both.results.items() if k[1:] == ("weight", "imatrix_mse")]
    assert weighed and all("weighs the weight's columns" in c.reason and c.scale is None for c in weighed)
    third = record(model, data[:1], batch_indices=[40], **options)
    assert record_equal((a | b) | third, a | (third | b))
    assert all(c.scale is None for k, c in (both | third).results.items() if k[1:] == ("input", "minmax"))


def test_a_part_that_saw_nothing_finite_leaves_the_other_its_conclusion():
    torch.manual_seed(0)
    model, good, bad = Sequential(Linear(16, 16)), torch.randn(4, 16), torch.full((4, 16), math.nan)
    for scheme, observers in (("NVFP4", ["static_minmax"]), (None, ["minmax", "mse", "static_minmax"])):
        for policy in ("skip", "record"):
            options = dict(scheme=scheme, observers=observers, nonfinite=policy, base_names="input", **QUIET)
            parts = record(model, [bad], **options), record(model, [good], batch_indices=[1], **options)
            whole = record(model, [bad, good], **options)
            for name in observers:
                key = ("0", "input", name)
                assert parts[0].results[key].reason == "nothing finite was seen"
                assert concluded_bits(
                    (parts[0] | parts[1]).results[key]
                ) == concluded_bits(whole.results[key]), (name, policy)
            assert record_equal(parts[1] | parts[0], whole)


def test_what_cannot_be_merged_is_refused_with_words(batches_and_whole):
    model, data, options, _ = batches_and_whole
    one = record(model, data[:1], **options)
    def refused(other, words):
        for pair in ((one, other), (other, one)):
            with pytest.raises(ValueError, match=words): _ = pair[0] | pair[1]
    refused(record(model, data[1:2], **options), "batch 0 is in both records, so it would count twice; .*batch_indices")
    refused(
        record(make_model("llama_gqa"), data[:1], batch_indices=[1], **options),
        "two runs: model is '.*' in one and '.*' in the other",
    )
    refused(record(model, data[:1], scheme="FP8", batch_indices=[1], **options), "two runs: config is")
    refused(record(mixture(seed=1), data[:1], batch_indices=[1], **options), "its weight differs in the other record")
    class Other(Linear): pass
    mixed = Sequential(Linear(4, 4)), Sequential(Other(4, 4))
    a, b = (record(m, [torch.ones(1, 4)], batch_indices=[i], base_names="input", **QUIET) for i, m in enumerate(mixed))
    with pytest.raises(ValueError, match="0 have other classes"): _ = a | b
    with pytest.raises(TypeError): _ = one | 3
    with pytest.raises(TypeError, match="must be a CalibrationRecord, got int"): record_equal(one, 3)


def test_what_record_equal_sees(batches_and_whole):
    model, data, options, whole = batches_and_whole
    assert record_equal(whole, record(model, data, **options))
    # another batch 0
    assert any("statistics of" in part for part in unequal_parts(whole, record(model, data[::-1], **options)))
    assert "experts" in unequal_parts(whole, record(model, data[:-1], **options))
    assert any(
        p.startswith("conclusion of")
        for p in unequal_parts(whole, record(model, data, **options | dict(observers=["static_minmax"])))
    )
    assert "config" in unequal_parts(whole, record(model, data, scheme="FP8", **options))


def test_a_name_that_was_not_recorded_is_answered_with_what_comes_close(batches_and_whole):
    run = batches_and_whole[3]
    with pytest.raises(KeyError, match="close to it are .*q_proj"): run["model.layers.0.self_attn.q_prj", "input"]
    assert isinstance(run, CalibrationRecord) and "6 batches" in repr(run)
