"""`group_size=` beside a preset, wherever a scheme is taken: the same recipe as the one written out."""
import re

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import differences, fingerprint

from qcal_nb import Workbench, load_tiny_llama, record
from qcal_nb.cli.commands import modifier_from_options, parser
from qcal_nb.evaluate import compare_observers, compare_schemes, named_schemes, sensitivity
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import from_yaml, to_yaml
from qcal_nb.schemes import adjusted
from qcal_nb.session import Session

WRITTEN_OUT = QuantizationArgs(
    num_bits=4, symmetric=True, strategy="group", group_size=64, observer="memoryless_minmax"
)
PAIR = ("W4A16", {"group_size": 64})


@pytest.fixture(scope="module")
def tiny(): return load_tiny_llama()


def weights_of(modifier): return modifier.resolved_config.config_groups["group_0"].weights


def options(words): return parser().parse_args(["calibrate", "tiny", "--out", "o", *words])


def test_the_recipe_is_the_one_written_out():
    written = QuantizationModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=WRITTEN_OUT)}
    )
    for short in (QuantizationModifier(scheme="W4A16", group_size=64), QuantizationModifier(scheme=PAIR)):
        assert short.resolved_config == written.resolved_config
        assert from_yaml(to_yaml(short)).resolved_config == written.resolved_config
        assert short.model_copy().scheme == PAIR


def test_other_fields_go_to_the_weights():
    modifier = QuantizationModifier(scheme="W4A4", group_size=32, symmetric=False, num_bits=3)
    scheme = modifier.resolved_config.config_groups["group_0"]
    assert (scheme.weights.num_bits, scheme.weights.symmetric, scheme.weights.group_size) == (3, False, 32)
    assert scheme.input_activations == QuantizationModifier(
        scheme="W4A4"
    ).resolved_config.config_groups["group_0"].input_activations


def test_a_group_size_goes_to_every_part_with_groups():
    scheme = QuantizationModifier(scheme="NVFP4", group_size=32).resolved_config.config_groups["group_0"]
    assert scheme.weights.group_size == scheme.input_activations.group_size == 32


def test_wherever_a_scheme_is_taken(tiny):
    model, tokenizer = tiny
    texts = calibration_texts()[:1]
    given = dict(tokenizer=tokenizer, max_length=16, progress=False)
    made = [
        Session(model, texts, tokenizer, "W4A16", group_size=64).modifier,
        modifier_from_options(options(["--scheme", "W4A16", "--group-size", "64"])),
        named_schemes(["W4A16"], group_size=64)["W4A16, group_size=64"],
        named_schemes(PAIR)["W4A16, group_size=64"],
        named_schemes(dict(mine=PAIR))["mine"],
    ]
    bench = Workbench(model, texts, tokenizer, "W4A16", group_size=64)
    made.append(bench.session.modifier)
    bench.close()
    assert [weights_of(modifier) for modifier in made] == [WRITTEN_OUT] * len(made)
    assert record(
        model, texts, scheme="W4A16", group_size=64, **given
    ).about.config["config_groups"]["group_0"]["weights"]["group_size"] == 64
    def sqnr(scheme, **more):
        return compare_observers(
            model, None, ["memoryless_minmax"], scheme=scheme, base_names=["weight"], progress=False, **more
        ).sqnr_db.mean()
    assert sqnr("W4A16", group_size=64) == sqnr(PAIR) > sqnr("W4A16")
    rows = compare_schemes(model, None, ["W4A16", "FP8_DYNAMIC"], group_size=64, eval_data=texts, **given)
    assert list(rows.scheme) == ["original", "W4A16, group_size=64", "FP8_DYNAMIC"]
    losses = sensitivity(model, None, "W4A16", group_size=64, eval_data=texts, **given)
    assert losses.attrs["kl_quantized"] == rows.kl[1]


def test_sessions_can_be_configured_with_a_pair(tiny):
    session = Session(*tiny[:1], calibration_texts()[:1], tiny[1])
    session.configure(scheme=PAIR)
    assert weights_of(session.modifier) == WRITTEN_OUT
    assert "configure(scheme=('W4A16', {'group_size': 64}))" in session.script()


BAD = {
    "no groups": (
        dict(scheme="FP8", group_size=64),
        "group_size=64: nothing in preset 'FP8' has groups; presets with groups are W4A16_ASYM,",
    ),
    "no preset": (dict(group_size=64), "group_size=64 goes beside a preset's name, as scheme='W4A16'; got scheme=None"),
    "a scheme": (dict(scheme=dict(W4A16=["Linear"]), group_size=64), "group_size=64 goes beside a preset's name"),
    "zero": (dict(scheme="W4A16", group_size=0), "group_size=0 must be an int of at least 1"),
    "a word": (dict(scheme="W4A16", group_size="x"), "group_size='x' must be an int of at least 1"),
    "a bool": (dict(scheme="W4A16", group_size=True), "group_size=True must be an int of at least 1"),
    "unknown preset": (dict(scheme="W4A17", group_size=64), "scheme='W4A17' is not a preset"),
    "together": (dict(scheme="W4A16", strategy="channel"), "group_size requires strategy to be set to 'group'"),
}


@pytest.mark.parametrize("fields, said", BAD.values(), ids=BAD)
def test_bad_fields_are_named(fields, said):
    with pytest.raises(ValueError, match=re.escape(said)): QuantizationModifier(**fields)


def test_a_group_size_that_no_scheme_can_use_is_named():
    for schemes in (["FP8", "W8A8"], dict(a="FP8"), ["FP8", QuantizationModifier(scheme="W4A16")]):
        with pytest.raises(ValueError, match="group_size=64: none of the schemes is a preset with groups"):
            named_schemes(schemes, group_size=64)


def test_adjusting_again_keeps_what_was_said():
    assert adjusted(PAIR, symmetric=False) == ("W4A16", dict(group_size=64, symmetric=False))
    assert adjusted(PAIR, group_size=32) == ("W4A16", dict(group_size=32)) and PAIR[1] == {"group_size": 64}
    assert adjusted(PAIR) is PAIR


def test_the_command_line_wants_one_of_recipe_and_group_size():
    with pytest.raises(ValueError, match="--group-size and --recipe"):
        modifier_from_options(options(["--recipe", "r.yaml", "--group-size", "64"]))


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_BLOCK", "W4A16_ASYM", ("W4A16", dict(group_size=80))])
def test_no_field_makes_rows_run_that_do_not_divide(scheme):
    "compressed-tensors computes whole groups alone: bypassing the check ended in a RuntimeError after the data."
    model = torch.nn.Sequential(torch.nn.Linear(192, 200))
    modifier = QuantizationModifier(scheme=scheme, bypass_divisibility_checks=True)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="have 192 values in a row.*group_size is") as told:
        calibrate(model, [torch.randn(3, 192)], modifier, progress=False)
    assert "choose another group_size" in str(told.value) and differences(before, fingerprint(model)) == []
