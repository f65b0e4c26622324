"""Sensitivity, guided: which modules are measured, in which order, until when; and what is said of the others."""
import json
import math

import pandas as pd
import pytest
from helpers import differences, fingerprint, make_batches, make_model

from qcal_nb.evaluate import compare_schemes, forecast, forecast_modules, sensitivity
from qcal_nb.evaluate.sensitivities import SENSITIVITY_COLUMNS, SensitivityRows, sensitivity_table
from qcal_nb.lifecycle import QuantizationModifier, phase_of
from qcal_nb.models import calibration_texts, heldout_texts, load_tiny_llama
from qcal_nb.records import record
from tests.evaluate.samples import NVFP4A16, QUIET, W4, W4A4, Counting

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def stop_after(n):
    "A tick that ends the work after so many modules."
    def tick(table):
        if table.attrs["measured"] == n: raise KeyboardInterrupt
    return tick


@pytest.fixture
def told(llama):
    made = record(llama, make_batches(5), gradients=True, **QUIET)
    return forecast_modules(made, llama, W4)


# --- which modules ---

@pytest.mark.parametrize("modules, expected", [
    ("re:.*down_proj", ["0.mlp.down_proj", "1.mlp.down_proj"]),
    (r"re:model\.layers\.1\.self_attn", [f"1.self_attn.{name}_proj" for name in "qkvo"]),
    (["model.layers.0.mlp.up_proj", "re:.*1.*q_proj"], ["0.mlp.up_proj", "1.self_attn.q_proj"]),
    (pd.Series(["model.layers.1.mlp.up_proj"]), ["1.mlp.up_proj"]),
])
def test_only_the_named_modules_are_measured(llama, evals, modules, expected):
    whole = sensitivity(llama, None, W4, eval_data=evals, **QUIET).set_index("module")
    some = sensitivity(llama, None, W4, eval_data=evals, modules=modules, **QUIET).set_index("module")
    assert some.index.tolist() == [f"model.layers.{name}" for name in expected]
    pd.testing.assert_frame_equal(some, whole.loc[some.index], check_exact=True)
    assert some.attrs["measured"] == some.attrs["of"] == len(expected) and some.attrs["unknown"] == []


def test_a_fused_unit_is_named_as_in_the_table(llama, evals):
    name = "model.layers.1.self_attn.q_proj+k_proj+v_proj"
    for modules in (name, "re:.*1.*k_proj"):
        assert sensitivity(llama, None, NVFP4A16, eval_data=evals, modules=modules, **QUIET).module.tolist() == [name]


def test_experts_are_named_as_they_are_when_taken_apart(evals):
    model = make_model("mixtral")
    before = fingerprint(model)
    table = sensitivity(model, None, W4, eval_data=evals[:1], modules="re:.*layers.0.*experts.2", **QUIET)
    assert len(table) == 3 and table.module.str.contains("experts.2").all()
    assert [d for d in differences(before, fingerprint(model)) if "experts.tokens" not in d] == []


@pytest.mark.parametrize("modules, error, words", [
    ("re:.*down_prj", ValueError, r"'re:\.\*down_prj' matches none of the 14 quantized modules; they are called q"),
    (["re:.*down_proj", "model.layers.0"], ValueError, r"'re:model\\.layers\\.0\\..\*' matches the 7 in it"),
    ("model.layers.0.mlp.down_pro", ValueError, "close to it are model.layers.0.mlp.down_proj"),
    ("lm_head", ValueError, "'lm_head' matches none of the 14 quantized modules"),
    ("re:(", ValueError, "'re:.' is not a regular expression"),
    ([], ValueError, "modules is empty"),
    ([3], TypeError, "names and patterns .re:.*, got a int"),
])
def test_modules_that_are_none_are_named_before_anything_runs(llama, evals, modules, error, words):
    counter, before = Counting(llama), fingerprint(llama)
    with pytest.raises(error, match=words):
        sensitivity(llama, None, W4, eval_data=evals, modules=modules, **QUIET)
    assert counter.n == 0 and differences(before, fingerprint(llama)) == []


