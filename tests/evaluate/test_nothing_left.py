"""A model that was evaluated is afterwards what it was, whatever happened."""
import pandas as pd
import pytest
import torch
from helpers import differences, fingerprint, make_model

from qcal_nb.evaluate import compare_observers, compare_schemes, sensitivity
from qcal_nb.lifecycle import unfuse_experts
from qcal_nb.lifecycle import QuantizationModifier
from tests.evaluate.samples import CALLS, NVFP4A16, QUIET, W4, Counting


@pytest.mark.parametrize(
    "name, scheme", [("llama_gqa", "FP8"), ("mixtral", W4), ("mixtral", NVFP4A16), ("opt", "INT8_STATIC")]
)
def test_the_model_is_as_before(name, scheme, data, evals):
    model = make_model(name).train()
    before = fingerprint(model)
    compare_schemes(model, data, [scheme], eval_data=evals, **QUIET)
    sensitivity(model, data, scheme, eval_data=evals[:1], **QUIET)
    compare_observers(
        model, data, ["static_minmax"], scheme=QuantizationModifier(scheme=scheme, ignore=["lm_head"]), **QUIET
    )
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_as_before_after_errors_and_interrupts(llama, data, evals, call, stop_at, error):
    if call == "compare_observers": stop_at = min(stop_at, 4)  # two batches, twice
    counter = Counting(llama, stop_at, error)
    before = fingerprint(llama)
    if error is KeyboardInterrupt: assert isinstance(CALLS[call](llama, data, evals), pd.DataFrame)
    else:
        with pytest.raises(RuntimeError, match="stopped by a test"): CALLS[call](llama, data, evals)
    assert differences(before, fingerprint(llama)) == [] and counter.n >= stop_at


def test_an_interrupt_gives_the_rows_so_far(llama, data, evals):
    whole = CALLS["compare_schemes"](llama, data, evals)
    counter = Counting(llama, 3 + 2 + 6 + 2 + 1)  # original; calibrate and evaluate FP8; calibrate INT8 and one more
    assert CALLS["compare_schemes"](llama, data, evals).equals(whole.iloc[:2])
    counter.handle.remove()
    table = sensitivity(llama, data, "FP8", eval_data=evals, **QUIET)
    # calibrate, the original's logits, nothing, everything, seven kinds, two blocks, one module, and a bit
    counter = Counting(llama, 2 + 3 + 3 + 3 + 7 * 3 + 2 * 3 + 2 * 3 + 2)
    part = sensitivity(llama, data, "FP8", eval_data=evals, **QUIET)
    known = part.kl_only.notna()
    assert part.module.equals(table.module) and part.module[known].tolist() == part.attrs["order"][:1]
    numbers = ["loss_only", "kl_only", "loss_without", "kl_without"]
    assert part[known][numbers].equals(table[known][numbers]) and part[~known][numbers].isna().all(axis=None)


def test_what_prepared_the_model_stays(data, evals):
    model = unfuse_experts(make_model("mixtral"))
    before = fingerprint(model)
    compare_schemes(model, data, ["FP8"], eval_data=evals, **QUIET)
    # experts count their tokens in every pass
    left = [d for d in differences(before, fingerprint(model)) if "experts.tokens" not in d]
    assert left == []


@pytest.mark.parametrize("change, error, words", [
    (dict(schemes=["FP9"]), ValueError, "'FP9' is not a preset"),
    (dict(schemes=[8]), TypeError, "a scheme must be a preset's name"),
    (dict(schemes=8), TypeError, "schemes must be an iterable"),
    (dict(schemes={1: "FP8"}), TypeError, "labels are strings"),
    (dict(data=None), ValueError, "data=None: FP8 cannot be calibrated"),
    (dict(data=[]), ValueError, "data=empty"),
    (dict(eval_data=[]), ValueError, "eval_data must hold at least one token"),
    (dict(eval_data=["text"]), ValueError, "pass the model's tokenizer"),
    (dict(eval_data=[torch.rand(1, 3, 4)]), ValueError, "eval_data: batch 0 holds"),
    (dict(batch_size=0), ValueError, "batch_size=0 must be"),
])
def test_bad_arguments_are_named_before_anything_runs(llama, data, change, error, words):
    counter, before = Counting(llama), fingerprint(llama)
    with pytest.raises(error, match=words):
        asked = dict(data=data, schemes=["FP8"], eval_data=data) | change
        compare_schemes(llama, asked.pop("data"), asked.pop("schemes"), **asked, **QUIET)
    assert counter.n == 0 and differences(before, fingerprint(llama)) == []


def test_a_scheme_that_does_not_fit_spoils_nothing(llama, data):
    before = fingerprint(llama)
    table = compare_schemes(llama, data, ["W4A16", "FP8"], eval_data=data[:1], **QUIET)
    assert table.scheme.tolist() == ["original", "W4A16", "FP8"]
    assert table.why.str.contains("group_size is 128").tolist() == [False, True, False]
    assert table.perplexity.isna().tolist() == [False, True, False] and differences(before, fingerprint(llama)) == []
    alone = compare_schemes(llama, data, ["FP8"], eval_data=data[:1], **QUIET)
    assert alone.iloc[1].drop("scheme").equals(table.iloc[2].drop("scheme"))


ALONE = ["W4A16", ["W4A16"], dict(mine="W4A16"), ["W4A16", ("W4A16", dict(group_size=128))]]


@pytest.mark.parametrize("schemes", ALONE, ids=str)
def test_schemes_of_which_none_fits_are_rows_beside_the_original(llama, data, schemes):
    before = fingerprint(llama)
    table = compare_schemes(llama, data, schemes, eval_data=data[:1], **QUIET)
    assert table.scheme.iloc[0] == "original" and table.why.iloc[0] == "" and table.perplexity.notna().iloc[0]
    assert "group_size is 128" in table.why.iloc[1] and table.perplexity.isna().iloc[1]
    assert differences(before, fingerprint(llama)) == []


def test_what_only_shows_when_a_scheme_is_tried_is_a_row(data):
    "The experts of a mixture are one module until they are taken apart."
    model = make_model("mixtral")
    before = fingerprint(model)
    table = compare_schemes(model, data, ["W4A16", "FP8"], eval_data=data[:1], **QUIET)
    assert table.scheme.tolist() == ["original", "W4A16", "FP8"]
    assert "group_size is 128" in table.why[1] and table.why[2] == "" and table.perplexity.notna().tolist()[2]
    assert [d for d in differences(before, fingerprint(model)) if "experts.tokens" not in d] == []
