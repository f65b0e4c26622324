"""Calibrations taken up from a record: the same scales bit for bit as by feeding, for every observer; the best of each;
the session as Python."""
import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import FOUR_BITS, differences, fingerprint, make_batches, make_model, qparams

from qcal_nb.analysis import compare_observers, per_reader
from qcal_nb.observers import Observer, label_of
from qcal_nb.evaluate import compare_observers as measured
from qcal_nb.lifecycle import QuantizationModifier, reset_quantization
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.pipelines import calibrate
from qcal_nb.session.provenance import data_code, model_code
from qcal_nb.recipes import to_yaml
from qcal_nb.records import CalibrationRecord, record_equal
from qcal_nb.evaluate import observers_to_compare
from qcal_nb.session import Saved, Session, SessionError


def compared(kind):
    "The observers that comparisons include for a weight or an activation."
    known = Observer.observers().items()
    return [name for name, one in known if kind in one.compared_for and not one.needs_gradients]


KV = dict(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)
RECIPES = {
    "FP8": dict(scheme="FP8"), "INT8_STATIC": dict(scheme="INT8_STATIC"),
    "groups": dict(scheme={"weights": dict(num_bits=4, strategy="group", group_size=32)}),
    "NVFP4": dict(scheme="NVFP4"), "W8A8": dict(scheme="W8A8"),
    "kv cache": dict(scheme="FP8", kv_cache_scheme=KV), "kv cache alone": dict(kv_cache_scheme=KV),
    "imatrix": dict(scheme="INT8_STATIC", weight_observer="imatrix_mse"),
    "outputs": dict(config_groups={
        "g": dict(targets=["Linear"], weights=dict(num_bits=8), output_activations=dict(num_bits=8, strategy="tensor"))
    }),
    **{f"inputs by {name}": dict(scheme="INT8_STATIC", input_observer=name) for name in compared("activation")},
    **{f"weights by {name}": dict(scheme="W8A8", weight_observer=name) for name in ("memoryless_mse", "imatrix_mse")},
}


def modifier(name): return QuantizationModifier(**RECIPES[name], ignore=["lm_head"])


def walk(session, *steps):
    for step in steps: getattr(session, step)()
    return session


def same(a, b):
    "Names of scales that differ in a bit; both must have some."
    assert a and a.keys() == b.keys()
    return [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))]


def unequal(a, b):
    "Keys of conclusions whose scales differ."
    assert set(a) == set(b)
    return [
        k for k in a
        if (a[k].scale is None) != (b[k].scale is None)
        or a[k].scale is not None and not torch.equal(a[k].scale, b[k].scale)
    ]


