"""Findings: each sentence against a record that was made so that it must, or must not, be said."""
import math
import re
from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from hypothesis import given
from hypothesis import strategies as st

from qcal_nb.analysis import Cost, Finding, Remedy, compare_observers, findings, findings_from, mark_best, ranges
from qcal_nb.analysis import tables_of
from qcal_nb.analysis.costs import COSTLY, input_remedies
from qcal_nb.analysis.finding import TOTAL_LIMIT, folded_names, ranked, spared, tensor_in_words, total_cost
from qcal_nb.analysis.positions import OUTLIER_THRESHOLD
from qcal_nb.analysis.summary import FEW_TOKENS, under_recipe
from qcal_nb.cli.commands import summary
from qcal_nb.forecasts import forecast_modules
from qcal_nb.lifecycle import QuantizationModifier, match_report
from qcal_nb.models import calibration_texts, inject_outliers, load_tiny_llama
from qcal_nb.records import CalibrationRecord, record
from qcal_nb.report import to_html
from qcal_nb.stats import TOO_DAMAGED, TensorStats, mean_of_parts, measure
from helpers import make_batches, make_model
from tests.modeling import mixtures
from tests.report.samples import EVIL


def said(run, words, **options): return next((f for f in findings(run, **options) if words in f.words), None)


def one_input(x, **fields):
    "A record of one tensor."
    return CalibrationRecord({("a", "input"): measure(x, 0)}, spans=((0, 1),), level_tokens={0: len(x)}, **fields)


@pytest.fixture(scope="module")
def tiny(): return load_tiny_llama()


@pytest.fixture(scope="module")
def static(tiny):
    "The embedded model in static int8, and the tables of its record."
    model, tokenizer = tiny
    options = dict(tokenizer=tokenizer, max_length=64, progress=False)
    run = record(model, calibration_texts()[:8], scheme="INT8_STATIC", **options)
    return run, tables_of(run, progress=False)


def with_costs(tables, own, other=math.nan):
    """The tables as if gradients had been recorded: what `static_minmax` costs by module (others 0), and what
    `histogram_mse` costs everywhere."""
    rows = tables.observers
    kl = rows.module.map(own).fillna(0.0).where(rows.observer == "static_minmax")
    kl = kl.mask(rows.observer == "histogram_mse", other).where(rows.base_name == "input")
    parts = [None if math.isnan(one) else (one,) * 5 for one in kl]
    return tables._replace(observers=mark_best(rows.assign(kl=kl, kl_parts=parts)))


DOWN = "model.layers.{}.mlp.down_proj".format


# --- what is wrong ---

def test_what_is_wrong_comes_first_and_by_name():
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    bad = x.clone()
    bad[3, 1] = torch.nan
    run = CalibrationRecord(
        {("fine", "input"): measure(x, 0), ("bad", "input"): measure(bad, 0), ("never", "input"): TensorStats()},
        spans=((0, 1),),
        level_tokens={0: 8},
        expert_tokens={"experts.0": 3, "experts.1": 0},
    )
    found = findings(run)
    assert [f.warning for f in found] == sorted((f.warning for f in found), reverse=True)
    assert said(run, "not finite in 1 tensor.").tensors == (
        "bad (input): 1 NaN, 0 infinite, the first nan at (3, 1) of batch 0",
    )
    assert said(run, "not finite").keys == (("bad", "input"),)
    assert said(run, "Never seen: 1 tensor.").tensors == ("never (input)",)
    assert said(run, "Not chosen by any token: 1 expert.").tensors == ("experts.1",)


def test_a_clean_record_has_no_warnings():
    run = record(make_model("llama_gqa"), make_batches(4), progress=False)
    assert not [f for f in findings(run) if f.warning] and said(run, "Was it enough data (4 batches, 128 tokens)?")
    assert said(run, "Left out") is None and said(run, "pieces of the calibration text") is None


# --- outliers and channels ---

@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_outliers_are_counted_as_the_table_counts_them(factor):
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    x[17, 3] = factor * x.abs().max()
    run = one_input(x)
    found, many = said(run, "Outliers in"), int((ranges(run).outlier_ratio > OUTLIER_THRESHOLD).sum())
    assert many == int(factor > 1) and found.words.startswith(f"Outliers in {many or 'none'} of 1 input")
    assert len(found.tensors) == len(found.keys) == many
    loud = said(run, "Outlier channels")
    assert (loud is not None) == (factor > 1) and (loud is None or "channel 3" in loud.tensors[0])


