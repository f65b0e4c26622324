"""Pictures against what they show: every number that is drawn is the number of the table or record, and nothing of
pyplot is touched."""
import math
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qcal_nb import plots
from qcal_nb.analysis import compare_observers, convergence, layer_of, ranges
from qcal_nb.plots.style import MAX_COLUMNS, counts_between, drawable, packed, symlog_edges
from qcal_nb.stats import Histogram
from qcal_nb.plots.model import densities
from qcal_nb.plots.model import results_for
from qcal_nb.plots.tensor import stored_values
from qcal_nb.plots import data_of, drawn, to_png
from qcal_nb.records import CalibrationRecord, record
from qcal_nb.schemes import code_points, preset
from qcal_nb.stats import TensorStats, measure
from helpers import make_batches, make_model

OBSERVERS = ["static_minmax", "mse"]
INT4 = QuantizationArgs(num_bits=4, symmetric=True, strategy="tensor")


@pytest.fixture(scope="module")
def run():
    return record(
        make_model("llama_gqa"), make_batches(6), observers=OBSERVERS, base_names=["input", "weight", "output"],
        progress=False
    )


@pytest.fixture(scope="module")
def module(run): return next(m for m in run.types if m.endswith("1.mlp.down_proj"))


def sensitivities(modules):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(module=modules, layer=pd.array([layer_of(m) for m in modules], dtype="Int64")))
    for name in ("loss_only", "loss_without", "kl_only", "kl_without"): table[name] = rng.normal(2, 0.5, len(modules))
    table.attrs.update(loss_original=1.5, loss_quantized=3.0, kl_quantized=1.0)
    return table


def every_plot(run, module):
    "A call of each public plot, by name; each takes ax."
    table = sensitivities(list(run.types))
    one = dict(
        plot_histogram=plots.plot_histogram, plot_timeline=plots.plot_timeline, plot_channels=plots.plot_channels
    )
    whole = dict(plot_ranges=plots.plot_ranges, plot_density=plots.plot_density, plot_observers=plots.plot_observers,
                 plot_scales=plots.plot_scales, plot_convergence=plots.plot_convergence)
    calls = {name: lambda ax=None, f=f: f(run, module, ax=ax) for name, f in one.items()}
    calls |= {name: lambda ax=None, f=f: f(run, ax=ax) for name, f in whole.items()}
    frontier = pd.DataFrame(dict(mix=["W4A16", "W4A16 3, W8A16 2", "W8A16"], bytes=[10**6, 15 * 10**5, 2 * 10**6],
                                 kl=[0.7, 0.2, 0.01]))
    return calls | dict(plot_sensitivity=lambda ax=None: plots.plot_sensitivity(table, ax=ax),
            plot_pareto=lambda ax=None: plots.plot_pareto(frontier, ax=ax),
            plot_phases=lambda ax=None: plots.plot_phases("frozen", ax))


def test_no_plot_is_forgotten_here(run, module):
    assert set(every_plot(run, module)) == {n for n in plots.__all__ if n.startswith("plot_")}


def test_pyplot_and_style_stay_as_they_were(run, module):
    before, figures = dict(matplotlib.rcParams), plt.get_fignums()
    for name, plot in every_plot(run, module).items():
        ax = plot()
        assert isinstance(ax, Axes) and data_of(to_png(ax)) == drawn(ax), name
        assert dict(matplotlib.rcParams) == before and plt.get_fignums() == figures, name


def test_axes_that_are_given_are_drawn_on(run, module):
    for name, plot in every_plot(run, module).items():
        figure = Figure()
        ax, other = figure.subplots(1, 2)
        assert plot(ax) is ax and plot().figure is not figure, name
        assert drawn(ax) == drawn(plot()) and not other.collections and not other.lines, name
        to_png(ax)


def test_titles_and_axes_say_something(run, module):
    for name, plot in every_plot(run, module).items():
        ax = plot()
        if name != "plot_phases":
            assert ax.get_title() and (ax.get_xlabel() or ax.get_xticklabels()), name
            assert ax.get_ylabel() or ax.get_yticklabels(), name


