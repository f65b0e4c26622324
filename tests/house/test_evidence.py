"""The evidence about forecasts: its parts run and go on where they stopped, what is stored has the form that the page
reads, and what the page claims is computed. No test asserts how good a forecast is: that is tests/evaluate."""
import json
import math
import re
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evidence import __main__ as command
from evidence import parts, subjects, tables
from evidence.results import FILE, Part, Results, rounded
from evidence.subjects import LENGTH, MEASURED, RECORDED, SUBJECTS, ids_of, spread_out
from helpers import differences, fingerprint

from qcal_nb.evaluate import compare_schemes
from qcal_nb.forecasts import STATE_WORDS
from qcal_nb.models import calibration_texts, heldout_texts, load_tiny_llama

PAGE = Path(__file__).resolve().parents[2] / "nbs" / "forecast_evidence.ipynb"
STORED = Results()
NAMED = ("name", "model", "part", "date", "machine", "load")


# --- what is stored ---


@pytest.mark.parametrize("model", list(SUBJECTS))
def test_everything_is_stored(model):
    assert [part for part in parts.PARTS if not STORED.of(model, part)] == []
    assert STORED.missing(model, "schemes", parts.SCHEMES) == []
    assert STORED.missing(model, "length", parts.SHORT_SCHEMES) == []
    assert STORED.missing(model, "budget", [*parts.UNIFORM, *parts.chosen_ways(SUBJECTS[model])]) == []
    assert STORED.missing(model, "advice", parts.everything(SUBJECTS[model])) == []
    alone = [row["scheme"] for row in STORED.of(model, "modules").values()]
    assert set(alone) == set(parts.RANKED) and len(alone) == 2 * alone.count("W4A16") >= 2 * 28


def test_stored_rows_have_the_form_that_the_page_reads():
    texts = dict(length=MEASURED * LENGTH // parts.SHORT)
    for (model, part, name), row in STORED.rows.items():
        assert model in SUBJECTS and part in parts.PARTS and name == row["name"]
        assert date.fromisoformat(row["date"]) and "torch" in row["machine"] and row["load"] >= 0
        if part in ("texts", "cost"): continue
        assert len(row["kls"]) == texts.get(part, MEASURED) and all(0 <= kl < math.inf for kl in row["kls"])
        assert row["recipe"] and ("forecast" in row) != bool(row.get("why")), (model, part, name)
        if part not in ("modules",) and "forecast" in row: assert row["state"] in STATE_WORDS and row["forecast"] >= 0


def test_other_texts_have_the_same_schemes():
    for model in SUBJECTS:
        said = tables.other_forecasts(STORED, model)
        assert set(said.index) == set(parts.SCHEMES) and said.shape[1] == parts.SETS - 1
        assert (said > 0).all(axis=None)


def test_nothing_of_a_machine_is_stored():
    text = FILE.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work)/", text) and len(json.loads(text)) == len(STORED.rows)


def test_the_page_types_no_ratio():
    "Numbers with two decimals are measured, so they come from code; its words have none."
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    words = [line for cell in cells if cell["cell_type"] == "markdown" for line in cell["source"]]
    assert len(words) > 30 and [line for line in words if re.search(r"\d\.\d\d", line)] == []


# --- what is claimed is computed ---


def row(kls, **more): return dict(kls=kls, recipe="x") | more