# --- in which order ---

def test_a_forecast_gives_the_order_and_a_column(llama, evals, told):
    table = sensitivity(llama, None, W4, eval_data=evals, forecast=told, **QUIET)
    assert list(table.columns) == [*SENSITIVITY_COLUMNS[:6], "forecast", *SENSITIVITY_COLUMNS[6:]]
    assert table.forecast.tolist() == told.set_index("module").kl[table.module].tolist()
    assert table.attrs["order"] == told.sort_values("kl", ascending=False, kind="stable").module.tolist()
    plain = sensitivity(llama, None, W4, eval_data=evals, **QUIET)
    pd.testing.assert_frame_equal(table[SENSITIVITY_COLUMNS], plain, check_exact=True)


def test_the_forecast_of_a_fused_unit_is_that_of_its_modules(llama, evals):
    made = record(llama, make_batches(5), gradients=True, **QUIET)
    told = forecast_modules(made, llama, NVFP4A16).set_index("module").kl
    table = sensitivity(llama, None, NVFP4A16, eval_data=evals, forecast=told.reset_index(), budget_s=0, **QUIET)
    assert table.forecast.tolist() == [pytest.approx(told[list(names)].sum()) for names in table.modules]


def test_without_a_forecast_kinds_and_blocks_give_the_order(llama, evals):
    table = sensitivity(llama, None, W4, eval_data=evals, **QUIET)
    groups = pd.DataFrame(table.attrs["groups"])
    assert groups.level.tolist() == ["all", *["kind"] * 7, *["block"] * 2, *["rest"] * 2]
    assert groups.name[1:8].tolist() == KINDS and groups["size"].tolist() == [14, *[2] * 7, 7, 7, 10, 6]
    cost = groups.set_index("name").kl_only
    def suspicion(name):
        return -cost[name.rpartition(".")[2]] * cost[name[:len("model.layers.0")]]
    assert table.attrs["order"] == sorted(table.module, key=suspicion)


def test_groups_are_those_of_models_quantized_so(llama, evals):
    table = sensitivity(llama, None, W4, eval_data=evals, **QUIET)
    groups = pd.DataFrame(table.attrs["groups"]).set_index("name")
    first = table.attrs["order"][:8]
    chosen = {"v_proj": ["re:.*v_proj"], "model.layers.1": [r"re:model\.layers\.1\."],
              "all but the first 8": [name for name in table.module if name not in first]}
    recipes = {name: QuantizationModifier(scheme=W4, targets=targets) for name, targets in chosen.items()}
    direct = compare_schemes(llama, None, recipes, eval_data=evals, **QUIET).set_index("scheme")
    for name in chosen: assert (direct.loss[name], direct.kl[name]) == (groups.loss_only[name], groups.kl_only[name])
    whole = table.attrs["loss_quantized"], table.attrs["kl_quantized"]
    assert (groups.loss_only["all"], groups.kl_only["all"]) == whole


def a_table_of_schemes(llama):
    return forecast(record(llama, make_batches(5), gradients=True, **QUIET), llama, [W4])


@pytest.mark.parametrize("change, error, words", [
    (lambda told, model: told.to_dict(), TypeError, "must be what forecasts.forecast_modules returned, got dict"),
    (lambda told, model: a_table_of_schemes(model), TypeError, "got a table of scheme, kl, weights"),
    (lambda told, model: told.iloc[1:], ValueError, "tells no KL of 1 of the modules to measure, such as model.l"),
    (lambda told, model: told.assign(kl=math.nan), ValueError, "tells no KL of 14 of the modules"),
])
def test_another_table_is_no_forecast(llama, evals, told, change, error, words):
    bad, counter = change(told, llama), Counting(llama)
    with pytest.raises(error, match=words):
        sensitivity(llama, None, W4, eval_data=evals, forecast=bad, **QUIET)
    assert counter.n == 0 and phase_of(llama) == "original"