@pytest.mark.parametrize("arch", ["llama_gqa", "mixtral"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_session_from_a_record_has_the_scales_of_feeding(name, arch, tmp_path):
    data = make_batches(3)
    first = walk(Session(make_model(arch), data, recipe=modifier(name)), "initialize", "start", "feed_all", "end")
    fed = calibrate(make_model(arch), data, modifier(name), progress=False)
    assert same(qparams(first.model), qparams(fed)) == []
    path = first.record.save(tmp_path / "run.record")
    second = walk(Session(make_model(arch), None, record=path, recipe=modifier(name)), "initialize", "start")
    assert second.legal()["end"] is None, second.legal()["end"]
    assert second.replayed == modifier(name).requires_calibration_data
    second.end()
    assert same(qparams(second.model), qparams(first.model)) == []


@pytest.mark.parametrize(
    "name", ["FP8", "INT8_STATIC", "kv cache", "imatrix", "inputs by mse", "inputs by minmax", "inputs by entropy"]
)
def test_feeding_goes_on_where_the_record_ends(name, tmp_path):
    data = make_batches(5)
    whole = walk(
        Session(make_model("llama_gqa"), data, recipe=modifier(name)), "initialize", "start", "feed_all", "end"
    )
    part = walk(Session(make_model("llama_gqa"), data[:2], recipe=modifier(name)), "initialize", "start", "feed_all")
    rest = Session(make_model("llama_gqa"), data, record=part.record.save(tmp_path / "part"), recipe=modifier(name))
    walk(rest, "initialize", "start")
    assert (rest.phase, rest.fed) == ("fed", 2)
    walk(rest, "feed_all", "end")
    assert rest.fed == 5 and same(qparams(rest.model), qparams(whole.model)) == []
    assert record_equal(rest.record, whole.record)
    assert unequal(rest.record.results, whole.record.results) == []


def test_what_a_record_lacks_must_be_fed(tmp_path):
    first = walk(
        Session(make_model("llama_gqa"), make_batches(3), recipe=modifier("FP8")), "initialize", "start", "feed_all"
    )
    # mse was asked for another format
    other = QuantizationModifier(scheme="INT8_STATIC", input_observer="mse", ignore=["lm_head"])
    second = walk(
        Session(make_model("llama_gqa"), make_batches(3), record=first.record, recipe=other), "initialize", "start"
    )
    assert (second.phase, second.fed, second.replayed) == ("started", 0, False)
    assert "need data first" in second.legal()["end"]
    assert second.record is first.record  # kept until the first batch
    second.feed()
    assert second.record.batches == 1
    second.back()
    assert second.record is first.record
    # follows from a record for any format
    plain = QuantizationModifier(scheme="INT8_STATIC", input_observer="percentile", ignore=["lm_head"])
    third = walk(
        Session(make_model("llama_gqa"), make_batches(3), record=first.record, recipe=plain),
        "initialize",
        "start",
        "end",
    )
    fed = calibrate(make_model("llama_gqa"), make_batches(3), plain, progress=False)
    assert same(qparams(third.model), qparams(fed)) == []


def test_start_can_be_told_to_begin_anew():
    session = walk(
        Session(make_model("llama_gqa"), make_batches(3)), "initialize", "start", "feed_all", "reset", "initialize"
    )
    session.start(replay=False)
    assert session.phase == "started" and session.fed == 0 and session.code[-1] == "start(replay=False)"
    session.back()
    session.start()
    assert session.phase == "fed" and session.fed == 3


def test_back_over_a_replayed_start():
    session = walk(
        Session(make_model("llama_gqa"), make_batches(3)), "initialize", "start", "feed_all", "reset", "initialize"
    )
    before, run = fingerprint(session.model), session.record
    session.start()
    session.back()
    assert differences(before, fingerprint(session.model)) == [] and session.phase == "initialized" and session.fed == 0
    assert session.record is run


# --- the best of each ---

@pytest.mark.parametrize("arch", ["llama_gqa", "qwen3", "mixtral"])
def test_use_best_is_the_comparison_and_its_scales_those_of_feeding(arch):
    data = make_batches(3)
    session = walk(Session(make_model(arch), data, scheme=FOUR_BITS), "initialize", "start", "feed_all", "end")
    args = session.scheme_args(*next(k for k in session.record.tensors if k[1] == "input"))
    table = per_reader(compare_observers(session.record, args=args)).query("base_name == 'input'")
    chosen = session.use_best("input", check=False)
    assert session.phase == "original" and session.record.batches == 3
    best = table.loc[table.groupby("module").sqnr_db.idxmax()].set_index("module")
    rows = table.set_index(["module", "observer"])
    for m, top in best.iterrows():  # the largest, or one that cannot be told from it; nothing is changed without need
        used = rows.loc[(m, label_of(chosen[m]["input"]) if m in chosen else "static_minmax")]
        assert used.sqnr_db + used.bound_db >= top.sqnr_db - top.bound_db, m
        now = rows.loc[(m, "static_minmax")]
        assert (m in chosen) == (now.sqnr_db + now.bound_db < top.sqnr_db - top.bound_db), m
    assert chosen
    walk(session, "initialize", "start", "end")
    fed = calibrate(make_model(arch), data, session.recipe(), progress=False)
    assert same(qparams(session.model), qparams(fed)) == []


def test_use_best_says_why_not_and_changes_nothing():
    model = make_model("llama_gqa")
    session, before = Session(model, make_batches(2), scheme="W4A16", targets=["re:.*down_proj"]), fingerprint(model)
    with pytest.raises(SessionError, match="cannot use best: nothing was recorded; initialize, start and feed first"):
        session.use_best()
    with pytest.raises(ValueError, match=r"base_names=\['q'\] must be some of"): session.use_best("q")
    assert differences(before, fingerprint(model)) == [] and session.code == []


def test_weights_of_many_scales_are_measured_and_a_record_alone_says_why_not(tmp_path):
    session = walk(Session(make_model("llama_gqa"), make_batches(2), scheme="W8A8"), "initialize", "start", "feed_all")
    saved = Saved(session.record.save(tmp_path / "run"))
    with pytest.raises(SessionError, match="nothing is known of any tensor.*evaluate.compare_observers"):
        saved.use_best()
    table = session.comparison().set_index(["module", "observer"])
    chosen = session.use_best(check=False)
    names = [label for label in compared("weight") if label != "imatrix_mse"]  # which needs data
    exact = measured(session.model, None, names, scheme="W8A8", base_names=["weight"], progress=False)
    for row in exact.itertuples():
        assert row.reason or table.sqnr_db[row.module, row.observer] == row.sqnr_db, row
    best = table[table.highest_sqnr].reset_index().set_index("module").observer
    assert {m: c["weight"] for m, c in chosen.items()} == best[best != "memoryless_minmax"].to_dict() != {}
    tops = table.reset_index().groupby("module").sqnr_db.max()
    # measured ones are exact
    assert table[table.highest_sqnr].reset_index().set_index("module").sqnr_db.sort_index().equals(tops)
    walk(session, "initialize", "start", "feed_all", "end")
    fed = calibrate(make_model("llama_gqa"), make_batches(2), session.recipe(), progress=False)
    assert same(qparams(session.model), qparams(fed)) == []


def test_six_observers_are_compared_and_none_twice():
    for name in RECIPES:
        for base, asked in observers_to_compare(modifier(name)).items():
            labels = [label_of(one) for one in asked]
            assert len(set(labels)) == len(labels) >= 5, (name, base)
    per_tensor, per_channel = (observers_to_compare(modifier(name))["weight"] for name in ("FP8", "INT8_STATIC"))
    assert "imatrix_mse" not in per_tensor and "imatrix_mse" in per_channel  # it weighs columns


def test_conclusions_are_found_when_asked_for_and_are_those_of_a_recording():
    session = walk(
        Session(make_model("llama_gqa"), make_batches(3), scheme="INT8_STATIC"), "initialize", "start", "feed_all"
    )
    lazy = session.record.results
    assert len(lazy._found) == 0 and len(lazy) == len(list(lazy))
    key = next(k for k in lazy if k[1:] == ("input", "entropy"))
    assert lazy[key].scale is not None and len(lazy._found) == 1 and key in lazy and (*key[:2], "nobody") not in lazy
    with pytest.raises(KeyError): lazy[(*key[:2], "nobody")]
    again = pickle.loads(pickle.dumps(lazy))
    assert type(again) is dict and unequal(again, lazy) == []
    assert lazy._finder is None  # all is found: no model is held


# --- without the model ---

def test_a_saved_run(tmp_path):
    session = walk(
        Session(make_model("llama_gqa"), make_batches(3), scheme=FOUR_BITS), "initialize", "start", "feed_all", "end"
    )
    saved = Saved(session.record.save(tmp_path / "run"))
    assert saved.phase == "saved" and set(saved.legal().values()) == {saved.legal()["end"]}
    assert "pass the model" in saved.legal()["end"]
    both = saved.scales().merge(session.scales(), on=["module", "base_name"], suffixes=("", "_model"))
    assert len(both) == len(session.scales()) and np.array_equal(both.clip_max, both.clip_max_model)
    assert np.array_equal(both.scale, both.scale_model)
    chosen = saved.use_best()
    assert chosen == session.use_best(check=False) and to_yaml(saved.recipe()) == to_yaml(session.recipe())
    with pytest.raises(SessionError, match="saved record without its model"): saved.compare_schemes(["FP8"])
    space = {}
    exec(saved.script(), space)
    assert space["session"].scales().equals(saved.scales())
    with pytest.raises(TypeError, match="record must be a CalibrationRecord or the path of one, got int"): Saved(3)


def test_a_record_of_another_model_is_refused():
    run = walk(Session(make_model("llama_gqa"), make_batches(1)), "initialize", "start", "feed_all").record
    with pytest.raises(
        ValueError, match="record is of another model: this Sequential has no 'model.layers.0.self_attn.q_proj'"
    ):
        Session(torch.nn.Sequential(torch.nn.Linear(2, 2)), None, record=run)
    wanted = dict(
        record="a CalibrationRecord or the path of one",
        recipe="a QuantizationModifier, or the path or text of a recipe",
    )
    for what, words in wanted.items():
        with pytest.raises(TypeError, match=f"{what} must be {words}, got int"):
            Session(make_model("llama_gqa"), **{what: 3})


# --- the session as Python ---

RUNNER = """
import sys
from pathlib import Path
for script in map(Path, sys.argv[1:]):
    space = {"__name__": "__main__"}
    exec(compile(script.read_text(), script, "exec"), space)
    space["session"].scales().to_pickle(script.with_suffix(".pkl"))
"""


def run_scripts(texts, folder):
    "Run scripts, each with names of its own, in one fresh interpreter; the scales that each ends with."
    paths = [folder / f"{i}.py" for i in range(len(texts))]
    for path, text in zip(paths, texts): path.write_text(text)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", RUNNER, *paths], check=True, env=env, timeout=600)
    return [pd.read_pickle(path.with_suffix(".pkl")) for path in paths]


STORIES = {
    "plain": lambda s: walk(s, "initialize", "start", "feed_all", "end"),
    "back and again": lambda s: (
        walk(s, "initialize", "start", "feed", "feed_all", "back", "feed", "end", "back"), s.feed_all(), s.end()
    ),
    "use best": lambda s: (
        s.configure(scheme=FOUR_BITS), walk(s, "initialize", "start", "feed_all", "end"),
        s.use_best(check=False),
        walk(s, "initialize", "start", "end")
    ),
    "configured": lambda s: (
        s.configure(scheme="INT8_STATIC", ignore=["lm_head", "re:.*down_proj"]),
        walk(s, "initialize", "start", "feed", "end"),
    ),
    "a recipe": lambda s: (
        s.configure(recipe=QuantizationModifier(scheme="FP8", input_observer="mse", ignore=["lm_head"])),
        walk(s, "initialize", "start", "feed", "end"),
    ),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    "For each story the scales of the session and those of its script."
    sessions = {}
    for story, tell in STORIES.items():
        model, tokenizer = load_tiny_llama(dtype=torch.bfloat16 if story == "plain" else torch.float32)
        session = sessions[story] = Session(model, calibration_texts()[3:6], tokenizer, max_length=64)
        tell(session)
    scales = run_scripts([session.script() for session in sessions.values()], tmp_path_factory.mktemp("scripts"))
    return {story: (session.scales(), there) for (story, session), there in zip(sessions.items(), scales)}


@pytest.mark.parametrize("story", STORIES)
def test_the_script_of_a_session_gives_its_scales_in_a_fresh_interpreter(story, told):
    here, there = told[story]
    assert len(here) and there.equals(here)


def test_a_model_from_a_folder_and_texts_of_ones_own(tmp_path):
    model, tokenizer = load_tiny_llama()
    with torch.no_grad(): model.model.layers[0].mlp.up_proj.weight *= 2
    assert "..." in model_code(model)[0]
    model.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    from transformers import AutoTokenizer, LlamaForCausalLM
    mine, own = LlamaForCausalLM.from_pretrained(tmp_path / "mine"), AutoTokenizer.from_pretrained(tmp_path / "mine")
    session = Session(
        mine, ["def f(x):\n    return 'x'", 'class A: "quoted"'], own,
        scheme={"weights": {"num_bits": 4, "strategy": "channel"}}
    )
    walk(session, "initialize", "start", "feed_all", "end")
    there, = run_scripts([session.script()], tmp_path)
    assert there.equals(session.scales())


def test_what_cannot_be_told_is_left_to_fill_in():
    lines = data_code(["x" * 5000])
    assert len(lines) == 1 and lines[0].startswith("data = ...  # your 1 texts, 5,000 characters, SHA-256")
    assert data_code(torch.utils.data.DataLoader([1, 2]))[0] == "data = ...  # your DataLoader of 2"
    assert model_code(torch.nn.Linear(2, 2))[0] == "model = ...  # your Linear of 6 parameters"
    run = walk(Session(make_model("llama_gqa"), make_batches(1)), "initialize", "start", "feed_all").record
    text = Session(make_model("llama_gqa"), None, record=run).script()
    assert "record=..." in text and "save it with record.save(path)" in text and compile(text, "script", "exec")


def test_after_everything_the_model_is_as_it_was():
    model = make_model("llama_gqa")
    before, session = fingerprint(model), Session(model, make_batches(3), scheme=FOUR_BITS)
    walk(session, "initialize", "start", "feed_all", "end")
    assert session.use_best(check=False)
    walk(session, "initialize", "start", "end", "reset")
    assert differences(before, fingerprint(model)) == []
    reset_quantization(model)
    assert isinstance(session.record, CalibrationRecord)
