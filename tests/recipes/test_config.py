"""Configs say the same after a round trip; one that is wrong names file and fault."""
import json
import re

import pytest
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from hypothesis import given, settings

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.recipes import from_config, from_yaml, override, to_config, to_yaml
from tests.recipes.samples import FP8, UP, modifiers, plain


@settings(deadline=None)
@given(modifiers())
def test_json_and_back(modifier):
    again = from_config(json.loads(json.dumps(to_config(modifier))))
    assert again.resolved_config == modifier.resolved_config
    assert plain(again.resolved_config) == plain(modifier.resolved_config)
    for source in (again.resolved_config, json.dumps({"quantization_config": to_config(modifier)})):
        assert from_config(source).resolved_config == modifier.resolved_config
    assert (
        QuantizationConfig.model_validate(to_config(modifier)).config_groups == modifier.resolved_config.config_groups
    )


@pytest.mark.parametrize("scheme", [dict(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True),
                                    dict(num_bits=4, type="int", strategy="attn_head", observer="static_minmax")])
def test_the_kv_cache_is_carried_both_ways(scheme):
    modifier = QuantizationModifier(**FP8, kv_cache_scheme=scheme)
    new = override(modifier, {UP: {"input": "minmax"}})
    for again in (from_yaml(to_yaml(modifier)), from_config(json.loads(json.dumps(to_config(modifier)))), new):
        assert again.kv_cache_scheme == again.resolved_config.kv_cache_scheme == QuantizationArgs(**scheme)


BAD_CONFIGS = {
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quant_method is 'gptq'; only 'compressed-tensors' can be read",
    ),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "quant_method is 'bitsandbytes'",
    ),
    "not quantized": ({"model_type": "llama"}, "holds no config_groups: this is not the config of a quantized model"),
    "no groups": ({"quantization_config": {"quant_method": "compressed-tensors"}}, "holds no config_groups"),
    "a list": ({"quantization_config": [1]}, "must hold keys and values, got [1]"),
    "groups in a list": ({"quantization_config": {"config_groups": [1]}}, "config_groups"),
    "no targets": ({"quantization_config": {"config_groups": {"g": {"weights": {}}}}}, "targets: Field required"),
    "a misspelt field": (
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bit": 8}}}}, "weights.num_bit: Extra inputs"
    ),
    "an observer to import": (
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"observer": "a/b.py:C"}}}}, "never imported"
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_names_file_and_fault(case, tmp_path):
    config, words = BAD_CONFIGS[case]
    (tmp_path/"config.json").write_text(json.dumps(config))
    for source in (tmp_path, tmp_path/"config.json"):
        with pytest.raises(ValueError, match=re.escape(words)) as error: from_config(source)
        assert "config.json" in str(error.value)


def test_damaged_config_files(tmp_path):
    (tmp_path/"config.json").write_text('{"quantization_config": {"config_groups": ')
    with pytest.raises(ValueError, match="config.json cannot be read"): from_config(tmp_path)
    with pytest.raises(TypeError, match="must be a dict, a config or a path, got int"): from_config(3)
    with pytest.raises(ValueError, match="the config cannot be read"): from_config("{" * 3000)
    with pytest.raises(FileNotFoundError): from_config(tmp_path/"elsewhere"/"config.json")


def test_left_overs_of_other_tools():
    fp8 = QuantizationModifier(**FP8)
    section = to_config(fp8) | {
        "version": "0.9", "global_compression_ratio": 1.5, "sparsity_config": {}, "transform_config": None
    }
    assert from_config(section).resolved_config == fp8.resolved_config
    for left in ({"sparsity_config": {"format": "sparse-24-bitmask"}}, {"transform_config": {"config_groups": {}}}):
        with pytest.warns(UserWarning, match=next(iter(left))): again = from_config(section | left)
        assert again.resolved_config == fp8.resolved_config


def test_a_preset_by_name_in_a_config():
    config = {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}, "ignore": None}
    read = from_config({"compression_config": config}).resolved_config
    said = QuantizationModifier(scheme="W4A16").resolved_config
    assert read.config_groups == {"W4A16": said.config_groups["group_0"]}


def test_a_section_one_level_down_is_found_and_other_formats_are_named(tmp_path):
    section = to_config(QuantizationModifier(scheme="FP8", ignore=["lm_head"]))
    wanted = from_config(section).resolved_config
    for config in (dict(text_config=dict(quantization_config=section), vision_config={}),
                   dict(model_type="x", llm_config=dict(compression_config=section))):
        path = tmp_path/"config.json"
        path.write_text(json.dumps(config))
        for source in (config, json.dumps(config), path, tmp_path): assert from_config(source).resolved_config == wanted
    with pytest.raises(ValueError, match="the config holds 2 quantization_configs, one for each part of the model"):
        from_config(dict(a=dict(quantization_config=section), b=dict(quantization_config=section)))
    for foreign in (dict(producer=dict(name="modelopt"), quantization=dict(quant_algo="FP8")),
                    dict(dim=64, quantization=dict(qformat_weight="fp8_e4m3", qscheme_act="TENSOR"))):
        said = "under 'quantization' how the model is quantized, as ModelOpt and Mistral do"
        with pytest.raises(ValueError, match=said): from_config(foreign)
    with pytest.raises(ValueError, match="this is not the config of a quantized model"): from_config(dict(dim=64))