@pytest.fixture
def planted(tmp_path):
    "Results of which everything is known beforehand."
    found = Results(tmp_path/"r.json")
    for name, kl, state in (("A", 0.02, "estimate"), ("B", 0.08, "estimate"), ("C", 0.4, "floor")):
        found.add("m", "schemes", name, row([kl, 3 * kl], forecast=kl, state=state, seconds=1.0))
    found.add("m", "texts", "1", dict(forecasts=dict(A=0.04, B=0.12, C=0.6)))
    for i, module in enumerate("pqr"):
        kls = [[1.0, 3.0, 2.0][i], [3.0, 2.0, 7.0][i]]
        found.add("m", "modules", f"A, {module}", row(kls, scheme="A", module=module, forecast=1.0 + i))
    for way, kl in (("forecast", 0.2), ("error", 0.5)):
        found.add("m", "budget", f"10% {way}",
                  row([kl, kl], way=way, share=0.1, bytes=2_000_000, mix="A 2", forecast=0.1, state="floor"))
    found.add("m", "advice", "as it is", row([1.0, 2.0], forecast=1.0, state="broken", spared=0, advised=False))
    found.add("m", "advice", "good", row([0.1, 0.9], forecast=0.3, state="floor", spared=1, advised=True))
    found.add("m", "advice", "bad", row([3.0, 4.2], forecast=0.3, state="floor", spared=1, advised=True))
    found.add("m", "advice", "even", row([2.0, 1.0], forecast=0.3, state="floor", spared=1, advised=True))
    return found


def test_ratios_are_of_all_recordings(planted):
    table = tables.schemes(planted, "m")
    assert list(table.index) == ["A", "B", "C"] and list(table.measured) == pytest.approx([0.04, 0.16, 0.8])
    assert table.error["A"] == pytest.approx(0.02) and list(table.ratio) == pytest.approx([0.5] * 3)
    assert tables.ratios(table, "estimate") == "0.50 to 1.00" and tables.ratios(table, "floor") == "0.50 to 0.75"
    assert tables.ratios(table, "broken") == "none"


def test_ranks(planted):
    table = tables.ranks(planted, "m")
    assert table.spearman["A"] == pytest.approx(1.0) and table.lowest["A"] == pytest.approx(0.5)
    assert table.modules["A"] == 3 and table.texts["A"] == 2 and table.ratio["A"] == pytest.approx(6 / 9)
    assert tables.rank_correlation([1, 2, 3, 3], [4, 3, 2, 2]) == pytest.approx(-1)


def test_kinds(planted):
    assert tables.by_kind(planted, "m").A.to_dict() == pytest.approx(dict(p=1 / 2, q=2 / 2.5, r=3 / 4.5))


def test_sums_alone(planted):
    found = tables.alone_and_together(planted, "m").loc["A"]
    assert found.sum_alone == pytest.approx(9) and found.ratio == pytest.approx(9 / 0.04)


def test_gains(planted): assert tables.gains(planted, "m")["by error"][0.1] == pytest.approx(2.5)


def test_advice_is_judged_text_by_text(planted):
    table = tables.advice(planted, "m")
    assert list(table.index[:1]) == ["bad"] and dict(table.verdict) == {
        "as it is": "no difference", "good": "better", "bad": "worse", "even": "no difference"}
    assert table.change["good"] == pytest.approx(-1) and table.change_error["good"] == pytest.approx(0.1)
    assert table.times_less["good"] == pytest.approx(3) and table.times_less["as it is"] == 1


def test_promises_are_those_of_the_states(planted):
    assert tables.promised("estimate") == (1.0, 1.9) and tables.promised("floor") == (0.0, 2.4)
    assert tables.promised("broken") == (0.0, math.inf)
    table = tables.promises(planted)
    assert list(table.index) == ["estimate", "floor", "broken"] and table.forecasts["floor"] == 6
    assert table.above["estimate"] == 2 and table.above["broken"] == 0      # 2 times the forecast, where 1.9 is said
    assert set(tables.broken_promises(planted).name) == {"A", "B", "10% error", "bad", "even"}


def test_lengths_and_costs(planted):
    planted.add("m", "length", "A", row([0.02, 0.04], forecast=0.06, state="estimate", tokens=64))
    found = tables.lengths(planted, "m").loc["A"]
    assert found.forecasts == pytest.approx(3) and found.measureds == pytest.approx(0.75)
    times = dict(forward=[1.0, 2.0, 3.0], record=[2.0, 4.0, 3.0], gradients=[3.0, 6.0, 12.0])
    planted.add("m", "cost", "recording", dict(parameters=50_000_000, **times))
    costs = tables.costs(planted, "m")
    assert costs["gradients / forward"] == 3 and costs["record, s"] == 3
    assert costs["longest for 100M parameters, s"] == pytest.approx(2)


