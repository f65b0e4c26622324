"""An observer chosen for one module wins over that of its group, in a recipe and on a model."""
import re

import pytest
from helpers import make_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.recipes import from_config, from_yaml, override, recipe_of, to_config, to_yaml
from tests.recipes.samples import DOWN, FP8, TARGETS, UP, modifiers

LINEAR = TARGETS.map(lambda targets: [*dict.fromkeys(["Linear", *targets])])


@settings(deadline=None)
@given(modifiers(LINEAR), st.data(), st.sampled_from(["static_minmax", ("minmax", {"averaging_constant": 0.25})]))
def test_overrides_and_back(modifier, data, choice):
    groups = modifier.resolved_config.config_groups.values()
    def has_scales(part):
        return all((args := getattr(s, part)) is not None and args.dynamic is not True for s in groups)
    possible = [
        (base, part) for base, part in (("input", "input_activations"), ("weight", "weights")) if has_scales(part)
    ]
    assume(possible)
    base_name, part = data.draw(st.sampled_from(possible))
    before = modifier.model_dump_json(), to_yaml(modifier)
    new = override(modifier, {UP: {base_name: choice}})
    assert (modifier.model_dump_json(), to_yaml(modifier)) == before
    mine = [s for s in new.resolved_config.config_groups.values() if UP in s.targets]
    assert len(mine) == 1 and getattr(mine[0], part).observer == (choice if isinstance(choice, str) else choice[0])
    assert from_yaml(to_yaml(new)).resolved_config == from_config(to_config(new)).resolved_config == new.resolved_config


def observer_names(model):
    return {n: type(m.input_observer).__name__ for n, m in model.named_modules() if hasattr(m, "input_observer")}


@pytest.mark.parametrize(
    "targets", [["Linear"], ["re:.*(mlp|attn).*"], ["re:.*_proj", "Linear"], [UP, "Linear"]], ids=str
)
@pytest.mark.parametrize(
    "asked",
    [
        {UP: {"input": "memoryless_minmax"}}, {"re:.*layers.0.*up_proj": {"input": "memoryless_minmax"}},
        {"re:.*": {"input": "minmax"}, UP: {"input": "memoryless_minmax"}},
        {UP: {"input": "memoryless_minmax"}, "Linear": {"input": "minmax"}}
    ],
    ids=str,
)
def test_an_override_wins_whatever_the_targets(targets, asked):
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(scheme="FP8", targets=targets, ignore=["lm_head"])
    new = override(modifier, asked, model)
    new.initialize_quantization(model); new.start_calibration(model)
    names, rest = observer_names(model), "MinMaxObserver" if len(asked) > 1 else "StaticMinMaxObserver"
    assert names.pop(UP) == "MemorylessMinMaxObserver" and set(names.values()) == {rest} and len(names) == 13
    assert recipe_of(model).resolved_config == new.resolved_config


def test_an_override_of_an_override_replaces_it():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    once = override(modifier, {UP: {"input": "minmax"}, DOWN: {"input": "minmax"}})
    twice = override(once, {UP: {"input": ("minmax", {"averaging_constant": 0.5})}}, model)
    groups = twice.resolved_config.config_groups
    assert sorted(s.targets for s in groups.values()) == [["Linear"], [UP], [DOWN]]
    assert len(once.resolved_config.config_groups) == 2
    back = override(twice, {UP: {"input": "minmax"}})
    assert sorted(sorted(s.targets) for s in back.resolved_config.config_groups.values()) == [
        ["Linear"], sorted([UP, DOWN])
    ]


BAD_OVERRIDES = {
    "unknown module": (
        {"model.layers.9.mlp.up_proj": {"input": "minmax"}}, True,
        "'model.layers.9.mlp.up_proj' matches no module that is quantized"
    ),
    "ignored": ({"lm_head": {"input": "minmax"}}, True, "'lm_head' matches no module that is quantized"),
    "ignored, without a model": ({"lm_head": {"input": "minmax"}}, False, "it is ignored by 'lm_head'"),
    "pattern, without a model": ({"re:.*up_proj": {"input": "minmax"}}, False, "is a pattern; pass model="),
    "unknown base name": ({UP: {"inputs": "minmax"}}, False, "'inputs' must be one of 'weight', 'input', 'output'"),
    "no such tensor": (
        {UP: {"output": "minmax"}}, False, "its output has no observer that could be replaced: not quantized"
    ),
    "unknown observer": ({UP: {"input": "minmacks"}}, False, "observer='minmacks' is unknown"),
    "unknown argument": ({UP: {"input": ("minmax", {"avg": 1})}}, False, "avg=1 is unknown to MinMaxObserver"),
    "not a choice": ({UP: {"input": 3}}, False, "input=3 must be an observer's name, or (name, arguments)"),
}


@pytest.mark.parametrize("case", BAD_OVERRIDES)
def test_a_bad_override(case):
    asked, with_model, words = BAD_OVERRIDES[case]
    with pytest.raises(ValueError, match=re.escape(words)):
        override(QuantizationModifier(**FP8), asked, make_model("llama_gqa") if with_model else None)


def test_a_name_that_could_be_of_two_classes_needs_the_model():
    modifier = QuantizationModifier(scheme={"FP8": ["Linear"], "W8A16": ["Embedding"]})
    with pytest.raises(ValueError, match="depends on its class; pass model= as well"):
        override(modifier, {UP: {"input": "minmax"}})
    new = override(modifier, {UP: {"input": "minmax"}}, make_model("llama_gqa"))
    assert next(s for s in new.resolved_config.config_groups.values() if UP in s.targets).weights.type == "float"