def test_a_forecast_of_another_preset_is_refused(llama, evals):
    other = forecast_modules(record(llama, make_batches(5), gradients=True, **QUIET), llama, "W8A8")
    with pytest.raises(ValueError, match="forecast is that of W8A8, but the scheme is FP8_DYNAMIC: make it with forec"):
        sensitivity(llama, None, "FP8_DYNAMIC", eval_data=evals, forecast=other, **QUIET)
    with pytest.raises(TypeError, match="modules must be names and patterns .*, got a int"):
        sensitivity(llama, None, "W8A8", eval_data=evals, modules=3, **QUIET)
    assert phase_of(llama) == "original"


def test_a_forecast_need_only_know_what_is_measured(llama, evals, told):
    down = told[told.module.str.contains("down_proj")]
    table = sensitivity(llama, None, W4, eval_data=evals, forecast=down, modules="re:.*down_proj", **QUIET)
    assert table.kl_only.notna().all() and len(table) == 2


# --- until when ---

class Clock:
    "A clock that moves on by a second whenever it is looked at."

    def __init__(self): self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


@pytest.mark.parametrize("budget_s", [0, 1, 5, 10, 12, math.inf, None])
def test_a_budget_ends_the_work_at_a_finished_row(llama, evals, monkeypatch, budget_s):
    whole = sensitivity(llama, None, W4, eval_data=evals, **QUIET)
    monkeypatch.setattr("qcal_nb.evaluate.sensitivities.monotonic", Clock())
    before, seen = fingerprint(llama), []
    table = sensitivity(llama, None, W4, eval_data=evals, budget_s=budget_s, tick=seen.append, **QUIET)
    rows = 7 + 2 + 14 + 2
    done = min(rows, max(0, budget_s - 1)) if budget_s is not None else rows    # each look takes a second
    assert len(seen) == done and differences(before, fingerprint(llama)) == []
    numbers = list(SENSITIVITY_COLUMNS[4:8])
    known = table.kl_only.notna()
    pd.testing.assert_frame_equal(table[known][numbers], whole[known][numbers], check_exact=True)
    assert table[~known][numbers].isna().all(axis=None) and table.module.equals(whole.module)
    assert table.type.tolist() == ["Linear"] * 14 and table.kl_at_most.notna().tolist() == (~known).tolist()
    assert table.attrs["measured"] == known.sum() and table.attrs["of"] == 14
    assert sorted(table.attrs["unknown"]) == sorted(table.module[~known])
    assert table.attrs["kl_quantized"] == whole.attrs["kl_quantized"]
    if done: pd.testing.assert_frame_equal(seen[-1], table, check_exact=True)


@pytest.mark.parametrize("budget_s, error, words", [
    (-1, ValueError, "budget_s=-1 must be at least 0 seconds"), (math.nan, ValueError, "budget_s=nan must be"),
    ("5 min", TypeError, "budget_s must be a number of seconds or None, got str"), (True, TypeError, "got bool"),
])
def test_a_budget_that_is_none(llama, evals, budget_s, error, words):
    with pytest.raises(error, match=words): sensitivity(llama, None, W4, eval_data=evals, budget_s=budget_s, **QUIET)


def test_a_tick_that_cannot_be_called(llama, evals):
    with pytest.raises(TypeError, match="tick must be a function that takes the table so far, got int"):
        sensitivity(llama, None, W4, eval_data=evals, tick=3, **QUIET)


def test_an_interrupt_in_a_tick_gives_the_answer_so_far(llama, evals, told):
    before = fingerprint(llama)
    table = sensitivity(llama, None, W4, eval_data=evals, forecast=told, tick=stop_after(5), **QUIET)
    assert table.attrs["measured"] == 5 and table.attrs["unknown"] == table.attrs["order"][5:]
    assert set(table.module[table.kl_only.notna()]) == set(table.attrs["order"][:5])
    assert differences(before, fingerprint(llama)) == []