@pytest.mark.parametrize("format, told", [
    (dict(num_bits=8, symmetric=True, strategy="tensor"), "less than a third of its levels"),
    (dict(num_bits=8, symmetric=False, strategy="tensor"), ""),         # there it may be two thirds
    (dict(num_bits=8, type="float", strategy="tensor"), ""),            # whose levels are not evenly spaced
])
def test_levels_are_counted_where_they_are_evenly_spaced(format, told):
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    x[17, 3] = 100.0
    found = said(one_input(x), "Outliers in 1", args=QuantizationArgs(**format))
    assert ("third of its levels" in found.words) == bool(told) and told in found.words


def test_finer_scales_are_for_weights_that_have_one():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = 40.0
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    with torch.no_grad(): model[0].weight.copy_(weight)
    whole = record(model, None, base_names=["weight"], progress=False)
    channels = record(model, None, scheme="W8A8", base_names=["weight"], progress=False)
    assert [r.words[:17] for r in said(whole, "Outliers in 1 of 1 weight").remedies] == ["use finer scales "]
    assert not said(channels, "Outliers in 1 of 1 weight").remedies


def test_injected_channels_are_named(tiny):
    model, tokenizer = load_tiny_llama()
    channels = set(sum(inject_outliers(model).values(), []))
    run = record(model, calibration_texts()[:3], tokenizer=tokenizer, max_length=128, progress=False)
    found = said(run, "Outlier channels")
    assert any(f"channel {c} (" in found.words for c in channels)
    assert said(run, "pieces of the calibration text").warning


def test_dead_channels_are_counted():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    x[:, [2, 5]] = 0.0
    found = said(one_input(x), "Dead channels")
    assert found.words.startswith("Dead channels: 2 channels in 1 activation had") and found.keys == (("a", "input"),)
    assert found.tensors == ("a (input): 2 of 8 channels",)
    x[0, 2], x[0, 5] = 1e-30, torch.nan
    assert said(one_input(x), "Dead channels") is None      # one is alive, of the other nobody knows


# --- experts ---

def test_experts_that_few_tokens_chose():
    model = mixtures.make("llama4")
    run = record(model, make_batches(8), progress=False)
    few = {name: n for name, n in run.expert_tokens.items() if 0 < n < FEW_TOKENS}
    found = said(run, "Chosen by fewer than 100 tokens")
    assert 0 < len(few) and f": {len(few)} expert" in found.words and not found.warning
    assert found.tensors[0].endswith(f": {min(few.values())} tokens") and len(found.tensors) == len(few)
    assert {key[0].rpartition(".")[0] for key in found.keys} == set(few)
    assert said(record(model, make_batches(8, shape=(32, 32)), progress=False), "Chosen by fewer") is None


def test_an_input_that_many_experts_read_has_a_short_name():
    run = record(mixtures.make("mixtral"), make_batches(4), progress=False)
    lines = [line for found in findings(run) for line in str(found).splitlines() if "experts.{" in line]
    assert lines and all("model.layers.0.mlp.experts.{0-5}.gate/up_proj (input)" in line for line in lines
                         if "layers.0" in line)


# --- levels, clipping, forecasts ---

def test_few_levels_are_a_warning_and_no_statement_of_harm(static):
    run, tables = static
    rows = tables.observers.query("observer == 'static_minmax' and base_name == 'input' and effective_bits < 2.5")
    found = said(run, "Few levels")
    assert found.warning and 0 < len(rows) == len(found.keys) and f"in {len(rows)} of 16 tensors" in found.words
    assert set(found.keys) == set(zip(rows.module, rows.base_name)) and found.cost == ""
    assert "SQNR cannot judge this" in found.words and "does not mean that the model suffers" in found.words
    bits = [float(re.search(r": (\S+) bits", name)[1]) for name in found.tensors]
    assert bits == sorted(bits)


