"""Tables from a record, against the tensors that it was made of."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from helpers import make_batches, make_model
from hypothesis import given
from hypothesis import strategies as st

from qcal_nb.analysis.tables import PERCENTILES
from qcal_nb.analysis import (
    compare_observers,
    convergence,
    coverage,
    diff,
    enough_in_words,
    extremes,
    history,
    outlier_channels,
    per_reader,
    ranges,
)
from qcal_nb.records import CalibrationRecord
from qcal_nb.observers import DEFAULT_ARGS, new_observer
from qcal_nb.records import result_from_stats
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts, inject_outliers, load_tiny_llama
from qcal_nb.observers import Observer
from qcal_nb.pipelines import calibrate
from qcal_nb.stats import outer_limits, quality_of, sqnr_db
from qcal_nb.records import record
from qcal_nb.schemes import code_points
from qcal_nb.stats import measure

FORMATS = {
    "int8": DEFAULT_ARGS,
    "int8 asymmetric": QuantizationArgs(num_bits=8, symmetric=False, strategy="tensor"),
    "int4": QuantizationArgs(num_bits=4, symmetric=True, strategy="tensor"),
    "int2": QuantizationArgs(num_bits=2, strategy="tensor"),
    "fp8": QuantizationArgs(num_bits=8, type="float", strategy="tensor"),
    "fp4": QuantizationArgs(num_bits=4, type="float", strategy="tensor"),
}


def figures_of(
    x: torch.Tensor, args: QuantizationArgs, scale: torch.Tensor, zero_point: torch.Tensor
) -> dict[str, float]:
    "What a scale costs, computed on the tensor itself."
    wide, after = x.double(), fake_quantize(x, scale, zero_point, args).double()
    units, (low, high) = wide / scale.double() + zero_point.double(), outer_limits(args)
    _, counts = quantize(x, scale, zero_point, args).float().unique(return_counts=True)
    p = counts.double() / counts.sum()
    return dict(
        clipped=((units < low * (1 + 1e-6)) | (units > high * (1 + 1e-6))).double().mean().item(),
        mse=(after - wide).square().mean().item(),
        sqnr_db=sqnr_db(wide.square().sum().item(), (after - wide).square().sum().item()),
        levels_used=len(counts),
        effective_bits=-(p * p.log2()).sum().item(),
    )


# --- what a scale costs ---

DATA = {
    "normal": lambda g: torch.randn(20_000, generator=g),
    "skewed": lambda g: torch.randn(20_000, generator=g).exp(),
    "heavy": lambda g: torch.randn(20_000, generator=g) / torch.rand(20_000, generator=g).clamp(0.01),
    "repeated": lambda g: torch.randn(300, generator=g).repeat(70),
    "a grid": lambda g: torch.randint(-90, 90, (20_000,), generator=g) * 0.03,
    "constant": lambda g: torch.full((5000,), 0.37),
    "few": lambda g: torch.randn(7, generator=g),
    "small and large": lambda g: torch.cat(
        [torch.randn(20_000, generator=g) * 1e-3, torch.randn(20, generator=g) * 100]
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("data", DATA)
def test_the_bound_holds_and_bfloat16_is_exact(data, form):
    args = FORMATS[form]
    for seed in range(3):
        x = DATA[data](torch.Generator().manual_seed(seed))[:, None]
        for share in (1.0, 0.6, 0.013):
            for value in (x, x.bfloat16()):
                low, high = value.min().reshape(1) * share, value.max().reshape(1) * share
                scale, zero_point = calculate_qparams(low, high, args)
                ours = quality_of(measure(value), args, scale, zero_point)
                right = figures_of(value, args, scale, zero_point)
                if value.dtype == torch.bfloat16:
                    assert ours.bound_db == 0 and ours.levels_used == right["levels_used"]
                    assert ours.clipped == pytest.approx(right["clipped"])
                    assert ours.mse == pytest.approx(right["mse"], rel=1e-9)
                    assert ours.effective_bits == pytest.approx(right["effective_bits"])
                    assert ours.sqnr_db == pytest.approx(right["sqnr_db"], abs=1e-6) or ours.sqnr_db == right["sqnr_db"]
                elif math.isfinite(ours.bound_db) and right["mse"]:
                    assert abs(ours.sqnr_db - right["sqnr_db"]) <= ours.bound_db + 1e-9


@pytest.fixture(scope="module")
def outliers():
    "A record of the embedded model with outliers, and the inputs that it saw."
    model, tokenizer = load_tiny_llama()
    inject_outliers(model)
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=n: seen.setdefault(name, []).append(args[0].flatten(0, 1)))
        for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    run = record(model, calibration_texts()[:8], tokenizer=tokenizer, max_length=128, observers=["mse"], progress=False)
    for hook in hooks: hook.remove()
    return run, {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("form", FORMATS)
def test_figures_from_the_record_are_within_a_fifth_of_a_decibel(outliers, form):
    run, seen = outliers
    table = compare_observers(run, args=FORMATS[form])
    table = table[
        (table.base_name == "input") & (table.observer != "mse")
        & table.module.str.contains("q_proj|o_proj|gate_proj|down_proj")
    ]
    assert len(table) == 4 * 4 * 4 and (table.reason == "").all()
    for row in table.itertuples():
        found = result_from_stats(run[row.module, "input"], "input", row.observer, FORMATS[form])
        right = figures_of(seen[row.module], FORMATS[form], found.scale, found.zero_point)
        off = abs(row.sqnr_db - right["sqnr_db"])
        assert off <= row.bound_db and off < 0.2, (row.module, row.observer)
        # fp8 has its large errors in few buckets
        assert row.bound_db < (0.6 if form == "fp8" else 0.25), (row.module, row.observer)
        assert row.clipped == pytest.approx(right["clipped"], abs=2e-4)
        assert abs(row.effective_bits - right["effective_bits"]) < 0.05
        assert abs(row.levels_used - right["levels_used"]) <= 0.06 * len(code_points(FORMATS[form])) + 1


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("observer", ["static_minmax", "percentile", "entropy", "histogram_mse"])
def test_a_comparison_concludes_what_the_observer_concludes(outliers, observer, form):
    run, seen = outliers
    table = per_reader(compare_observers(run, observer, FORMATS[form])).set_index(["module", "base_name"])
    for name in ("model.layers.0.mlp.down_proj", "model.layers.3.self_attn.k_proj"):
        alone = new_observer(observer, "input", FORMATS[form])
        for part in seen[name].split(100): alone(part)
        qparams = alone.get_qparams()
        row = table.loc[(name, "input")]
        assert row.scale == qparams["scale"].item() and row.zero_point == qparams["zero_point"].item()


def test_rows_that_cannot_be_say_why():
    run = record(
        make_model("llama_gqa"), make_batches(2), scheme="W8A8", observers=["static_minmax", "mse", "percentile"],
        progress=False
    )
    table = compare_observers(run)
    weights = table[table.base_name == "weight"].set_index("observer")
    assert weights.loc[["mse"]].reason.str.contains("scales: the histogram of the whole tensor cannot tell").all()
    assert weights.loc[["percentile"]].reason.str.contains("keeps one histogram per tensor").all()
    assert weights.sqnr_db.isna().all()
    inputs = table[table.base_name == "input"]
    assert (inputs.reason == "").all() and inputs.groupby("module").highest_sqnr.sum().eq(1).all()
    top = inputs.groupby("module")[["sqnr_db", "bound_db"]].transform("max")  # all have much the same bound
    assert (inputs[inputs.highest_sqnr].sqnr_db + 2 * top.bound_db >= top.sqnr_db)[inputs.highest_sqnr].all()
    other = compare_observers(run, ["mse", "minmax"], FORMATS["int4"])
    # a weight's first look by minmax follows from the record
    assert other.reason.str.contains("attach it when recording").sum() == len(other) - 14
    assert table.attrs["args"].startswith("input: int8, symmetric, one scale per tensor")


# --- ranges, extremes, channels ---

def test_percentiles_are_those_of_the_tensor(outliers):
    run, seen = outliers
    table = per_reader(ranges(run)).set_index(["module", "base_name"])
    for name, x in seen.items():
        row, flat = table.loc[(name, "input")], x.flatten().double().numpy()
        right = np.quantile(flat, np.array(PERCENTILES) / 100)
        assert np.allclose(row[[f"p{p:g}" for p in PERCENTILES]].astype(float), right, rtol=2**-7, atol=1e-9)
        assert row.outlier_ratio == pytest.approx(abs(flat).max() / np.quantile(abs(flat), 0.999), rel=2**-7)
        assert (row["min"], row["max"], row["numel"]) == (flat.min(), flat.max(), len(flat))
        assert row["std"] == pytest.approx(flat.std(), rel=1e-9)


def test_nan_is_counted_and_placed_and_never_in_a_figure():
    model, (good, bad) = torch.nn.Sequential(torch.nn.Linear(4, 4)), (torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    bad[1, 2, 3], bad[1, 0, 0] = float("nan"), float("inf")
    run = record(
        model, [good, bad], observers=["static_minmax", "minmax"], scheme=QuantizationModifier(scheme="FP8"),
        progress=False
    )
    row = ranges(run).query("base_name == 'input'").iloc[0]
    assert (row.nan, row.inf, row.first_nonfinite) == (1, 1, "inf at (1, 0, 0) of batch 1")
    assert np.isfinite(row[["min", "max", "p50"]].astype(float)).all()
    covered = coverage(run).query("base_name == 'input'")
    assert (covered.nonfinite == 2).all() and covered.computed.all()
    assert covered.first_nonfinite.str.contains("batch 1").all()
    assert np.isfinite(compare_observers(run).query("base_name == 'input'").sqnr_db).all()


def test_extremes_and_channels(outliers):
    run, seen = outliers
    table = per_reader(extremes(run)).query("base_name == 'input'")
    for name, x in seen.items():
        rows = table[table.module == name]
        assert rows.value.abs().tolist() == x.abs().flatten().topk(8).values.tolist()
        assert rows["rank"].tolist() == list(range(1, 9))
    loud = per_reader(outlier_channels(run, top=3)).query("base_name == 'input'")
    for name, x in seen.items():
        sizes = x.abs().amax(0)
        rows = loud[loud.module == name]
        assert rows.absmax.tolist() == sizes.topk(3).values.tolist()
        assert rows.ratio.iloc[0] == pytest.approx(sizes.max().item() / np.median(sizes.numpy()))


# --- coverage ---

@pytest.mark.parametrize("architecture", ["llama_gqa", "mixtral"])
def test_coverage_of_a_record_is_that_of_a_calibration(architecture):
    recipe = QuantizationModifier(scheme="FP8", ignore=["lm_head"], input_observer="static_minmax")
    run = record(make_model(architecture), make_batches(3), scheme=recipe, progress=False)
    calibrate(make_model(architecture), make_batches(3), recipe, progress=False)
    both = [coverage(source).query("base_name == 'input'").set_index("module").sort_index() for source in (run, recipe)]
    columns = [
        "observations", "elements", "batches", "skipped", "nonfinite", "computed", "never_seen", "scales", "zero",
        "eps", "saturated", "expert_tokens"
    ]
    pd.testing.assert_frame_equal(*(table[columns] for table in both), check_dtype=False)
    assert both[0].expert_tokens.notna().any() == (architecture == "mixtral")


class Branches(torch.nn.Module):
    "One layer is never called; one is fed zeros."
    def __init__(self):
        super().__init__()
        self.used, self.never, self.zero = (torch.nn.Linear(4, 4) for _ in range(3))
    def forward(self, x): return self.used(x) + self.zero(0 * x)


def test_what_was_never_seen_and_what_was_zero():
    run = record(
        Branches(), [torch.randn(2, 4)], scheme=QuantizationModifier(scheme="FP8"),
        observers=["static_minmax", "minmax"], progress=False
    )
    table = coverage(run).query("base_name == 'input'").set_index(["module", "observer"])
    assert table.loc["never"].never_seen.all() and not table.loc["never"].computed.any()
    assert table.loc["zero"].eps.eq(1).all() and not table.loc["used"].eps.any()
    assert compare_observers(run).query("module == 'never' and base_name == 'input'").reason.eq(
        "nothing finite was seen"
    ).all()
    assert ranges(run).query("module == 'never' and base_name == 'input'").numel.item() == 0
    for table in (history(run), convergence(run), extremes(run), outlier_channels(run), diff(run, run)):
        assert len(table)


# --- enough data ---

@pytest.mark.parametrize("observer", ["static_minmax", "percentile"])
def test_history_is_what_shorter_runs_would_have_concluded(observer):
    model, data = make_model("opt"), make_batches(6)
    run = record(model, data, progress=False)
    story = history(run, observer)
    assert sorted(set(story.batches)) == [1, 2, 4, 6] and story.tokens.max() == 6 * 32
    for n in (1, 2, 4, 6):
        short = record(model, data[:n], progress=False)
        for row in story[story.batches == n].itertuples():
            stats = short[row.module, "input"]
            assert (row.min, row.max) == (stats.min, stats.max)
            found = result_from_stats(stats, "input", observer)
            assert row.sqnr_db == quality_of(
                run[row.module, "input"], DEFAULT_ARGS, found.scale, found.zero_point
            ).sqnr_db


def test_convergence_finds_the_batch_that_widened_the_range():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    data = [torch.rand(1, 16, 8) * (10 if i == 5 else 1) for i in range(16)]
    run = record(model, data, progress=False)
    assert convergence(run).iloc[0].range_settled == 8 * 1  # levels end after 1, 2, 4, 8, 16 batches of one row each
    assert convergence(run).enough.all() and convergence(run).attrs["share"] == 0.05
    late = convergence(record(model, data[::-1], progress=False))  # the wide one is the eleventh of sixteen
    assert not late.enough.any() and enough_in_words(late).startswith("Not yet for 1 of 1 tensors")
    steady = record(model, [torch.ones(1, 16, 8)] * 16, progress=False)
    assert convergence(steady).enough.all()
    assert enough_in_words(convergence(steady, 0.01)).startswith(
        "Yes: no range and no quantization error moved by more than 1 %"
    )
    assert convergence(steady).iloc[0].range_settled == 1 and convergence(steady).iloc[0].sqnr_settled == 1


# --- searches that were cut short ---

def test_at_limit_is_said_where_a_larger_search_would_go_on():
    model, four = make_model("llama_gqa"), QuantizationArgs(num_bits=4, symmetric=True, strategy="tensor")
    scheme = {"weights": dict(num_bits=4, strategy="tensor")}
    run = record(
        model, make_batches(3), base_names=["weight"], scheme=scheme, observers=["memoryless_mse"], progress=False
    )
    asked = ["memoryless_mse", "histogram_mse", "static_minmax", ("histogram_mse", dict(maxshrink=0.9))]
    table = compare_observers(run, asked[1:3], four)
    for row in table[table.observer == "histogram_mse"].itertuples():
        stats = run[row.module, "weight"]
        assert row.at_limit == (max(-row.min, row.max) < stats.absmax * 0.8151), row
    assert table.at_limit.any() and not table[table.observer == "static_minmax"].at_limit.any()
    attached = compare_observers(run, asked[:1])
    for row in attached.itertuples():
        assert row.at_limit == (max(-row.min, row.max) < run[row.module, "weight"].absmax * 0.8151)
    wide = compare_observers(run, asked[3:], four)
    assert not wide.at_limit.any()
    assert (wide.sqnr_db.to_numpy() >= table[table.observer == "histogram_mse"].sqnr_db.to_numpy() - 0.5).all()


# --- differences ---

def test_diff_finds_what_moved():
    model, data = make_model("llama_gqa"), make_batches(3)
    a = record(model, data, observers=["static_minmax"], progress=False)
    assert (diff(a, a).moved == 0).all()
    with torch.no_grad(): model.model.layers[1].mlp.up_proj.weight *= 4
    b = record(model, data, observers=["static_minmax"], progress=False)
    table = diff(a, b).set_index(["module", "base_name"])
    assert table.loc[("model.layers.1.mlp.up_proj", "weight"), "scale_ratio"] == pytest.approx(4)
    assert table.moved.iloc[0] == pytest.approx(2)
    assert table.loc[("model.layers.1.mlp.down_proj", "input"), "range_ratio"] == pytest.approx(4)
    part = CalibrationRecord({k: v for k, v in a.tensors.items() if k[1] == "input"}, a.types)
    weights = [key for key in a.tensors if key[1] == "weight"]
    for table, name in ((diff(a, part), "a"), (diff(part, a), "b")):
        alone = table[table.only_in != ""]
        assert sorted(zip(alone.module, alone.base_name)) == sorted(weights) and set(alone.only_in) == {name}
        assert alone.moved.isna().all()
        assert table.only_in.iloc[:len(table) - len(alone)].eq("").all() and alone[f"max_{name}"].notna().all()
    assert table.attrs["batches_b"] == 3 and table.attrs["tokens_a"] == part.tokens


# --- merged records, errors ---

def test_tables_of_a_merged_record_are_those_of_the_whole():
    model, data = make_model("qwen3"), make_batches(5)
    options = dict(observers=["static_minmax", "percentile"], progress=False)
    whole = record(model, data, **options)
    merged = record(model, data[2:], batch_indices=range(2, 5), **options) | record(model, data[:2], **options)
    for table in (ranges, compare_observers, coverage, history, convergence, extremes, outlier_channels):
        pd.testing.assert_frame_equal(table(merged), table(whole), check_exact=True)


@pytest.mark.parametrize("table", [
    ranges, compare_observers, coverage, history, convergence, extremes, outlier_channels, lambda r: diff(r, r)
])
def test_what_is_not_a_record_is_refused_and_an_empty_one_is_not(table):
    with pytest.raises(TypeError, match="record must be a CalibrationRecord, got int"): table(3)
    assert len(table(CalibrationRecord())) == 0


@given(st.sampled_from([0, 9, -1, True, None, "a"]))
def test_bad_numbers(value):
    run = CalibrationRecord()
    with pytest.raises(ValueError, match="share="): convergence(run, value)
    if value != 9:
        with pytest.raises(ValueError, match="top="): outlier_channels(run, value)


def test_unknown_observers_are_named():
    run = record(make_model("llama_gqa"), make_batches(1), progress=False)
    with pytest.raises(ValueError, match="observer='msee' is unknown"): compare_observers(run, ["msee"])
    assert set(Observer.registered_names()) >= set(compare_observers(run).observer)
