"""What we write down, llm-compressor reads as the same, and the other way round; run by its `oneshot` it gives our
scales and our checkpoint."""
import json
import os
from copy import deepcopy
from itertools import count

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from helpers import make_batches, make_model, qparams
from safetensors.torch import load_file

from qcal_nb.evaluate import allocate
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import load_tiny_llama
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import from_config, from_yaml, override, save_quantized, to_yaml
from qcal_nb.records import record
from qcal_nb.schemes import preset

os.environ["HF_HUB_OFFLINE"] = "1"
pytestmark = pytest.mark.parity
llmcompressor = pytest.importorskip("llmcompressor", reason="no reference: pip install -e '.[dev]'")

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
FP8 = dict(scheme="FP8", ignore=["lm_head"])


def their_recipe(source):
    from llmcompressor.recipe import Recipe
    return Recipe.create_instance(source)


def their_modifier(**fields):
    from llmcompressor.modifiers.quantization import QuantizationModifier as Reference
    return Reference(**deepcopy(fields))


def plain(modifier): return json.loads(modifier.resolved_config.model_dump_json())


def oneshot(model, data, tokenizer, recipe, folder, **options):
    model.config.save_pretrained(folder)  # oneshot reads the config from disk again
    model.config._name_or_path = str(folder)
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    llmcompressor.oneshot(
        model=model, recipe=str(recipe), processor=tokenizer, dataset=loader, pipeline="basic", **options
    )
    return model


def modifiers():
    "Every form of a recipe; observers that the reference has."
    fields = [dict(scheme=name, ignore=["lm_head"]) for name in [*PRESET_SCHEMES, "INT8_STATIC"]]
    fields += [
        dict(scheme="FP8", targets=["re:.*mlp.*", "lm_head"], bypass_divisibility_checks=True),
        dict(scheme={"FP8": ["re:.*mlp.*"], "W4A16": "re:.*attn.*"}, ignore=["re:.*down_proj"]),
        dict(scheme={"FP8": ["re:.*mlp.*"], "INT8_STATIC": ["re:.*attn.*"]}),
        dict(scheme="FP8", input_observer="minmax", weight_observer="minmax"),
        dict(scheme="W8A8", observer={"weights": "MINMAX", "input": "minmax"}),
        dict(scheme="FP8", nonfinite="skip", on_uncalibrated="skip"),
        dict(scheme=preset("MXFP4", ["Linear"])),
        dict(scheme=dict(weights=dict(num_bits=4, strategy="channel"))),
        dict(ignore=["lm_head"]),
        dict(config_groups={"W4A16": ["Linear"]}),
        dict(config_groups={"a": preset("NVFP4", [UP]), "b": preset("MXFP8", ["Linear"])}),
        dict(config_groups={
            "g": QuantizationScheme(
                targets=["Linear"],
                format="naive-quantized",
                weights=dict(num_bits=8, type="float", strategy="tensor"),
                output_activations=dict(
                    num_bits=8, strategy="tensor", symmetric=False, observer_kwargs={"averaging_constant": 0.3}
                ),
            )
        }),
    ]
    made = [QuantizationModifier(**f) for f in fields]
    choices = {UP: {"input": ("minmax", {"averaging_constant": 0.5})}, DOWN: {"weight": "minmax"}}
    return [*made, override(made[list(PRESET_SCHEMES).index("FP8")], choices)]


@pytest.mark.parametrize("modifier", modifiers(), ids=count())
def test_they_read_what_we_write(modifier):
    text = to_yaml(modifier)
    theirs = their_recipe(text).modifiers
    assert len(theirs) == 1 and plain(theirs[0]) == plain(modifier)
    for name, scheme in modifier.resolved_config.config_groups.items():  # what the dump of a config leaves out
        other = theirs[0].resolved_config.config_groups[name]
        for part in ("weights", "input_activations"):
            assert getattr(getattr(other, part), "zp_dtype", None) == getattr(getattr(scheme, part), "zp_dtype", None)


@pytest.mark.parametrize("modifier", modifiers(), ids=count())
def test_we_read_what_they_write(modifier):
    "Their reader makes our text theirs, their writer makes a text of it; it holds every field, said or not."
    theirs = their_recipe(to_yaml(modifier))
    assert plain(from_yaml(theirs.yaml())) == plain(theirs.modifiers[0]) == plain(modifier)


def test_several_stages_and_other_modifiers_are_told_apart():
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.recipe import Recipe
    with pytest.raises(ValueError, match="asks for GPTQModifier; supported is QuantizationModifier"):
        from_yaml(Recipe.create_instance([GPTQModifier(scheme="W4A16")]).yaml())