# --- each picture holds its numbers ---

@pytest.mark.parametrize("base_name", ["input", "weight", "output"])
def test_ranges(run, base_name):
    table = ranges(run)
    rows = table[table.base_name == base_name]
    for source in (run, table):
        got = drawn(plots.plot_ranges(source, base_name))
        for name, ends in dict(range=["min", "max"], most=["p0.1", "p99.9"], core=["p5", "p95"]).items():
            assert got[name] == rows[ends].values.tolist()


def test_clip_range_of_an_observer(run):
    costs = compare_observers(run, ["mse"])
    rows = costs[costs.base_name == "input"]
    got = drawn(plots.plot_ranges(run, clips="mse"))
    assert got["clip_min"] == rows["min"].tolist() and got["clip_max"] == rows["max"].tolist()
    with pytest.raises(ValueError, match="clips='imatrix_mse': .*attach it when recording"):
        plots.plot_ranges(run, clips="imatrix_mse")
    with pytest.raises(ValueError, match="names an observer; then the first argument must be a record"):
        plots.plot_ranges(ranges(run), clips="mse")


def test_a_table_without_percentiles_is_drawn_too(run):
    assert set(drawn(plots.plot_ranges(ranges(run).drop(columns=["p0.1", "p5"])))) == {"range"}


@pytest.mark.parametrize("base_name", ["input", "weight"])
def test_density_holds_every_value(run, base_name):
    stats = [run.tensors[m, base_name] for m in run.types if (m, base_name) in run.readers]
    counts, _ = densities(stats)
    assert np.allclose(counts.sum(0), [s.count for s in stats])
    logs = np.array(drawn(plots.plot_density(run, base_name))["log10_count"], dtype=float).T
    assert (np.isnan(logs) == (counts < 0.5)).all()
    assert np.allclose(logs[counts >= 0.5], np.log10(counts[counts >= 0.5]), atol=1e-3)


@pytest.mark.parametrize(
    "args",
    [
        None, INT4, preset("FP8").input_activations.model_copy(update={"observer": None}),
        QuantizationArgs(num_bits=8, symmetric=False, strategy="tensor")
    ],
    ids=["int8", "int4", "fp8", "asymmetric"],
)
def test_histogram(run, module, args):
    found = results_for(run, module, "input", None, args)
    got = drawn(plots.plot_histogram(run, module, args=args))
    assert np.isclose(sum(got.pop("count")), run[module, "input"].count)
    assert set(got) == {c.observer for c in found if c.scale is not None}
    for c in found:
        if c.scale is None: continue
        points = (code_points(c.args).double() - c.zero_point.double()) * c.scale.double()
        assert got[c.observer] == [[points[0].item(), points[-1].item()]]
        assert np.array_equal(stored_values(c), points.numpy())


def test_histogram_writes_scale_and_zero_point(run, module):
    ax = plots.plot_histogram(run, module, observers=["percentile"])
    found = results_for(run, module, observers=["percentile"])[0]
    assert f"scale {found.scale.item():.4g}, zero point {int(found.zero_point)}" in ax.texts[0].get_text()
    costs = compare_observers(run, ["percentile"]).query(f"module == '{module}' and base_name == 'input'").iloc[0]
    assert f"SQNR {costs.sqnr_db:.1f} dB" in ax.texts[0].get_text()


def test_the_attached_observer_is_not_asked_twice_and_not_for_other_arguments(run, module):
    attached = run.results[module, "input", "mse"]
    assert results_for(run, module, "input", ["mse"])[0] is attached
    assert "attach it when recording" in results_for(run, module, "input", ["mse"], INT4)[0].reason


def test_timeline_and_channels(run, module):
    stats = run[module, "input"]
    got = drawn(plots.plot_timeline(run, module))
    assert got["min"] == [[i, low] for i, (low, _) in stats.timeline.points.items()]
    assert got["max"] == [[i, high] for i, (_, high) in stats.timeline.points.items()]
    assert drawn(plots.plot_channels(run, module))["absmax"] == [[i, float(v)] for i, v in enumerate(stats.channels)]


