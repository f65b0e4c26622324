"""A scale by hand is one that an observer could take; answers of observers are kept, and are the same."""
import dataclasses

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from helpers import make_batches, make_model

from qcal_nb.analysis import BY_HAND, Answers, result_by_hand
from qcal_nb.analysis.observers import one_scale
from qcal_nb.records import record, result_from_stats, result_of
from qcal_nb.session import FORMATS, args_for
from qcal_nb.stats import TensorStats, measure


@pytest.fixture(scope="module")
def run(): return record(make_model("llama_gqa"), make_batches(4), observers=["static_minmax", "mse"], progress=False)


@pytest.fixture(scope="module")
def key(run): return next(k for k in run.tensors if k[0].endswith("1.mlp.down_proj") and k[1] == "input")


# --- a scale by hand ---

@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("base_name", ["input", "weight"])
def test_the_whole_range_is_what_static_minmax_takes(run, key, base_name, format, symmetric):
    args, stats = args_for(format, symmetric), run[key[0], base_name]
    by_hand = result_by_hand(stats, base_name, args)
    observer = result_from_stats(stats, base_name, "static_minmax", args)
    for name in ("low", "high", "scale", "zero_point"):
        assert torch.equal(getattr(by_hand, name), getattr(observer, name)), name
    assert by_hand.observer == BY_HAND and by_hand.args.num_bits == args.num_bits


@pytest.mark.parametrize("clip", [0.75, 0.5, 0.01])
def test_a_share_of_the_range_is_what_static_minmax_takes_of_a_tensor_that_ends_there(clip):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    stats, ends = measure(x), torch.tensor([x.min(), x.max()]).double() * clip
    for args in (args_for("int8"), args_for("int4", False), args_for("fp8"), args_for("fp4")):
        smaller = result_from_stats(measure(ends.float()[None]), "input", "static_minmax", args)
        found = result_by_hand(stats, "input", args, clip)
        assert torch.equal(found.scale, smaller.scale) and torch.equal(found.zero_point, smaller.zero_point)


@pytest.mark.parametrize(
    "args",
    [
        QuantizationArgs(num_bits=4, strategy="channel"), QuantizationArgs(num_bits=4, strategy="group", group_size=16),
        QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    ],
    ids=["channel", "group", "token"],
)
def test_by_hand_is_one_scale_whatever_the_scheme_has(run, key, args):
    found = result_by_hand(run[key], "input", args, 0.5)
    assert found.scale.numel() == 1
    assert (found.args.num_bits, found.args.type, found.args.strategy) == (args.num_bits, args.type, "tensor")
    assert one_scale(found.args) is found.args


@pytest.mark.parametrize("clip", [0, -0.1, 1.5, True, "half", float("nan")])
def test_a_share_that_is_none_is_refused(run, key, clip):
    with pytest.raises(ValueError, match=r"clip=.* must be a number above 0 and at most 1"):
        result_by_hand(run[key], "input", None, clip)


def test_by_hand_of_nothing_says_why():
    assert result_by_hand(TensorStats(), "input").reason == "nothing finite was seen"


# --- answers are kept, and are the same ---

def test_kept_answers_are_those_of_the_analysis(run, key):
    answers, args = Answers(), args_for("int4")
    for name in ("static_minmax", "percentile", "entropy", "histogram_mse", "mse"):
        for asked in (None, args):
            assert not answers.knows(run, key, name, asked)
            kept, wanted = answers.conclusion(run, key, name, asked), result_of(run, key, name, asked)
            assert str(kept) == str(wanted) and answers.conclusion(run, key, name, asked) is kept
            assert answers.knows(run, key, name, asked)


def test_another_tensor_of_the_same_name_is_asked_anew(run, key):
    answers = Answers()
    more = dataclasses.replace(run, tensors=run.tensors | {key: measure(torch.full((4, 4), 3.0))}, results={})
    first, second = (answers.conclusion(r, key, "percentile") for r in (run, more))
    assert not torch.equal(first.scale, second.scale)


def test_no_more_answers_are_kept_than_asked(run, key):
    answers = Answers(most=3)
    for format in FORMATS: answers.conclusion(run, key, "static_minmax", args_for(format))
    assert len(answers._kept) == 3 and answers.knows(run, key, "static_minmax", args_for(FORMATS[-1]))
