"""Modules that are fed one tensor: the record knows them, in files and merged, and tables have one row for them."""
from functools import partial

import pandas as pd
import pytest
import torch
from helpers import make_batches, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from qcal_nb.analysis import choose, compare_observers, convergence, extremes, findings, history, outlier_channels
from qcal_nb.analysis import per_reader, ranges, readers_in_words, rows_of_module
from qcal_nb.analysis import observers as comparing
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.plots import drawn, plot_density, plot_observers, plot_ranges
from qcal_nb.records import CalibrationRecord, record
from qcal_nb.stats import measure

LAYER = "model.layers.0"
SHARED = {(f"{LAYER}.self_attn.q_proj", "input"): tuple(f"{LAYER}.self_attn.{x}_proj" for x in "qkv"),
          (f"{LAYER}.mlp.gate_proj", "input"): tuple(f"{LAYER}.mlp.{x}_proj" for x in ("gate", "up"))}


@pytest.fixture(scope="module")
def run(): return record(make_model("llama_gqa"), make_batches(4), observers=["static_minmax", "mse"], progress=False)


def shared(found):
    return {key: names for key, names in found.readers.items() if len(names) > 1 and key[0].startswith(LAYER)}


def test_readers_are_those_that_were_fed_the_same_tensor(run, tmp_path):
    assert shared(run) == SHARED and sum(map(len, run.readers.values())) == len(run) == 28
    assert shared(CalibrationRecord.load(run.save(tmp_path / "a"))) == SHARED
    model, data = make_model("llama_gqa"), make_batches(4)
    parts = [record(model, data[i:i + 2], batch_indices=range(i, i + 2), progress=False) for i in (0, 2)]
    assert shared(parts[0] | parts[1]) == SHARED == shared(
        parts[1] | CalibrationRecord.load(parts[0].save(tmp_path / "b"))
    )


class Sometimes(torch.nn.Module):
    "Two layers that are fed the same tensor unless it is large; a third is never called."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(4, 4) for _ in range(3))
    def forward(self, x): return self.a(x) + self.b(x + 1 if x.max() > 50 else x)


def test_in_all_batches_or_not_at_all():
    small, large = torch.randn(2, 4), torch.full((2, 4), 99.0)
    assert ("a", "b") in record(Sometimes(), [small, small], progress=False).readers.values()
    found = record(Sometimes(), [small, large], progress=False)
    assert all(len(names) == 1 for names in found.readers.values())
    # what was never seen is not one tensor
    assert len(record(Sometimes(), [small, large], progress=False).readers) == 6


def test_a_batch_that_is_left_out_is_left_out_for_all_readers():
    bad = torch.tensor([[1.0, 2.0, torch.nan, 4.0]])
    found = record(Sometimes(), [torch.randn(2, 4), bad, torch.randn(2, 4)], nonfinite="skip", progress=False)
    assert ("a", "b") in found.readers.values() and found["a", "input"].skipped == 1


def test_equal_numbers_are_not_one_tensor():
    x = torch.randn(2, 4)
    found = CalibrationRecord({("m.a", "input"): measure(x, 0), ("m.b", "input"): measure(x, 0)}, spans=((0, 1),))
    assert len(found.readers) == 2


# --- tables ---

@pytest.mark.parametrize("table", [ranges, compare_observers, history, convergence, extremes, outlier_channels])
def test_a_tensor_has_one_row_and_each_reader_finds_it(run, table):
    found = table(run)
    inputs = found[found.base_name == "input"]
    assert inputs.module.nunique() == 8
    assert {names for names in inputs.readers if names[0].startswith(LAYER)} >= set(SHARED.values())
    for (first, _), names in SHARED.items():
        for name in names:
            rows = rows_of_module(inputs, name)
            assert len(rows) and (rows.module == first).all() and choose(found, name + "$", "input").equals(rows)
    each = per_reader(inputs)
    assert each.module.nunique() == 14 and len(each) == inputs.readers.map(len).sum() and each.attrs == inputs.attrs
    for name in SHARED[f"{LAYER}.mlp.gate_proj", "input"]:
        ours, alone = each[each.module == name], rows_of_module(inputs, name)
        columns = [c for c in ours if c not in ("module", "readers")]
        pd.testing.assert_frame_equal(ours[columns].reset_index(drop=True), alone[columns].reset_index(drop=True))