def test_an_error_in_a_tick_is_raised_and_the_model_is_as_before(llama, evals):
    before = fingerprint(llama)
    def tick(table): raise RuntimeError("a picture failed")
    with pytest.raises(RuntimeError, match="a picture failed"):
        sensitivity(llama, None, W4, eval_data=evals, tick=tick, **QUIET)
    assert differences(before, fingerprint(llama)) == []


def test_an_interrupt_while_calibrating_knows_nothing(llama, data, evals):
    Counting(llama, 1)
    table = sensitivity(llama, data, "FP8", eval_data=evals, **QUIET)
    assert len(table) == 0 and list(table.columns) == SENSITIVITY_COLUMNS
    assert (table.attrs["measured"], table.attrs["of"], table.attrs["groups"]) == (0, 0, [])
    assert math.isnan(table.attrs["kl_unknown"])


# --- what is said of the unknown ---

def test_bounds_are_those_of_the_cheapest_group_around(llama, evals):
    whole = sensitivity(llama, None, W4, eval_data=evals, **QUIET)
    cost = {row["name"]: row["kl_only"] for row in whole.attrs["groups"]}
    part = sensitivity(llama, None, W4, eval_data=evals, tick=stop_after(5), **QUIET)
    unknown = part[part.kl_only.isna()]
    for row in unknown.itertuples():
        around = [cost[row.module.rpartition(".")[2]], cost[f"model.layers.{row.layer}"], cost["all but the first 4"]]
        assert row.kl_at_most == min(around)
    assert part.attrs["kl_unknown"] == cost["all but the first 4"]
    assert whole.attrs["kl_unknown"] == 0 and whole.kl_at_most.isna().all()
    nothing = sensitivity(llama, None, W4, eval_data=evals, budget_s=0, **QUIET)
    assert set(nothing.kl_at_most) == {nothing.attrs["kl_unknown"]} == {cost["all"]}


def test_a_kl_that_is_no_number_says_nothing_about_its_parts():
    found = SensitivityRows(None)
    units = [[f"layers.{i}.{name}"] for i in range(2) for name in ("q_proj", "up_proj")]
    found.add(dict(loss_original=2.0, loss_quantized=math.nan, kl_quantized=math.nan, units=units))
    assert sensitivity_table(found).kl_at_most.isna().all()
    for kl in (0.5, math.nan, 0.25, math.nan):
        step = next(found.missing())
        found.add(dict(level=step.level, name=step.name, modules=list(step.modules), loss_only=kl, kl_only=kl))
    table = sensitivity_table(found)
    assert table.kl_at_most.tolist()[:3] == [0.25, 0.25, 0.5] and math.isnan(table.kl_at_most[3])
    assert math.isnan(table.attrs["kl_unknown"])
    assert table.attrs["order"][:3] == ["layers.0.up_proj", "layers.1.q_proj", "layers.1.up_proj"]


# --- the file ---

def test_rows_in_a_file_are_good_for_any_order_and_choice(llama, evals, told, tmp_path):
    path = tmp_path/"rows.jsonl"
    whole = sensitivity(llama, None, W4, eval_data=evals, **QUIET)
    call = dict(eval_data=evals, path=path, **QUIET)
    some = sensitivity(llama, None, W4, modules="re:.*1.*(down|up)_proj", **call)
    assert len(some) == 2
    sensitivity(llama, None, W4, forecast=told, tick=stop_after(5), **call)
    counter = Counting(llama)
    resumed = sensitivity(llama, None, W4, **call)
    assert resumed.attrs == whole.attrs and 0 < counter.n < 3 * (2 + 7 + 2 + 2 * 14 + 2)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    again = sensitivity(llama, None, W4, modules="re:.*1.*(down|up)_proj", **call)
    pd.testing.assert_frame_equal(again, some, check_exact=True)
    assert again.attrs == some.attrs


