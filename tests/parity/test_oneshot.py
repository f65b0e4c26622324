"""Scales and zero points are, bit for bit, those of llm-compressor's own `oneshot`, run here in the same process at one
thread."""
import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from harness import ours, reference, unequal
from helpers import make_batches, make_model, qparams

from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.observers import Observer, observer_key
from qcal_nb.observers import MinMaxObserver
from qcal_nb.observers.minmax import min_max
from qcal_nb.pipelines import batches
from qcal_nb.schemes import preset

pytestmark = pytest.mark.parity
pytest.importorskip("llmcompressor", reason="no reference: pip install -e '.[dev]'")

INT8 = dict(num_bits=8, type="int", symmetric=True)
SCHEMES = {
    "FP8": dict(scheme="FP8"),
    "INT8_STATIC": dict(config_groups={"group_0": preset("INT8_STATIC")}),  # not a preset of the reference
    "W8A8": dict(scheme="W8A8"),
    "FP8_DYNAMIC": dict(scheme="FP8_DYNAMIC"),
    "INT8_STATIC, inputs asymmetric": dict(config_groups={"group_0": QuantizationScheme(
        targets=["Linear"], weights=dict(**INT8, strategy="tensor"),
        input_activations=dict(INT8, symmetric=False, strategy="tensor", observer="static_minmax"))}),
    "INT8_STATIC, averaging_constant": dict(config_groups={
        "group_0": QuantizationScheme(
            targets=["Linear"],
            weights=dict(**INT8, strategy="channel"),
            input_activations=dict(
                **INT8, strategy="tensor", observer="minmax", observer_kwargs={"averaging_constant": 0.3}
            ),
        )
    }),
}
EXTRA_PRESETS = ["FP8_BLOCK", "W4A16", "W4A16_ASYM", "NVFP4", "MXFP4"]
ARCHITECTURES = ["llama_gqa", "llama_tied", "qwen3", "opt", "phi", "gpt_neox", "bert"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_embedded_model(scheme, dtype, tokenizer):
    data = list(batches(calibration_texts()[:6], tokenizer))
    recipe = SCHEMES[scheme] | dict(ignore=["lm_head"])
    assert unequal(
        reference(load_tiny_llama(dtype)[0], data, tokenizer, **recipe), ours(load_tiny_llama(dtype)[0], data, **recipe)
    ) == []


@pytest.mark.parametrize("scheme", EXTRA_PRESETS)
def test_embedded_model_other_presets(scheme, tokenizer):
    data = list(batches(calibration_texts()[:3], tokenizer))
    recipe = dict(scheme=scheme, ignore=["lm_head"])
    assert unequal(
        reference(load_tiny_llama()[0], data, tokenizer, **recipe), ours(load_tiny_llama()[0], data, **recipe)
    ) == []


@pytest.mark.parametrize("scheme", ["FP8", "INT8_STATIC"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, scheme, tokenizer):
    recipe, data = SCHEMES[scheme] | dict(ignore=["lm_head"]), make_batches()
    assert unequal(reference(make_model(name), data, tokenizer, **recipe), ours(make_model(name), data, **recipe)) == []


def test_padded_batches(tokenizer):
    texts = ["A short text.", "A text that is quite a bit longer than the other one, so that padding is needed."]
    data = list(batches(texts, tokenizer, batch_size=2))
    assert (data[0]["attention_mask"] == 0).any()
    recipe = SCHEMES["INT8_STATIC"] | dict(ignore=["lm_head"])
    assert unequal(
        reference(load_tiny_llama()[0], data, tokenizer, **recipe), ours(load_tiny_llama()[0], data, **recipe)
    ) == []


def test_tied_embeddings_when_the_head_is_quantized(tokenizer):
    recipe, data = dict(scheme="FP8"), make_batches()  # nothing ignored: lm_head is a target
    theirs, mine = make_model("llama_tied"), make_model("llama_tied")
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    assert unequal(reference(theirs, data, tokenizer, **recipe), ours(mine, data, **recipe)) == []
    assert "lm_head.input_scale" in qparams(mine) and mine.lm_head.weight is not mine.model.embed_tokens.weight


def test_the_list_of_observers_that_production_has():
    from llmcompressor.observers import Observer as ReferenceObserver
    ours = {observer_key(name) for name, one in Observer.observers().items() if one.in_llm_compressor}
    assert ours == {observer_key(name) for name in ReferenceObserver.registered_names()}


def test_a_wrong_observer_is_noticed(tokenizer):
    """The harness must be able to fail: an observer that is off by one part in a million is found in every activation
    scale."""
    @Observer.register("off_by_a_hair")
    class OffByAHair(MinMaxObserver):
        def update_statistics_from_observed(self, observed):
            super().update_statistics_from_observed(observed)
            self.max_vals = torch.nextafter(self.max_vals, self.max_vals + 1)
            self.min_vals = torch.nextafter(self.min_vals, self.min_vals - 1)
    data, recipe = list(batches(calibration_texts()[:2], tokenizer)), dict(SCHEMES["INT8_STATIC"], ignore=["lm_head"])
    right = reference(load_tiny_llama()[0], data, tokenizer, **recipe)
    wrong = ours(load_tiny_llama()[0], data, **recipe, input_observer="off_by_a_hair")
    found = unequal(right, wrong)
    assert len(found) > 20 and all(name.endswith("input_scale") for name in found)


def test_a_wrong_range_is_noticed(tokenizer, monkeypatch):
    "And so is a wrong minimum in the code under test itself."
    monkeypatch.setattr("qcal_nb.observers.minmax.min_max", lambda observed: tuple(1.01 * v for v in min_max(observed)))
    data, recipe = make_batches(), dict(scheme="FP8", ignore=["lm_head"])
    assert unequal(
        reference(make_model("llama_gqa"), data, tokenizer, **recipe), ours(make_model("llama_gqa"), data, **recipe)
    )