def test_readers_with_arguments_of_their_own_have_rows_of_their_own():
    eight = dict(num_bits=8, type="float", strategy="tensor", symmetric=True)
    scheme = QuantizationModifier(config_groups={
        "a": dict(targets=["re:.*(q|v)_proj"], input_activations=eight),
        "b": dict(targets=["re:.*k_proj"], input_activations=dict(eight, type="int"))})
    found = record(make_model("llama_gqa"), make_batches(2), scheme=scheme, base_names=["input"], progress=False)
    rows = choose(compare_observers(found, ["percentile"]), layer=0)
    assert [tuple(name[-6:] for name in names) for names in rows.readers] == [("q_proj", "v_proj"), ("k_proj",)]
    assert rows.scale.nunique() == 2 and len(choose(ranges(found), layer=0)) == 1


def test_names_in_short():
    assert readers_in_words(SHARED[f"{LAYER}.self_attn.q_proj", "input"]) == f"{LAYER}.self_attn.q/k/v_proj"
    assert readers_in_words(("a.b", "a.c")) == "a.b/c" and readers_in_words(("a.b_x", "c.b_x")) == "a.b_x, c.b_x"
    assert readers_in_words(("alone",)) == "alone"


def test_pictures_and_findings_count_tensors(run):
    assert len(drawn(plot_ranges(run))["range"]) == len(drawn(plot_density(run))["log10_count"]) == 8
    ax = plot_observers(run)
    assert len(drawn(ax)["sqnr_db"]) == 8 and "q/k/v_proj" in [label.get_text() for label in ax.get_xticklabels()]
    said = [found.words for found in findings(run)]
    assert any("at the 8 inputs of 14 modules" in words for words in said)
    assert any("at the 14 weights (" in words for words in said)


# --- found once ---

def test_each_tensor_is_searched_once_and_each_table_made_once(run, monkeypatch, tmp_path):
    fresh = CalibrationRecord.load(run.save(tmp_path / "a"))
    asked = []
    original = comparing.result_of
    monkeypatch.setattr(comparing, "result_of", lambda *a: asked.append(a) or original(*a))
    first = compare_observers(fresh, ["entropy"])
    assert len(asked) == 8 + 14
    first["sqnr_db"] = 0.0  # one's own copy
    assert compare_observers(fresh, ["entropy"]).sqnr_db.min() > 0 and len(asked) == 22
    findings(fresh)
    many = len(asked)
    findings(fresh)
    compare_observers(fresh)
    assert len(asked) == many


def test_an_interrupt_leaves_the_record_as_it_was(run, monkeypatch, tmp_path):
    fresh = CalibrationRecord.load(run.save(tmp_path / "a"))
    original, calls = comparing.result_row, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 9: raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(comparing, "result_row", interrupted)
    for table in (compare_observers, findings, plot_observers):
        calls.clear()
        with pytest.raises(KeyboardInterrupt): table(fresh)
    monkeypatch.undo()
    pd.testing.assert_frame_equal(compare_observers(fresh), compare_observers(run), check_exact=True)


class Largest(TorchDispatchMode):
    """Of all tensors that an operation of torch takes, the most elements; and of those that it rounds or raises to a
    power."""
    most = most_rounded = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) not in ("aten.split.Tensor", "aten.lift_fresh.default"):  # these only make views
            sizes = [x.numel() for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
            self.most = max([self.most, *sizes])
            if func.overloadpacket.__name__ in ("round", "pow"): self.most_rounded = max([self.most_rounded, *sizes])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "table", [compare_observers, convergence, partial(compare_observers, observers=["histogram_mse"])]
)
def test_no_operation_of_torch_is_so_large_that_it_starts_threads(table):
    wide = torch.randn(400, 500, generator=torch.Generator().manual_seed(0)).exp()
    found = CalibrationRecord(
        {("a", "input"): measure(wide * wide, 0)}, dict(a="Linear"), spans=((0, 1),), level_tokens={0: 400}
    )
    assert len(found["a", "input"].histogram.codes) * 16 > 32_768
    with Largest() as seen: table(found)
    assert 0 < seen.most < 32_768 and seen.most_rounded < 2_048  # where torch begins to share out
