"""Queries, keys and values in a record: what a calibration of the cache would conclude, and nothing left of how they
were seen."""
import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import calibrate
from qcal_nb.records import record

CACHE = dict(num_bits=8, type="float", symmetric=True, strategy="tensor")
HEADS = CACHE | dict(strategy="attn_head")


@pytest.mark.parametrize("observer", ["static_minmax", "minmax", "mse", "percentile", "entropy", "histogram_mse"])
@pytest.mark.parametrize("architecture", ["llama_gqa", "qwen3", "gemma2"])
def test_conclusions_about_keys_and_values_are_those_of_a_calibration(architecture, observer):
    recipe = QuantizationModifier(kv_cache_scheme=CACHE | dict(observer=observer))
    calibrated, data = make_model(architecture), make_batches(3)
    found = record(
        make_model(architecture), data, scheme=recipe, base_names=["k", "v"], observers=[observer], progress=False
    )
    calibrate(calibrated, data, recipe, progress=False)
    assert len(found.results) == 4
    for (name, state, _), conclusion in found.results.items():
        assert torch.equal(conclusion.scale, getattr(calibrated.get_submodule(name), f"{state}_scale")), (name, state)


@pytest.mark.parametrize("observer", ["static_minmax", "mse"])
def test_one_scale_a_head(observer):
    recipe = QuantizationModifier(kv_cache_scheme=HEADS | dict(observer=observer))
    calibrated, data = make_model("llama_gqa"), make_batches(3)
    found = record(make_model("llama_gqa"), data, scheme=recipe, base_names=["k"], observers=[observer], progress=False)
    calibrate(calibrated, data, recipe, progress=False)
    for (name, state, _), conclusion in found.results.items():
        assert conclusion.scale.numel() == 2
        assert torch.equal(conclusion.scale, getattr(calibrated.get_submodule(name), f"{state}_scale"))


def test_queries_and_nothing_left():
    model = make_model("llama_gqa")
    before = fingerprint(model)
    found = record(model, make_batches(2), base_names=["q", "k", "v", "input"], progress=False)
    assert differences(before, fingerprint(model)) == []
    assert len([key for key in found.tensors if key[1] == "q"]) == 2
    assert found["model.layers.0.self_attn", "q"].count == 2 * 2 * 16 * 64


def test_a_mask_leaves_positions_of_states_out():
    model, (batch,) = make_model("llama_gqa"), make_batches(1)
    batch["attention_mask"][:, 10:] = 0
    masked = record(
        model, [batch], base_names=["k"], observers=["mse"], mask=lambda b: b["attention_mask"].bool(), progress=False
    )
    short = {k: v[:, :10] for k, v in batch.items()}
    cut = record(model, [short], base_names=["k"], observers=["mse"], progress=False)
    name = "model.layers.0.self_attn"  # what comes before it sees no padding, since attention is causal
    a, b = masked[name, "k"], cut[name, "k"]
    assert (a.count, a.min, a.max, a.channels.tolist()) == (b.count, b.min, b.max, b.channels.tolist())
    scales = [r.results[name, "k", "mse"].scale for r in (masked, cut)]
    assert torch.equal(*scales)


@pytest.mark.parametrize(
    "architecture, words", [("gpt2", "no attention of this GPT2LMHeadModel can be looked into"), ("opt", None)]
)
def test_models_whose_attention_cannot_be_seen(architecture, words):
    model = make_model(architecture)
    before = fingerprint(model)
    if words is None: assert len(record(model, make_batches(1), base_names=["k"], progress=False)) == 2
    else:
        with pytest.raises(ValueError, match=words): record(model, make_batches(1), base_names=["k"], progress=False)
    assert differences(before, fingerprint(model)) == []