def test_few_levels_are_for_eight_bits_and_static_scales(static, tiny):
    model, tokenizer = tiny
    run, _ = static
    four = QuantizationArgs(num_bits=4, symmetric=True, strategy="tensor")
    assert said(run, "Few levels", args=four) is None
    options = dict(tokenizer=tokenizer, max_length=64, progress=False)
    for scheme in ("W8A8", "W4A16"):
        found = record(model, calibration_texts()[:8], scheme=scheme, **options)
        assert said(found, "Few levels") is None and said(found, "Clipped") is None
        assert "the recipe has no static scale for them" in said(found, "at the 16 inputs of 28 modules").words
    assert said(one_input(torch.tensor([[1.0, 2.0]])), "Few levels") is None       # two values


def test_few_levels_need_no_warning_where_a_forecast_judges(static):
    run, tables = static
    found = findings_from(run, with_costs(tables, {DOWN(0): 0.02, DOWN(1): 0.001}))
    assert not [f for f in found if f.words.startswith("Few levels")]
    cost = next(f for f in found if f.words.startswith("Quantizing"))
    assert f"one of them costs more than {COSTLY:g} nats" in cost.words and "0.021 nats of KL" in cost.words
    assert cost.keys == ((DOWN(0), "input"),) and cost.kl == 0.02 and not cost.warning
    assert cost.cost == "Forecast cost: 0.02 nats of KL a token."


def test_remedies_are_ranked_by_what_they_save(static):
    run, tables = static
    found = findings_from(run, with_costs(tables, {DOWN(0): 0.02, DOWN(1): 0.03}, 0.004))
    cost = next(f for f in found if f.words.startswith("Quantizing"))
    spare, other, *rest = cost.remedies
    assert spare.code == f"ignore=['lm_head', {spared([DOWN(0), DOWN(1)]).removeprefix('ignore=[')}"
    assert spare.saves == pytest.approx(0.05) and other.saves == pytest.approx(0.05 - 0.008)
    assert "histogram_mse at 2" in other.words and [one.saves for one in rest] == [None, None]
    assert cost.keys == ((DOWN(1), "input"), (DOWN(0), "input"))        # the costliest first
    winner = next(f for f in found if "least forecast cost to the model at the 16 inputs" in f.words)
    assert "static_minmax for 14 of 16, histogram_mse for 2" in winner.words
    assert not [f for f in found if "(SQNR) at the 16" in f.words]


def test_what_is_too_damaged_has_no_number(static):
    run, tables = static
    found = findings_from(run, with_costs(tables, {DOWN(0): 0.4, DOWN(1): 0.01}, 0.004))
    cost = next(f for f in found if f.words.startswith("Quantizing"))
    assert cost.kl is None and cost.too_damaged and cost.cost == "Too damaged to forecast: measure."
    assert cost.tensors[0].startswith(f"{DOWN(0)} (input): too damaged to forecast") and "0.4" not in str(cost)
    assert [one.words.split()[0] for one in cost.remedies] == ["spare", "use", "give", "take"]
    assert all(one.saves is None for one in cost.remedies)
    assert "histogram_mse at 1)" in cost.remedies[-1].words     # nothing is said about the one that is too damaged
    assert not found[0].warning or "text" in found[0].words
    assert [f for f in found if not f.warning][0].too_damaged                       # the most damaged comes first


def test_clipped_shares_are_those_of_the_recipes_own_observer(tiny):
    model, tokenizer = tiny
    options = dict(tokenizer=tokenizer, max_length=64, progress=False)
    cutting = QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"], input_observer="entropy")
    run = record(model, calibration_texts()[:4], scheme=cutting, **options)
    rows = compare_observers(run).query("observer == 'entropy' and base_name == 'input' and clipped > 0.001")
    found = said(run, "Clipped")
    assert 0 < len(rows) == len(found.keys) and all("with entropy" in name for name in found.tensors)
    plain = record(model, calibration_texts()[:4], scheme="INT8_STATIC", **options)
    assert said(plain, "Clipped") is None