# --- the file ---


def test_rows_are_written_at_once_and_beside_those_of_another_process(tmp_path):
    one, other = Results(tmp_path/"r.json"), Results(tmp_path/"r.json")
    one.add("m", "schemes", "A", row([1 / 3, 2.0], forecast=float("1.23456789")))
    other.add("n", "schemes", "A", row([1.0, 2.0]))
    one.add("m", "schemes", "B", row([1.0, 2.0]))
    assert set(other.rows) == {("m", "schemes", "A"), ("n", "schemes", "A"), ("m", "schemes", "B")}
    stored = other.of("m", "schemes")["A"]
    assert stored["kls"] == [0.333333, 2.0] and stored["forecast"] == 1.23457
    assert one.missing("m", "schemes", "ABC") == ["C"] and one.missing("n", "schemes", "AB") == ["B"]
    assert len((tmp_path/"r.json").read_text().splitlines()) == 3 + 2


def test_outdated_rows_stay_until_they_are_found_again(tmp_path):
    found = Results(tmp_path/"r.json")
    for name in "AB": found.add("m", "schemes", name, row([1.0], recipe=name))
    found.outdate("m", "schemes", keep_measured=True)
    assert found.missing("m", "schemes", "AB") == ["A", "B"] and len(found.rows) == 2
    assert Part(found, "m", "schemes").measured("B") == [1.0] and Part(found, "n", "schemes").measured("B") is None
    found.add("m", "schemes", "A", row([3.0]))
    assert found.missing("m", "schemes", "AB") == ["B"]
    found.finish("m", "schemes")
    assert list(found.rows) == [("m", "schemes", "A")]
    found.outdate("m", "schemes", keep_measured=False)
    assert Part(found, "m", "schemes").measured("x") is None


def test_rounding(): assert rounded([1 / 3, dict(a=2e-9 / 3), "x", 7]) == [0.333333, dict(a=6.66667e-10), "x", 7]


# --- measuring ---

TINY = replace(SUBJECTS["embedded"], length=64, recorded=5, measured=2, every=14)


@pytest.fixture(scope="module")
def tiny(): return replace(TINY)


def test_texts_are_spread_out_and_of_one_length(tiny):
    assert spread_out(range(11), 3) == [0, 3, 6] and spread_out(range(11), 3, 2) == [2, 5, 8]
    with pytest.raises(ValueError, match="only 11 are long enough"): spread_out(range(11), 3, 3)
    _, tokenizer = load_tiny_llama()
    for texts in (calibration_texts(), heldout_texts()):
        assert {ids.shape for ids in ids_of(tokenizer, texts, 8, LENGTH)} == {(1, LENGTH)}
    first, other = (set(map(str, tiny.calibration(n))) for n in (0, 1))
    assert len(first | other) == 10
    assert SUBJECTS["embedded"].recorded == RECORDED and SUBJECTS["embedded"].cut_to(64).measured == 4 * MEASURED


@pytest.mark.parametrize("scheme", ["W8A8", "INT8_STATIC"])
def test_kl_is_that_of_compare_schemes(tiny, scheme):
    before = fingerprint(tiny.model)
    table = compare_schemes(tiny.model, tiny.feeds, [scheme], eval_data=tiny.held_out, progress=False)
    assert np.mean(tiny.kls(scheme)) == pytest.approx(table.kl[1], rel=1e-4)
    with tiny.quantized(scheme) as measure:
        assert max(measure([])) < 1e-9
        one = measure(["model.layers.0.mlp.down_proj"])
    assert 0 < np.mean(one) < table.kl[1] and differences(before, fingerprint(tiny.model)) == []


def test_findings_are_followed_to_the_letter(tiny):
    assert len(parts.remedied(tiny)) >= 1
    named = parts.named_by(tiny, "first")
    assert parts.count_spared(tiny, parts.as_said(tiny, "first")) == len(named) > 0
    assert parts.count_spared(tiny, parts.mixed(named, "FP8")) == 0


