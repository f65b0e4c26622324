"""Masked positions do not count, and masks that make no sense are refused."""
import math
import warnings

import numpy as np
import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model
from torch.nn import Linear, Sequential

from qcal_nb.observers import DEFAULT_ARGS, new_observer
from qcal_nb.lifecycle import QuantizationMixin
from qcal_nb.models import calibration_texts
from qcal_nb.stats import current_batch
from qcal_nb.records import record, record_equal
from tests.records.samples import QUIET, bits


@pytest.mark.parametrize("name", ["llama_gqa", "opt", "gpt_neox", "gemma2", "mixtral"])
def test_what_is_masked_does_not_count(name):
    """Against every Linear's inputs, caught and cut by hand. OPT flattens what its MLP is fed, experts are shown all
    tokens in a row."""
    model, data, caught = make_model(name), make_batches(3), {}
    for b in data: b["attention_mask"][1, 12:] = 0
    mask = {5, 9, int(data[0]["input_ids"][0, 0])}
    for given_mask, keep in (
        (mask, lambda b: ~torch.isin(b["input_ids"], torch.tensor(sorted(mask)))),
        (lambda b: b["attention_mask"].bool(),) * 2,
    ):
        caught.clear()
        def catch(n): return lambda _, args: caught.setdefault(n, []).append((current_batch.get(), args[0].detach()))
        handles = [
            m.register_forward_pre_hook(catch(n))
            for n, m in model.named_modules() if isinstance(m, Linear) and n != "lm_head"
        ]
        run = record(
            model, data, mask=given_mask, base_names=["input", "output"], observers=["minmax", "static_minmax"], **QUIET
        )
        for h in handles: h.remove()
        kept = [keep(b) for b in data]
        assert run.tokens == sum(int(k.sum()) for k in kept)
        assert all(s.count == run.tokens * s.shapes[0][-1] for s in run.tensors.values())
        for n, seen in caught.items():
            rows = [x.reshape(-1, x.shape[-1])[kept[i].reshape(-1)] for i, x in seen if i is not None]
            stats = run[n, "input"]
            assert stats.min == min(r.min().item() for r in rows) and stats.max == max(r.max().item() for r in rows)
            assert len(stats.top) == 8 and all(kept[e.batch][e.position] for e in stats.top)
            alone = new_observer("minmax", "input", DEFAULT_ARGS)
            for r in rows: alone(r)
            assert bits(run.results[n, "input", "minmax"].scale) == bits(alone.get_qparams()["scale"])


def test_padding_does_not_count(tiny):
    "Texts padded to one length with a mask: as many values as one by one, and the same extremes but for rounding."
    model, tokenizer = tiny
    texts = sorted(calibration_texts()[:40], key=len)[::13]
    assert len({len(tokenizer(t).input_ids) for t in texts}) == 4
    options = dict(tokenizer=tokenizer, **QUIET)
    with pytest.warns(UserWarning, match="the padding counts like any token.*leaves it out"):
        careless = record(model, texts, batch_size=4, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padded = record(model, texts, batch_size=4, mask=lambda b: b["attention_mask"].bool(), **options)
    single = record(model, texts, **options)
    assert padded.tokens == single.tokens < careless.tokens
    for key, stats in single.tensors.items():
        assert padded[key].count == stats.count and math.isclose(padded[key].max, stats.max, rel_tol=1e-4), key


@pytest.mark.parametrize("mask, error, words", [
    ("bos", TypeError, "mask must be token ids"), (3, TypeError, "mask must be token ids"),
    ([1.5], TypeError, "mask must be token ids"),
    ([True, False], TypeError, "mask must be token ids"), (torch.tensor([[True]]), TypeError, "mask must be token ids"),
    ([None], TypeError, "mask must be"),
    (
        lambda b: b["attention_mask"],
        ValueError,
        "mask must return a bool tensor of the shape of input_ids, \\(2, 16\\); it returned torch.int64",
    ),
    (lambda b: b["attention_mask"].bool()[0], ValueError, "it returned torch.bool \\(16,\\)"),
    (lambda b: True, ValueError, "it returned bool"),
])
def test_masks_that_make_no_sense(mask, error, words):
    model = make_model("llama_gqa")
    before = fingerprint(model)
    with pytest.raises(error, match=words): record(model, make_batches(1), mask=mask, **QUIET)
    assert differences(before, fingerprint(model)) == []


def test_token_ids_of_any_kind_make_a_mask():
    model, data = make_model("llama_gqa"), make_batches(2)
    masks = [3, 5], {5, 3}, torch.tensor([3, 5]), np.array([3, 5]), range(3, 6, 2)
    runs = [record(model, data, mask=m, base_names="input", **QUIET) for m in masks]
    assert all(record_equal(r, runs[0]) for r in runs) and runs[0].tokens < 64
    assert record(model, data, mask=[], base_names="input", **QUIET).tokens == 64
    nothing = record(model, data, mask=range(128), **QUIET)
    assert nothing.tokens == 0 and all(s.count == 0 for (_, b), s in nothing.tensors.items() if b == "input")


def test_a_mask_that_does_not_fit_is_refused_by_name():
    model = make_model("bert")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"mask: the input of pooler.dense has shape \(2, 64\).*leave the module out"):
        record(model, make_batches(1), mask=[5], **QUIET)
    assert differences(before, fingerprint(model)) == []
    run = record(
        model, make_batches(1), mask=[5], scheme=QuantizationMixin(scheme="INT8_STATIC", ignore=["pooler.dense"]),
        **QUIET
    )
    assert run.tokens == int((make_batches(1)[0]["input_ids"] != 5).sum())
    assert ("pooler.dense", "input") not in run.tensors
    with pytest.raises(ValueError, match="mask needs token ids"):
        record(Sequential(Linear(4, 4)), [torch.ones(2, 4)], mask=[5], **QUIET)