@pytest.mark.parametrize("args", [None, INT4], ids=["int8", "int4"])
def test_observers(run, args):
    table = compare_observers(run, args=args)
    rows = table[table.base_name == "output"]
    wanted = rows.pivot(
        index="module", columns="observer", values="sqnr_db"
    ).loc[rows.module.unique(), rows.observer.unique()]
    for source in (run, table):
        got = drawn(plots.plot_observers(source, args=args, base_name="output"))
        assert np.allclose(np.array(got["sqnr_db"], dtype=float), wanted.to_numpy(float), atol=1e-3, equal_nan=True)
        names, modules = list(wanted.columns), list(wanted.index)
        assert {(modules[int(x)], names[int(y)]) for x, y in got["best"]} == set(
            zip(rows[rows.highest_sqnr].module, rows[rows.highest_sqnr].observer)
        )


def test_an_unknown_cell_says_why(run):
    ax = plots.plot_observers(run, args=INT4)
    said = [t.get_text() for legend in ax.figure.legends for t in legend.get_texts()]
    assert any("attach it when recording" in t for t in said)


@pytest.mark.parametrize("count, mark", [(3, "framed"), (60, "dot"), (200, "")])
def test_what_marks_the_best_is_said(count, mark):
    "A tie may stand on the smaller figure. With very many tensors nothing is marked."
    names = [f"layers.{i}.q" for i in range(count)]
    pair = dict(observer=["static_minmax", "percentile"], sqnr_db=[29.9, 30.0], highest_sqnr=[True, False], reason="",
                layer=0, kl=math.nan, best=False)
    table = pd.concat([pd.DataFrame(dict(module=name, base_name="input", **pair)) for name in names])
    said = [t.get_text() for legend in plots.plot_observers(table).figure.legends for t in legend.get_texts()]
    assert [text.startswith(f"{mark}: highest SQNR, the noise of this tensor") for text in said] == [True] * bool(mark)


def test_scales(run):
    model = make_model("llama_gqa")
    dead = "model.layers.0.self_attn.k_proj"
    with torch.no_grad(): model.get_submodule(dead).weight[[1, 5]] = 0
    seen = record(
        model, None, scheme="FP8_DYNAMIC", observers=["memoryless_minmax"], base_names=["weight"], progress=False
    )
    ax = plots.plot_scales(seen)
    got, modules = drawn(ax), list(seen.types)
    assert [modules[int(x)] for x, _ in got["eps"]] == [dead]
    for m, ends, (_, median) in zip(modules, got["range"], got["median"]):
        scale = seen.results[m, "weight", "memoryless_minmax"].scale.flatten()
        scale = np.delete(scale.numpy(), [1, 5]) if m == dead else scale.numpy()
        assert ends == [scale.min(), scale.max()] and np.isclose(median, np.median(scale))
    assert any("(2 of " in t.get_text() for legend in ax.figure.legends for t in legend.get_texts())


def test_experts_share_a_column():
    seen = record(
        make_model("mixtral"), make_batches(2), scheme="FP8_DYNAMIC", observers=["memoryless_minmax"],
        base_names=["weight"], progress=False
    )
    pooled = {re.sub(r"experts\.\d+", "experts.*", m) for m, _ in seen.tensors}
    assert len(drawn(plots.plot_scales(seen))["range"]) == len(pooled) < len(seen.tensors)


def test_convergence(run):
    table = convergence(run)
    for source in (run, table):
        for column, points in drawn(plots.plot_convergence(source)).items():
            for tokens, share in points:
                settled = (table[column] <= tokens) & (table[column] < table.tokens)
                assert share == pytest.approx(100 * settled.mean())