def test_recipes_of_the_advice(tiny):
    worst = parts.worst_units(tiny, 2)
    assert parts.by_forecast(tiny, "INT8_STATIC").index[0] in worst and len(worst) >= 2
    assert parts.spared(worst).ignore == ["lm_head", *worst]
    groups = parts.mixed(worst, "FP8").resolved_config.config_groups
    assert groups["others"].targets == worst and groups["others"].weights.type == "float"
    observers = {scheme.input_activations.observer
                 for scheme in parts.best_by_sqnr(tiny).resolved_config.config_groups.values()}
    assert len(observers) > 1 and observers <= {"static_minmax", "minmax", "percentile", "entropy", "histogram_mse"}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    "The command on a few tokens, with few rows, and its file."
    monkeypatch.setattr(command, "SUBJECTS", dict(embedded=replace(TINY)))
    monkeypatch.setattr(command, "Results", lambda: Results(tmp_path/"a"/"b"/"r.json"))
    (tmp_path/"a"/"b").mkdir(parents=True)
    for name, few in dict(SCHEMES=("FP8", "W4A16", "INT8_STATIC"), SHARES=(0.3,), SETS=2, ROUNDS=1,
                          SHORT=32, SHORT_SCHEMES=("W4A16",)).items():
        monkeypatch.setattr(parts, name, few)
    monkeypatch.setattr(parts, "WAYS", ("forecast", "error"))
    return Results(tmp_path/"a"/"b"/"r.json")


@pytest.mark.slow
def test_command(quick, capsys, monkeypatch):
    command.main([])
    counts = {part: len(quick.of("embedded", part)) for part in parts.PARTS}
    assert counts == dict(schemes=3, texts=1, modules=4, budget=4, length=1, cost=1, advice=counts["advice"])
    assert counts["advice"] == len(parts.everything(TINY)) and "embedded, schemes: FP8" in capsys.readouterr().out
    before = quick.rows
    command.main([])
    assert "embedded, " not in capsys.readouterr().out and quick.rows == before   # nothing was missing
    monkeypatch.setattr(subjects.Subject, "kls", None)
    command.main(["--forecast", "schemes", "budget"])                       # what was measured is not measured again
    for key, old in before.items():
        assert {k: v for k, v in quick.rows[key].items() if k not in ("seconds", *NAMED)} == {
            k: v for k, v in old.items() if k not in ("seconds", *NAMED)}
    with pytest.raises(TypeError): command.main(["--again", "schemes"])     # it would be


def test_command_in_words(capsys, monkeypatch):
    with pytest.raises(SystemExit): command.main(["no such part"])
    assert "there are: schemes, texts, modules" in capsys.readouterr().err

    def missing(): raise ModuleNotFoundError("pip install it")
    real = replace(SUBJECTS["SmolLM2"], require=missing)
    monkeypatch.setattr(command, "SUBJECTS", dict(SmolLM2=real))
    with pytest.raises(ModuleNotFoundError, match="pip install it"): command.main([])


# --- bars that were set beforehand ---


def test_the_bars_of_advice_hold_on_the_embedded_model():
    rows = STORED.of("embedded", "advice")
    kl = {name: np.mean(row["kls"]) for name, row in rows.items()}
    known = [name for name, row in rows.items() if "forecast" in row]
    order = pd.DataFrame(dict(said=[rows[name]["forecast"] for name in known], was=[kl[name] for name in known]))
    assert len(known) >= 13 and order.said.rank().corr(order.was.rank()) >= 0.90
    assert kl["inputs by fisher_mse"] <= 0.7 * kl["inputs by the highest SQNR"]
    assert kl["use best"] <= 0.7 * kl["as it is"]


@pytest.mark.parametrize("model", list(SUBJECTS))
def test_no_stored_advice_made_it_worse(model):
    rows = STORED.of(model, "advice")
    before = np.array(rows[tables.PLAIN]["kls"])
    for name, row in rows.items():
        if not row["advised"]: continue
        change = np.array(row["kls"]) - before
        assert change.mean() <= 2 * change.std(ddof=1) / len(change) ** 0.5, name
