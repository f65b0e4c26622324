"""Names to ignore that spare nothing are said, and so are patterns that never end."""
import ast
import re
import warnings

import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model

from qcal_nb.analysis import choose, ranges
from qcal_nb.analysis import schemes_of_record
from qcal_nb.lifecycle import QuantizationModifier, match_report, schemes_by_module
from qcal_nb.modeling import check_quick, targets
from qcal_nb.pipelines import calibrate
from qcal_nb.records import record
from qcal_nb.session import Session

AROUND = {
    "by name": ("model.layers.0", "LlamaDecoderLayer", 7),
    "attention": ("model.layers.1.self_attn", "LlamaAttention", 4),
    "by class": ("LlamaMLP", "LlamaMLP", 6),
    "by pattern": ("re:model.layers.0$", "LlamaDecoderLayer", 7),
    "all of it": ("model", "LlamaModel", 14),
}


def ignoring(*names): return QuantizationModifier(scheme="FP8", ignore=["lm_head", *names])


@pytest.mark.parametrize("name, kind, inside", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("how", ["calibrate", "record", "session"])
def test_a_container_spares_nothing_and_that_is_said_with_what_does(how, name, kind, inside):
    model, recipe = make_model("llama_gqa"), ignoring(name)
    said = f"ignore '{name}' matches only {kind}: what is inside is quantized all the same ({inside} modules"
    with pytest.warns(UserWarning, match=re.escape(said)) as caught:
        if how == "calibrate": calibrate(model, make_batches(1), recipe, progress=False)
        if how == "record": record(model, make_batches(1), scheme=recipe, progress=False)
        if how == "session": Session(model, make_batches(1), recipe=recipe).initialize()
    advice = next(str(w.message) for w in caught if said in str(w.message)).rpartition("ignore ")[2]
    instead = ast.literal_eval(advice)
    left = schemes_by_module(make_model("llama_gqa"), ignoring(instead).resolved_config)
    assert len(left) == 14 - inside and not any(re.match(instead.removeprefix("re:"), n) for n in left)
    if not left: return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(make_model("llama_gqa"), make_batches(1), ignoring(instead), progress=False)


def test_the_report_tells_it_for_each_module_inside():
    rows = {row.module: row for row in match_report(make_model("llama_gqa"), ignoring("model.layers.0"))}
    inside = rows["model.layers.0.mlp.up_proj"]
    assert inside.matched
    assert inside.reason == "target 'Linear'; ignore 'model.layers.0' matches model.layers.0, not what is inside"
    assert rows["model.layers.1.mlp.up_proj"].reason == "target 'Linear'"


def test_what_spares_something_or_has_nothing_inside_is_not_talked_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = ignoring("LlamaRMSNorm", "re:.*mlp", "model.norm", "model.embed_tokens")
        calibrate(make_model("llama_gqa"), make_batches(1), recipe, progress=False)


ENDLESS = r"re:(\w+\.?)+!$"


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(targets, "SECONDS", 1.0)
    targets._is_quick.cache_clear()
    yield
    targets._is_quick.cache_clear()


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_patterns_that_never_end_are_refused_before_anything_changes(soon, field):
    fields = dict(scheme="FP8", targets=["Linear"], ignore=["lm_head"]) | {field: [ENDLESS]}
    model = make_model("llama_gqa")
    before, recipe = fingerprint(model), QuantizationModifier(**fields)
    made = record(model, make_batches(1), progress=False)
    for ask in (lambda: calibrate(model, make_batches(1), recipe, progress=False),
                lambda: record(model, make_batches(1), scheme=recipe, progress=False),
                lambda: match_report(model, recipe), lambda: schemes_of_record(made, recipe.resolved_config),
                lambda: Session(model, make_batches(1), recipe=recipe).initialize()):
        with pytest.raises(ValueError, match="takes more than 1 s with these"): ask()
    assert differences(before, fingerprint(model)) == []


def test_a_filter_that_never_ends_is_refused(soon):
    made = record(make_model("llama_gqa"), make_batches(1), progress=False)
    with pytest.raises(ValueError, match="takes more than 1 s"): choose(ranges(made), ENDLESS.removeprefix("re:"))


@pytest.mark.parametrize("pattern", [
    r".*\.layers\.(0|1)\..*(q|k|v)_proj$", r"(?:model\.)?layers\.\d+\.mlp\.(up|gate)_proj", r"^(?!.*lm_head).*$",
    r"(?i).*MLP.*", r".*.*.*up", r"(a+)+$"
])
def test_patterns_with_an_end_mean_what_they_meant(pattern):
    names = [name for name, _ in make_model("llama_gqa").named_modules()]
    check_quick([pattern], names)
    layer = torch.nn.Linear(1, 1)
    found = targets.Targets([f"re:{pattern}"], names)
    assert [bool(found.matching(name, layer)) for name in names] == [
        bool(re.match(pattern, name)) for name in names]


@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "a{99999999999}", "(", "[z-a]"])
def test_what_is_no_pattern_is_said(pattern):
    for make in (lambda: QuantizationModifier(scheme="FP8", targets=[f"re:{pattern}"]),
                 lambda: QuantizationModifier(scheme="FP8", ignore=[f"re:{pattern}"])):
        with pytest.raises(ValueError, match="is not a regular expression"): make()


@pytest.mark.parametrize("fields", [
    dict(scheme="W8A8", input_observer="nope"), dict(scheme="FP8_DYNAMIC", input_observer="nope"),
    dict(config_groups=dict(a=dict(targets=["Linear"], input_activations=dict(
        num_bits=8, dynamic=True, strategy="token", observer="nope"))))
])
def test_an_observer_that_does_not_exist_is_refused_where_it_would_have_no_effect_too(fields):
    with pytest.raises(ValueError, match="nope"): QuantizationModifier(**fields)


@pytest.mark.parametrize("bits", [-3, 0, 1, 17, 99])
@pytest.mark.parametrize("part", ["weights", "input_activations", "kv_cache_scheme"])
def test_bits_that_no_whole_number_has(bits, part):
    args = dict(num_bits=bits, type="int")
    fields = {part: args} if part == "kv_cache_scheme" else dict(scheme={part: args})
    with pytest.raises(ValueError, match=f"num_bits={bits} must be from 2 to 16"): QuantizationModifier(**fields)