@pytest.mark.parametrize(
    "measure, base, worst", [("loss", "loss_original", "loss_quantized"), ("kl", None, "kl_quantized")]
)
def test_sensitivity(run, measure, base, worst):
    table = sensitivities(list(run.types))
    ax = plots.plot_sensitivity(table, measure)
    got, words = drawn(ax), dict(kl="KL").get(measure, measure)
    damage = table.attrs[worst] - table.attrs.get(base, 0.0)
    assert f"({words}; all quantized: +{damage:.3g})" in ax.get_title()
    assert ax.get_ylabel() == f"{words}, nats per token"
    assert all(f"{words} " in text.get_text() for text in ax.figure.legends[0].texts)
    assert [y for _, y in got["only"]] == (table[f"{measure}_only"] - table.attrs.get(base, 0.0)).tolist()
    assert [y for _, y in got["without"]] == (table.attrs[worst] - table[f"{measure}_without"]).tolist()


@pytest.mark.parametrize("measure", ["kl", "loss"])
@pytest.mark.parametrize("known", [0, 5, 14])
def test_what_was_not_measured_is_not_zero(run, measure, known):
    table = sensitivities(list(run.types)[:14])
    unknown = np.arange(14) >= known
    table.loc[unknown, ["loss_only", "loss_without", "kl_only", "kl_without"]] = np.nan
    table["kl_at_most"] = np.where(unknown, 0.25, np.nan)
    table.attrs["kl_unknown"] = 0.125
    ax = plots.plot_sensitivity(table, measure)
    got, title = drawn(ax), ax.get_title()
    assert [y is None for _, y in got["only"]] == [y is None for _, y in got["without"]] == unknown.tolist()
    bounds = [y for _, y in got.get("at_most", []) if y is not None]
    assert bounds == [0.25] * (14 - known if measure == "kl" else 0)
    words = [text.get_text() for text in ax.figure.legends[0].texts]
    assert ("not measured" in words) == unknown.any() and f"measured {known} of 14 modules" in title
    assert ("at most +0.125, as observed" in title) == (measure == "kl" and known < 14)
    grey = [p for p in ax.patches if p.get_width() == 14 - known]
    assert len(grey) == bool(unknown.any())
    to_png(ax)


# --- many, few, none ---

def thousand():
    names = [f"model.layers.{i // 7}.m{i % 7}" for i in range(1300)]
    bell = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    tensors = {(n, "input"): measure(bell * (100.0 if i == 777 else 1 + i % 5)) for i, n in enumerate(names)}
    return CalibrationRecord(tensors, dict.fromkeys(names, "Linear"), spans=((0, 1),), level_tokens={0: 200})


def test_more_tensors_than_dots():
    many = thousand()
    assert len(drawn(plots.plot_ranges(many))["range"]) == 1300
    columns = drawn(plots.plot_density(many))["log10_count"]
    assert len(columns) <= MAX_COLUMNS
    heights = [max(i for i, v in enumerate(c) if v is not None) for c in columns]
    assert int(np.argmax(heights)) == 777 // 3           # the outlier is not lost between two dots
    table = compare_observers(many, ["static_minmax", "percentile"])
    worst = table[table.observer == "static_minmax"].sqnr_db.to_numpy()
    shown = np.array(drawn(plots.plot_observers(table))["sqnr_db"])[:, 0]
    assert np.allclose(shown, packed(worst[None], np.fmin)[0][0], atol=1e-3)
    for ax in (plots.plot_ranges(many), plots.plot_density(many), plots.plot_scales(many, base_name="input"),
            plots.plot_sensitivity(sensitivities(list(many.types)))):
        assert len(ax.get_xticks()) <= 30


def test_nothing_recorded():
    none = CalibrationRecord()
    for plot in (
        plots.plot_ranges, plots.plot_density, plots.plot_observers, plots.plot_scales, plots.plot_convergence
    ):
        ax = plot(none)
        assert "ecorded yet" in ax.texts[0].get_text() and drawn(ax) == {}
        to_png(ax)
    assert "No module" in plots.plot_sensitivity(sensitivities([])).texts[0].get_text()


