"""Recipes say the same after a round trip; one that is wrong names file and fault."""
import re

import pytest
import yaml
from compressed_tensors.quantization import QuantizationScheme
from helpers import make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.recipes import from_config, from_yaml, to_yaml
from tests.recipes.samples import FP8, INT8, modifiers, plain


@settings(deadline=None)
@given(modifiers())
def test_yaml_and_back(modifier):
    again = from_yaml(to_yaml(modifier))
    assert again.resolved_config == modifier.resolved_config
    assert plain(again.resolved_config) == plain(modifier.resolved_config)
    for field in ("nonfinite", "on_uncalibrated", "bypass_divisibility_checks"):
        assert getattr(again, field) == getattr(modifier, field)
    assert to_yaml(again) == to_yaml(modifier)


def test_a_recipe_holds_what_was_said():
    assert to_yaml(QuantizationModifier(**FP8)) == ("default_stage:\n  default_modifiers:\n    QuantizationModifier:\n"
                                                    "      scheme: FP8\n      ignore: [lm_head]\n")
    same = QuantizationModifier(ignore=["lm_head"], scheme="FP8", targets=["Linear"], nonfinite="raise")
    assert to_yaml(same) == to_yaml(QuantizationModifier(**FP8))


@pytest.mark.parametrize("text", [
    "QuantizationModifier: {scheme: FP8, ignore: [lm_head]}",
    "quant_stage:\n  quant_modifiers:\n    QuantizationModifier:\n      scheme: FP8\n      ignore: [lm_head]\n"
    "      start: 0.0\n",
    "quant_modifiers:\n  QuantizationModifier:\n    scheme: FP8\n    ignore: lm_head\n",
    '{"args": {}, "test_stage": {"run_type": "oneshot", "quant_modifiers": {"QuantizationModifier": {"scheme": '
    '"fp8", "ignore": ["lm_head"]}}}}',
    '{\n\t"QuantizationModifier": {"scheme": "FP8", "ignore": ["lm_head"]}\n}',
    "QuantizationModifier:\n  {targets: &t [Linear], scheme: {FP8: *t}, ignore: [lm_head], "
    "requires_calibration_data: true}\n",
])
def test_other_ways_to_write_it(text, tmp_path):
    expected = QuantizationModifier(**FP8).resolved_config
    path = tmp_path/"recipe.yaml"
    path.write_text(text)
    for source in (text, path, str(path)): assert from_yaml(source).resolved_config == expected


BAD_RECIPES = {
    "other modifiers": ("s_stage: {q_modifiers: {GPTQModifier: {scheme: W4A16}, AWQModifier: }}",
                        "asks for AWQModifier, GPTQModifier; supported is QuantizationModifier"),
    "no modifier": ("default_stage: {default_modifiers: {}}", "holds no QuantizationModifier, it must hold one"),
    "two of them": (
        (
            "a_stage: {m_modifiers: {QuantizationModifier: {scheme: FP8}}}\n"
            "b_stage: {m_modifiers: {QuantizationModifier: {scheme: FP8}}}"
        ),
        "holds 2 QuantizationModifiers, it must hold one; put their targets side by side",
    ),
    "the same key twice": (
        "m_modifiers:\n  QuantizationModifier: {scheme: FP8}\n  QuantizationModifier: {scheme: W8A8}",
        "QuantizationModifier appears twice",
    ),
    "twice in JSON": ('{"QuantizationModifier": {"scheme": "FP8", "scheme": "W8A8"}}', "scheme appears twice"),
    "not YAML": ("default_stage: {default_modifiers: [", "cannot be read: while parsing"),
    "a list": ("- QuantizationModifier\n- b", "holds list, not keys and values"),
    "a tag": (
        "QuantizationModifier: {scheme: !!python/object/apply:os.system [ls]}",
        "could not determine a constructor for the tag",
    ),
    "unknown field": ("QuantizationModifier: {shceme: FP8}", "shceme is no field of a recipe"),
    "unknown preset": ("QuantizationModifier: {scheme: FP9}", "scheme='FP9' is not a preset"),
    "unknown observer": (
        "QuantizationModifier: {scheme: FP8, input_observer: minmacks}", "observer='minmacks' is unknown"
    ),
    "an observer to import": (
        "QuantizationModifier: {scheme: FP8, input_observer: 'evil.py:Run'}", "looked up by name and never imported"
    ),
    "a bad number": ("QuantizationModifier: {config_groups: {g: {targets: [Linear], weights: {num_bits: x}}}}",
                     "weights.num_bits: Input should be a valid integer"),
    "unknown level": ("default: {QuantizationModifier: {scheme: FP8}}", "'default' is neither a stage (`..._stage:`)"),
    "a list of modifiers": ("quant_modifiers: [{QuantizationModifier: {scheme: FP8}}]", "'quant_modifiers' is neither"),
    "no fields": ("QuantizationModifier: FP8\n", "QuantizationModifier must hold fields, got 'FP8'"),
    "a field without a name": ("QuantizationModifier: {1: 2}", "1 is not the name of a field"),
    "unknown in our section": (
        "QuantizationModifier: {scheme: FP8}\nqcal_nb: {nonfinit: skip}", "must hold some of nonfinite, on_uncalibrated"
    ),
    "a bomb": ("l0: &l0 [x, x]\n" + "".join(f"l{i + 1}: &l{i + 1} [{', '.join([f'*l{i}'] * 10)}]\n" for i in range(8)),
               "expand to more than 1,000,000 values"),
    "endless": ("a_stage: &a {b_stage: *a}", "expand to more than 1,000,000 values"),
    "deep": ("{" * 3000, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe_names_file_and_fault(case, tmp_path):
    text, words = BAD_RECIPES[case]
    path = tmp_path/"some recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as error: from_yaml(path)
    assert "some recipe.yaml" in str(error.value) and type(error.value) is ValueError


def test_sources_that_are_none(tmp_path):
    with pytest.raises(TypeError, match="must be a path or the text of a recipe, got int"): from_yaml(3)
    with pytest.raises(FileNotFoundError, match="no_such.yaml"): from_yaml("no_such.yaml")
    (tmp_path/"binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary.yaml is not text"): from_yaml(tmp_path/"binary.yaml")
    with pytest.raises(TypeError, match="got LlamaForCausalLM; for a model use recipe_of"):
        to_yaml(make_model("llama_gqa"))
    with pytest.raises(ValueError, match="a value that YAML cannot"):
        to_yaml(QuantizationModifier(config_groups={"g": QuantizationScheme(targets=["Linear"], input_activations=dict(
            **INT8, strategy="tensor", observer="minmax", observer_kwargs={"triton_error_buffer": object()}))}))


KEYS = [
    "g", "targets", "weights", "input_activations", "num_bits", "strategy", "observer", "observer_kwargs", "group_size",
    "format"
]
WORDS = st.sampled_from(["Linear", "re:(", "FP8", "minmax", "tensor", "", "x:y"])
GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | WORDS,
    max_leaves=12,
    extend=lambda inner: (st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(
    st.sampled_from(["config_groups", "scheme", "targets", "ignore", "kv_cache_scheme", "observer", "weight_observer"]),
    GARBAGE,
))
def test_whatever_stands_in_a_file_is_a_modifier_or_a_valueerror(fields):
    for read, source in (
        (from_yaml, yaml.safe_dump({"QuantizationModifier": fields}) + "\n"),
        (from_config, {"quantization_config": fields}),
    ):
        try: assert isinstance(read(source), QuantizationModifier)
        except ValueError as error: assert type(error) is ValueError and str(error).startswith("the ")