def test_without_time_the_file_is_only_read(llama, data, evals, tmp_path):
    call = dict(eval_data=evals, path=tmp_path/"rows.jsonl", **QUIET)
    part = sensitivity(llama, data, "FP8", tick=stop_after(3), **call)
    counter = Counting(llama)
    read = sensitivity(llama, data, "FP8", budget_s=0, **call)
    assert counter.n == 0 and read.attrs == part.attrs and read.kl_only.equals(part.kl_only)


def test_a_file_of_version_1_is_taken_over(llama, evals, tmp_path):
    path = tmp_path/"rows.jsonl"
    call = dict(eval_data=evals, path=path, **QUIET)
    whole = sensitivity(llama, None, W4, **call)
    first, common, *rows = path.read_text().splitlines()
    modules = [row for row in rows if "level" not in json.loads(row)]
    old = [json.dumps(json.loads(first) | dict(version=1)), common, *modules[:9]]
    path.write_text("\n".join(old) + "\n" + modules[9][:30])
    counter = Counting(llama)
    again = sensitivity(llama, None, W4, **call)
    pd.testing.assert_frame_equal(again, whole, check_exact=True)
    assert again.attrs == whole.attrs and counter.n == 3 * (1 + 7 + 2 + 2 * 5 + 2)
    lines = path.read_text().splitlines()
    assert lines[0] == first and sorted(lines) == sorted([first, common, *rows])


def test_a_path_where_no_file_can_be_is_refused_in_words(llama, data, evals, tmp_path):
    counter, before = Counting(llama), fingerprint(llama)
    for path, error, words in ((tmp_path, IsADirectoryError, "is a folder; a file is to be written, name it"),
                               (tmp_path/"no"/"rows.jsonl", FileNotFoundError, "there is no folder .*; create it"),
                               ("/dev/null", ValueError, "is neither a file nor free, but a device")):
        with pytest.raises(error, match=words): sensitivity(llama, data, "FP8", eval_data=evals, path=path, **QUIET)
    assert counter.n == 0 and differences(before, fingerprint(llama)) == []


# --- on a model that has learned something ---

# how many modules it may take to have the five costliest of 28, by a forecast and by groups
FORMATS = {"INT8_STATIC": ("INT8_STATIC", 8, 12), "W4A16": ("W4A16", 14, 14), "four bits": (W4A4, 8, 10)}


@pytest.fixture(scope="module", params=FORMATS)
def both(request):
    "The whole table of the embedded model in a format, its forecast, and the bars."
    scheme, *bars = FORMATS[request.param]
    model, tokenizer = load_tiny_llama()
    def ids(texts, n):
        found = [tokenizer(text, return_tensors="pt").input_ids[:, :256] for text in texts]
        return [x for x in found if x.shape[1] == 256][:n]
    data = ids(calibration_texts(), 10)
    told = forecast_modules(record(model, data, gradients=True, **QUIET), model, scheme)
    return sensitivity(model, data, scheme, eval_data=ids(heldout_texts(), 2), **QUIET), told, bars


def test_the_costliest_are_among_the_first(both):
    "In the order of the model it takes 24 or more to have them."
    whole, told, (by_forecast, by_groups) = both
    top = whole.nlargest(5, "kl_only").module
    def needed(order): return 1 + max(map(list(order).index, top))
    assert needed(told.sort_values("kl", ascending=False).module) <= by_forecast
    assert needed(whole.attrs["order"]) <= by_groups and needed(whole.module) >= 24


def test_bounds_hold_as_observed(both):
    "Of every unit by its kind and its block, and of all that come later by the rest; with a tenth to spare."
    whole, *_ = both
    cost = {row["name"]: row["kl_only"] for row in whole.attrs["groups"]}
    alone = whole.set_index("module").kl_only
    for name, kl in alone.items():
        around = min(cost[name.rpartition(".")[2]], cost[name[:len("model.layers.0")]])
        assert kl <= 1.1 * around + 1e-5, name
    for n in (4, 8, 16): assert alone[whole.attrs["order"][n:]].max() <= cost[f"all but the first {n}"]
