"""What a checkpoint holds, what is refused, and that saving leaves neither a trace nor half a folder."""
import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from helpers import differences, make_batches, make_model, outputs
from safetensors.torch import load_file

from qcal_nb.lifecycle import (
    Event,
    EventType,
    LifecycleError,
    QuantizationModifier,
    State,
    phase_of,
    reset_quantization,
)
from qcal_nb.models import load_tiny_llama
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import from_config, from_yaml, override, recipe_of, save_quantized, to_config
from tests.recipes.samples import FP8, KV, UP, calibrated, ids, saved, saved_mixture, state_of


def test_what_was_not_reached_is_saved_as_it_was_and_ignored(tmp_path):
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    modifier.initialize_quantization(model); modifier.start_calibration(model)
    mlp = model.model.layers[1].mlp
    mlp.forward = torch.zeros_like
    with torch.no_grad(): model(ids())
    del mlp.forward
    modifier.on_event(State(model), Event(EventType.CALIBRATION_END), on_uncalibrated="skip")
    a, b, unfit = saved(model, tmp_path/"x")
    ignore = json.loads((tmp_path/"x"/"config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["lm_head", *(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down"))]
    assert torch.equal(a, b) and unfit == {}
    assert to_config(model)["ignore"] == ignore


def test_what_a_checkpoint_holds(tmp_path):
    model, tokenizer = load_tiny_llama()
    modifier = override(QuantizationModifier(**FP8), {UP: {"input": ("minmax", {"averaging_constant": 0.2})}})
    calibrate(model, make_batches(2, 1024), modifier, progress=False)
    folder = save_quantized(model, tmp_path/"x", tokenizer)
    assert folder == tmp_path/"x" and [p.name for p in tmp_path.iterdir()] == ["x"]
    assert {p.name for p in folder.iterdir()} >= {"config.json", "model.safetensors", "recipe.yaml", "tokenizer.json"}
    section = json.loads((folder/"config.json").read_text())["quantization_config"]
    assert section | {"version": ""} == to_config(model) | {"version": ""}
    expected = dict(
        quant_method="compressed-tensors", format="float-quantized", ignore=["lm_head"],
        quantization_status="compressed", kv_cache_scheme=None
    )
    assert {k: section[k] for k in expected} == expected
    own = section["config_groups"]["group_1"]
    assert own["targets"] == [UP] and own["input_activations"]["observer_kwargs"] == {"averaging_constant": 0.2}
    assert from_config(folder).resolved_config == from_yaml(
        folder/"recipe.yaml"
    ).resolved_config == modifier.resolved_config
    tensors = load_file(folder/"model.safetensors")
    assert tensors[f"{UP}.weight"].dtype == torch.float8_e4m3fn and "lm_head.weight" not in tensors
    assert not [n for n in tensors if n.endswith("zero_point")]
    scales = {n: p for n, p in model.named_parameters() if n.endswith("_scale")}
    assert len(scales) == 56 and all(torch.equal(tensors[n], p) for n, p in scales.items())
    again = save_quantized(model, tmp_path/"again", tokenizer)
    assert (again/"model.safetensors").read_bytes() == (folder/"model.safetensors").read_bytes()


@pytest.mark.parametrize("recipe", [
    dict(scheme="FP8", kv_cache_scheme=KV, ignore=["lm_head", "re:.*layers.0.*"]),
    dict(config_groups={"attention": QuantizationScheme(targets=["re:.*layers.1.self_attn$"], input_activations=KV)})])
def test_a_cache_that_is_only_partly_quantized_is_not_saved(recipe, tmp_path):
    "On loading every attention module would be hooked, and some would have scales that nobody wrote."
    model = make_model("llama_gqa")
    calibrate(model, make_batches(), QuantizationModifier(**recipe), progress=False)
    with pytest.raises(ValueError, match=r"1 of 2 attention modules have no scales \(model.layers.0.self_attn\)"):
        save_quantized(model, tmp_path/"x")
    assert not (tmp_path/"x").exists()


def test_after_saving_the_model_can_be_had_back(tmp_path):
    model = make_model("llama_tied")
    before, logits = state_of(model), outputs(model, make_batches(1)[0])
    calibrate(model, make_batches(), QuantizationModifier(scheme="FP8"), progress=False)
    save_quantized(model, tmp_path/"x")
    reset_quantization(model)
    assert differences(before, state_of(model)) == [] and torch.equal(outputs(model, make_batches(1)[0]), logits)