def test_gradients_say_what_inputs_cost_and_what_remedies_save(tiny):
    model, tokenizer = tiny
    options = dict(tokenizer=tokenizer, max_length=64, progress=False)
    run = record(model, calibration_texts()[:10], scheme="INT8_STATIC", gradients=True, **options)
    found = said(run, "Outliers in")
    rows = compare_observers(run).query("observer == 'minmax' and base_name == 'input'").set_index("module").kl
    assert found.kl == pytest.approx(sum(rows[module] for module, _ in found.keys))
    saved = [one.saves for one in found.remedies]
    costs = run.forecasts.schemes["recorded"]
    weights = sum(mean_of_parts(costs[module].weights).item() for module, _ in found.keys)
    assert saved == sorted(saved, reverse=True) and min(saved) > 0 and saved[0] == pytest.approx(found.kl + weights)
    assert {one.words.split()[0] for one in found.remedies} == {"spare", "use", "give", "take"}
    assert said(run, "Few levels") is None and said(run, "(SQNR) at the 16 inputs") is None
    kept = run.without_gradients()
    again = said(kept, "Outliers in")   # what scales of another format cost is not known any more
    assert again.kl == pytest.approx(found.kl) and again.remedies[0].saves == pytest.approx(saved[0])
    assert [one.saves for one in again.remedies if one.words.split()[0] in ("use", "give")] == [None, None]


def test_a_forecast_of_fp8_and_of_tokens_is_that_of_the_scheme(tiny):
    "What remedies save is the difference to what `forecast` says of these schemes."
    model, tokenizer = tiny
    options = dict(tokenizer=tokenizer, max_length=64, progress=False)
    run = record(model, calibration_texts()[:10], scheme="INT8_STATIC", gradients=True, **options)
    under = under_recipe(run, tables_of(run, progress=False))
    keys = [(DOWN(i), "input") for i in range(4)]
    saves = {one.words.split()[0]: one.saves for one in input_remedies(under, keys)}
    modules = [f"re:.*{module.removeprefix('model')}$" for module, _ in keys]
    for word, scheme in (("use", "FP8"), ("give", "W8A8")):
        observer = "static_minmax" if scheme == "FP8" else None
        recipe = QuantizationModifier(scheme=scheme, targets=modules, input_observer=observer)
        inputs = forecast_modules(run, model, recipe).set_index("module").inputs
        assert under.cost(keys).kl - saves[word] == pytest.approx(sum(inputs[module] for module, _ in keys), rel=0.05)


@given(st.lists(st.floats(0, 0.6), max_size=6))
def test_a_total_has_a_number_only_where_a_forecast_holds(each):
    cost = total_cost(each)
    broken = any(kl >= TOO_DAMAGED for kl in each) or sum(each) >= TOTAL_LIMIT
    assert cost == (Cost(None, True) if broken else Cost(sum(each)) if each else Cost())
    assert total_cost([*each, math.nan]) == (Cost(None, True) if broken else Cost())


# --- which observer ---

def test_the_observers_finding_is_the_comparison(tiny):
    model, tokenizer = tiny
    run = record(model, calibration_texts()[:2], tokenizer=tokenizer, max_length=64, progress=False)
    four = QuantizationArgs(num_bits=4, symmetric=True, strategy="tensor")
    table = compare_observers(run, args=four).query("base_name == 'input'")
    counts = table[table.highest_sqnr].observer.value_counts()
    found = said(run, "at the 16 inputs of 28 modules (int4", args=four)
    assert all(f"{name} for {n}" in found.words for name, n in counts.items()) and "below 20 dB" in found.words
    assert "says nothing about the model" in found.words
    limited = compare_observers(run, args=four).at_limit.sum()
    assert f"for {limited} tensor" in said(run, "ended at the smallest range", args=four).words


def test_no_finding_calls_anything_best_or_harmless(static, tiny):
    run, tables = static
    told = [*findings(run), *findings_from(run, with_costs(tables, {DOWN(0): 0.02}, 0.001))]
    assert not [f for f in told if re.search(r"\b(best|recommend\w*|harmless|safe)\b", str(f), re.I)]


# --- a finding in print ---

@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=9), st.booleans())
def test_a_finding_names_three_and_counts_the_rest(tensors, warning):
    lines = str(Finding("So it is.", tuple(tensors), warning)).splitlines()
    assert lines[0].startswith("! ") == warning and len(lines) == 1 + min(3, len(tensors)) + (len(tensors) > 3)
    assert len(tensors) <= 3 or lines[-1].strip() == f"and {len(tensors) - 3} more"