RUN = {
    "FP8": QuantizationModifier(**FP8),
    "INT8_STATIC": QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"]),
    "two presets": QuantizationModifier(scheme={"FP8": ["re:.*mlp.*"], "W8A8": ["re:.*attn.*"]}),
    "observers": QuantizationModifier(**FP8, input_observer="minmax", weight_observer="minmax"),
    "overrides": override(QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"]), {
        UP: {"input": "static_minmax"}, DOWN: {"input": ("minmax", {"averaging_constant": 0.5})},
        "model.layers.1.mlp.up_proj": {"input": "memoryless_minmax"}}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", RUN)
def test_a_recipe_of_ours_gives_our_scales(case, dtype, tokenizer, tmp_path):
    modifier, data = RUN[case], make_batches(4)
    (tmp_path/"recipe.yaml").write_text(to_yaml(modifier))
    theirs = oneshot(make_model("llama_gqa", dtype), data, tokenizer, tmp_path/"recipe.yaml", tmp_path)
    mine = calibrate(make_model("llama_gqa", dtype), data, from_yaml(tmp_path/"recipe.yaml"), progress=False)
    a, b = qparams(theirs), qparams(mine)
    assert a and a.keys() == b.keys()
    assert [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])] == []
    assert {n: m.quantization_scheme for n, m in theirs.named_modules() if hasattr(m, "quantization_scheme")} == {
        n: m.quantization_scheme for n, m in mine.named_modules() if hasattr(m, "quantization_scheme")}


def test_overridden_scales_differ():
    "What the test above compares is not the same with and without overrides."
    plain_model, other = (calibrate(make_model("llama_gqa"), make_batches(4), m, progress=False) for m in (
        QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"]), RUN["overrides"]))
    a, b = qparams(plain_model), qparams(other)
    assert {n for n in a if not torch.equal(a[n], b[n])} == {
        f"{n}.input_scale" for n in (UP, DOWN, "model.layers.1.mlp.up_proj")
    }


@pytest.mark.parametrize("scheme", ["FP8", "INT8_STATIC", "W8A8", "W4A16", "W4A16_ASYM", "NVFP4", "MXFP4", "FP8_BLOCK"])
def test_our_checkpoint_is_theirs(scheme, tokenizer, tmp_path):
    "Every tensor bit for bit; of the config what anybody reads in it."
    modifier, data = QuantizationModifier(scheme=scheme, ignore=["lm_head"]), make_batches(3, 1024)
    (tmp_path/"recipe.yaml").write_text(to_yaml(modifier))
    oneshot(
        load_tiny_llama(torch.bfloat16)[0], data, tokenizer, tmp_path/"recipe.yaml", tmp_path,
        output_dir=str(tmp_path/"theirs")
    )
    save_quantized(
        calibrate(load_tiny_llama(torch.bfloat16)[0], data, modifier, progress=False), tmp_path/"ours", tokenizer
    )
    a, b = (load_file(tmp_path/who/"model.safetensors") for who in ("theirs", "ours"))
    assert a.keys() == b.keys() and {n: t.dtype for n, t in a.items()} == {n: t.dtype for n, t in b.items()}
    assert [n for n in a if not torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))] == []
    theirs, ours = (
        json.loads((tmp_path/who/"config.json").read_text())["quantization_config"] for who in ("theirs", "ours")
    )
    for key in ("quant_method", "format", "ignore", "kv_cache_scheme", "quantization_status", "version"):
        assert theirs[key] == ours[key], key
    assert plain(from_config(tmp_path/"theirs")) == plain(from_config(tmp_path/"ours")) == plain(modifier)
    assert plain(from_yaml(tmp_path/"theirs"/"recipe.yaml")) == plain(modifier)


def test_a_mixture_for_a_budget_is_calibrated_alike(tmp_path):
    "The recipe that `allocate` leaves, read by llm-compressor from YAML."
    model, tokenizer = load_tiny_llama(torch.bfloat16)
    data = make_batches(5, vocab=200)
    made = record(model, data, gradients=True, progress=False)
    mixture = {"W4A16": preset("W4A16"), "FP8": "FP8", "unquantized": None}
    found = allocate(made, model, "2.4 MB", mixture)
    assert found.table.scheme.nunique() > 1
    (tmp_path/"recipe.yaml").write_text(to_yaml(found.recipe))
    theirs = oneshot(load_tiny_llama(torch.bfloat16)[0], data, tokenizer, tmp_path/"recipe.yaml", tmp_path)
    ours = calibrate(load_tiny_llama(torch.bfloat16)[0], data, found.recipe, progress=False)
    mine, reference = qparams(ours), qparams(theirs)
    assert mine.keys() == reference.keys() and len(mine) > 28
    assert all(torch.equal(value, reference[name]) for name, value in mine.items())