def test_nothing_is_copied_but_small_weights():
    "What is not quantized goes to the file from where it is; what is quantized becomes smaller."
    from qcal_nb.recipes.checkpoint import _checkpoint_tensors
    model = calibrated(scheme="W4A16", ignore=["lm_head"])
    state = _checkpoint_tensors(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    fresh = sum(t.nbytes for t in state.values() if t.untyped_storage().data_ptr() not in own)
    assert 0 < fresh < 0.15 * sum(p.nbytes for p in model.parameters())


class Broken:
    def save_pretrained(self, folder):
        (Path(folder)/"tokenizer.json").write_text("half of it")
        raise OSError("disk full")


def test_a_failure_leaves_neither_a_folder_nor_a_trace(tmp_path, monkeypatch):
    model = calibrated(scheme="W4A16", ignore=["lm_head"])
    before = state_of(model)
    with pytest.raises(OSError, match="disk full"): save_quantized(model, tmp_path/"x", Broken())
    assert list(tmp_path.iterdir()) == [] and differences(before, state_of(model)) == []
    monkeypatch.setattr(
        "transformers.modeling_utils.safe_save_file", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt): save_quantized(model, tmp_path/"x")
    assert list(tmp_path.iterdir()) == [] and differences(before, state_of(model)) == []
    monkeypatch.undo()
    (tmp_path/"x").mkdir()                                                # an empty folder will do
    save_quantized(model, tmp_path/"x")
    assert (tmp_path/"x"/"config.json").exists()


def test_nothing_is_overwritten(tmp_path):
    model = calibrated(**FP8)
    (tmp_path/"kept").write_text("mine")
    for path in (tmp_path, tmp_path/"kept"):
        with pytest.raises(ValueError, match="exists and is not an empty folder; choose another"):
            save_quantized(model, path)
    assert (tmp_path/"kept").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_only_a_calibrated_model_of_transformers_has_a_checkpoint(tmp_path):
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    with pytest.raises(LifecycleError, match="cannot save this model: it is not quantized; calibrate it first"):
        save_quantized(model, tmp_path/"x")
    modifier.initialize_quantization(model)
    with pytest.raises(LifecycleError, match="it is initialized, its scales are empty; calibrate it first"):
        save_quantized(model, tmp_path/"x")
    assert phase_of(model) == "initialized" and recipe_of(model).resolved_config == modifier.resolved_config
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        save_quantized("gpt2", tmp_path/"x")
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    calibrate(net, [torch.ones(2, 8)], QuantizationModifier(scheme="FP8"), progress=False)
    with pytest.raises(ValueError, match="a Sequential has no checkpoint format, only models of transformers do"):
        save_quantized(net, tmp_path/"x")
    assert to_config(net)["config_groups"]["group_0"]["format"] == "float-quantized"
    plain_model = make_model("llama_gqa")
    with pytest.warns(UserWarning, match="quantizes nothing"):
        calibrate(plain_model, None, QuantizationModifier(scheme="UNQUANTIZED"), progress=False)
    with pytest.raises(ValueError, match="nothing of this model is quantized"):
        save_quantized(plain_model, tmp_path/"x")
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_that_has_no_format_that_loads(tmp_path):
    model = calibrated(scheme={"NVFP4A16": ["Embedding"]})
    with pytest.raises(ValueError, match=r"model.embed_tokens: weights of fp4, .* cannot be stored as naive-quantized"):
        save_quantized(model, tmp_path/"x")


def test_a_recipe_is_independent_of_the_model_it_came_from():
    model = calibrated(**FP8)
    recipe = recipe_of(model)
    before = deepcopy(recipe.resolved_config)
    reset_quantization(model)
    assert recipe.resolved_config == before == QuantizationModifier(**FP8).resolved_config


def test_what_transformers_will_not_do_for_experts_is_said(tmp_path):
    _, _, warned = saved_mixture("mixtral", dict(scheme="FP8"), tmp_path/"x")
    assert len(warned) == 1 and "no place for scales of what enters them" in warned[0]