def test_the_same_words_in_python_on_the_command_line_and_in_the_report(static, tmp_path):
    run, _ = static
    text = to_html(run, tmp_path / "page.html", progress=False).read_text(encoding="utf-8")
    page = re.sub(r"<[^>]+>", "\n", text).replace("&#x27;", "'").replace("&quot;", '"').replace("&amp;", "&")
    for found in findings(run):
        assert found.words in page and all(name in page for name in found.tensors)
        assert all(line in page for line in found.advice)
    first = findings(run)[0]
    command_line = summary(run, tmp_path, QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"]), False)
    assert f"- {first}" in command_line and first.remedies


def test_the_report_escapes_remedies(tmp_path):
    stats = measure(torch.randn(8, 64, 8, generator=torch.Generator().manual_seed(0)), 0)
    evil = dict(channel=3, value=400.0, token=EVIL)
    top = tuple(replace(e, position=(place, 0), **evil) for place, e in enumerate(stats.top))
    level = replace(stats.levels[0], max=400.0)
    key = f"{EVIL}.a", "input"
    run = CalibrationRecord({key: replace(stats, top=top, levels={0: level})}, {key[0]: "Linear"}, spans=((0, 1),))
    found = said(run, "Massive activations")
    assert "<script>window" in found.words and "<script>window" in found.remedies[0].code
    page = to_html(run, tmp_path / "a.html", progress=False).read_text(encoding="utf-8")
    assert "<script>window" not in page and "<img src=x" not in page and "&lt;script&gt;window" in page


numbered = st.tuples(st.integers(0, 12), st.integers(0, 3), st.sampled_from(["a", "b.c"]))


@given(st.lists(numbered, min_size=1, max_size=30), st.booleans())
def test_the_pattern_spares_these_modules_and_no_others(picked, has_head):
    name = "m.{}.e.{}.{}".format
    wanted = {name(*one) for one in picked}
    every = {name(i, j, k) for i in range(13) for j in range(4) for k in ("a", "b.c")}
    targets = eval(spared(sorted(wanted), ["lm_head"] * has_head).removeprefix("ignore="))
    assert targets[:has_head] == ["lm_head"] * has_head
    def hit(target, module): return target == module or target.startswith("re:") and re.match(target[3:], module)
    assert {module for module in every if any(hit(t, module) for t in targets)} == wanted


def test_the_pattern_is_a_recipes_own(tiny):
    code = spared([DOWN(1), DOWN(3), "model.layers.0.mlp.up_proj"], ["lm_head"])
    recipe = eval(f"QuantizationModifier(scheme='FP8', {code})")
    report = match_report(tiny[0], recipe)
    assert {m.module for m in report if not m.matched and m.type == "Linear"} == {
        DOWN(1), DOWN(3), "model.layers.0.mlp.up_proj", "lm_head"}


def test_names_that_differ_in_numbers_are_folded():
    assert folded_names(DOWN(i) for i in (1, 2, 8, 9, 11, 27, 28)) == ["model.layers.{1,2,8,9,11,27,28}.mlp.down_proj"]
    assert folded_names(["a", "b.1", "b.2", "b.3", "c.4.d"]) == ["a", "b.{1-3}", "c.4.d"]
    assert tensor_in_words([f"x.{i}.{p}_proj" for i in range(4) for p in ("k", "v")]) == "x.{0-3}.k/v_proj"
    assert tensor_in_words([f"{one}.p" for one in "abcde"]) == "a.p, b.p, c.p and 2 more"


def test_remedies_without_a_saving_stay_in_their_order():
    some = [Remedy("a"), Remedy("b", 0.1), Remedy("c"), Remedy("d", 0.2)]
    assert [one.words for one in ranked(some)] == ["d", "b", "a", "c"]
    assert str(Remedy("a")) == "a; what that saves is not estimated" and str(Remedy("a", 0.1, "b=1")) == (
        "a, which saves 0.1 nats: b=1")


def test_nothing_and_not_a_record():
    assert [f.words for f in findings(CalibrationRecord())] == ["Nothing was recorded."]
    with pytest.raises(TypeError, match="record must be a CalibrationRecord, got str"): findings("run.safetensors")


def test_weights_alone():
    run = record(make_model("llama_gqa"), None, base_names=["weight"], progress=False)
    assert all(key[1] == "weight" for found in findings(run) for key in found.keys)
    assert said(run, "at the 14 weights (") and said(run, "Was it enough data") is None


def test_keys_are_tensors_of_the_record(static):
    run, _ = static
    for found in findings(run):
        assert set(found.keys) <= set(run.readers) and (not found.tensors or len(found.keys) == len(found.tensors))