ODD = dict(
    zeros=torch.zeros(4, 8), broken=torch.full((4, 8), torch.nan), one=torch.ones(1, 1),
    infinite=torch.tensor([[1.0, torch.inf, -2.0]]), tiny=torch.full((2, 2), 1e-42), huge=torch.tensor([[3e38, -1.0]]),
    half=torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
)


@pytest.mark.parametrize("name", [*ODD, "unseen"])
def test_odd_tensors_alone(name):
    stats = measure(ODD[name]) if name in ODD else TensorStats()
    seen = CalibrationRecord({(name, "input"): stats}, {name: "Linear"}, spans=((0, 1),), level_tokens={0: 4})
    for plot in (plots.plot_ranges, plots.plot_density, plots.plot_observers, plots.plot_convergence):
        to_png(plot(seen))
    to_png(plots.plot_scales(seen, base_name="input"))
    for plot in (plots.plot_histogram, plots.plot_timeline, plots.plot_channels):
        ax = plot(seen, name)
        to_png(ax)
        if not stats.count: assert "nothing finite" in ax.texts[0].get_text()


def test_odd_tensors_together():
    seen = CalibrationRecord(
        {(n, "input"): measure(t) for n, t in ODD.items()}, dict.fromkeys(ODD, "Linear"), spans=((0, 1),),
        level_tokens={0: 4}
    )
    for plot in (plots.plot_ranges, plots.plot_density, plots.plot_observers, plots.plot_convergence):
        to_png(plot(seen))


def test_wrong_questions(run, module):
    for plot in (plots.plot_histogram, plots.plot_timeline, plots.plot_channels):
        with pytest.raises(KeyError, match="was not recorded; close to it are .*down_proj"):
            plot(run, module.replace("down", "downn"))
        with pytest.raises(TypeError, match="record must be a CalibrationRecord"): plot({}, module)
    for plot in (plots.plot_ranges, plots.plot_density, plots.plot_scales, plots.plot_observers):
        with pytest.raises(ValueError, match="base_name='q' was not recorded; there is 'input', "):
            plot(run, base_name="q")
    for plot in (
        plots.plot_ranges, plots.plot_density, plots.plot_scales, plots.plot_observers, plots.plot_convergence
    ):
        with pytest.raises(TypeError, match="record must be a CalibrationRecord"): plot({})
    table = sensitivities(["a", "b"])
    with pytest.raises(ValueError, match="measure='KL' must be"): plots.plot_sensitivity(table, "KL")
    with pytest.raises(ValueError, match="measure='kl'"):
        plots.plot_sensitivity(pd.DataFrame(table.to_dict("list")), "loss")
    with pytest.raises(ValueError, match="observer='msee' is unknown"): plots.plot_scales(run, "msee")


def test_a_timeline_says_why_there_is_none(run, module):
    assert "does not change" in plots.plot_timeline(run, module, "weight").texts[0].get_text()


# --- small things ---

def test_any_token_can_be_drawn():
    for token in ("$\\frac{1", "\n\t", "漢字", "<script>", "\ud800", "a" * 500, "$", "\\"):
        ax = plots.new_axes()
        ax.set_title(drawable(token), parse_math=False)
        to_png(ax)
    assert drawable("x\ny") == "“x↵y”"


def test_counts_between_loses_nothing():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * 3
    for histogram, values in ((Histogram.of(x), x), (Histogram.of(x.bfloat16()), x.bfloat16().float())):
        edges = symlog_edges(0.5, 20.0, 40)
        assert np.isclose(counts_between(histogram, edges).sum(), 10_000)
        exactly, _ = np.histogram(values, edges)
        assert abs(counts_between(histogram, edges) - exactly).max() < 60    # a bucket is cut in parts
    assert counts_between(Histogram(), np.array([0.0, 1.0])).tolist() == [0]


def test_colours_differ_in_grey():
    from qcal_nb.plots.style import shades
    for color in plots.BASE_COLORS.values():
        grey = shades(color)(np.linspace(0, 1, 50))[:, :3] @ [0.299, 0.587, 0.114]
        assert (np.diff(grey) < 0).all() and grey[0] - grey[-1] > 0.6
