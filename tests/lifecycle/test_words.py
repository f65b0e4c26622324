"""What is asked in vain is refused or announced in words."""
import pytest
from helpers import differences, fingerprint, make_batches, make_model

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import override

KV = dict(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
STATIC = dict(scheme="INT8_STATIC", ignore=["lm_head"])


@pytest.mark.parametrize(("work", "error", "words"), [
    (lambda model: calibrate(model, make_batches(), QuantizationModifier(**STATIC), all_experts="no"), TypeError,
     "all_experts='no' must be True or False"),
    (
        lambda model: QuantizationModifier(**STATIC).on_initialize(model), TypeError,
        "state must be a State, got LlamaForCausalLM"
    ),
    (
        lambda model: QuantizationModifier(config_groups={"g": dict(targets=["re:("], weights=dict(num_bits=8))}),
        ValueError,
        "is not a regular expression",
    ),
])
def test_words_for_what_people_do(work, error, words):
    model = make_model("llama_gqa")
    before = fingerprint(model)
    with pytest.raises(error) as caught: work(model)
    assert words in str(caught.value) and differences(before, fingerprint(model)) == []


def test_an_observer_that_nobody_asks_is_announced():
    with pytest.warns(UserWarning, match="observer 'percentile' has no effect"):
        QuantizationModifier(scheme="FP8_DYNAMIC", input_observer="percentile")


@pytest.mark.parametrize(("observers", "error", "words"), [
    (
        {"model.layers.0.self_attn": {"k": "minmax"}}, ValueError,
        "is an attention module; its observer is named in kv_cache_scheme"
    ),
    (
        {"model.layers.0.mlp.experts.0.down_proj": {"weight": "mse"}}, ValueError,
        "its experts are fused, see unfuse_experts"
    ),
    (
        {"model.layers.0.self_attn.q_proj": "mse"}, TypeError,
        "must map 'weight', 'input' or 'output' to an observer, got 'mse'"
    ),
])
def test_overrides_that_cannot_be(observers, error, words):
    modifier = QuantizationModifier(scheme="FP8", kv_cache_scheme=KV, ignore=["lm_head"])
    with pytest.raises(error) as caught: override(modifier, observers, make_model("mixtral"))
    assert words in str(caught.value)
