"""*Use best* by forecast: what it chooses, what the model says of it, and how it is taken back."""
import pandas as pd
import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model

from qcal_nb.evaluate import divergences
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts, heldout_texts, load_tiny_llama
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import to_yaml
from qcal_nb.records import record, result_of
from qcal_nb.session import Saved, Session, SessionError, recorded
from qcal_nb.session import session as session_module
from qcal_nb.session import trial
from tests.records.samples import QUIET

INT8 = dict(scheme="INT8_STATIC", ignore=["lm_head"])
FISHER = dict(INT8, input_observer="fisher_mse")


def calibrated(recipe=INT8, batches=6, gradients=True, **options):
    session = Session(make_model("llama_gqa"), make_batches(batches), recipe=QuantizationModifier(**recipe), **options)
    session.initialize()
    session.start()
    session.feed_all(gradients=gradients)
    return session


def end_again(session):
    for step in ("initialize", "start", "end"): getattr(session, step)()


def choose_for_all(monkeypatch, session, observer):
    "From now on one observer counts as the best of every input."
    inputs = {module: {"input": observer} for module, base in session.record.tensors if base == "input"}
    monkeypatch.setattr(recorded, "best_observers", lambda table, asked: inputs)


def clip(monkeypatch, names):
    "From now on the inputs of some modules count as best with two values of five clipped, and as massive ones."
    best = recorded.best_observers
    fewer = ("percentile", {"percentile": 60.0})
    monkeypatch.setattr(recorded, "best_observers", lambda *asked: best(*asked) | {n: {"input": fewer} for n in names})
    massive = dict.fromkeys((name, "input") for name in names)
    monkeypatch.setattr(trial, "massive_activations", lambda record: massive)


@pytest.fixture(scope="module")
def real():
    "The embedded model, fed with gradients; texts of one length, and others to evaluate on."
    model, tokenizer = load_tiny_llama()
    def cut(texts, n): return [tokenizer.decode(tokenizer(t)["input_ids"][1:256]) for t in texts if len(t) > 900][:n]
    session = Session(model, cut(calibration_texts(), 10), tokenizer, recipe=QuantizationModifier(**INT8),
                      eval_data=cut(heldout_texts(), 8), max_length=256)
    session.initialize()
    session.start()
    session.feed_all(gradients=True)
    return session


# --- the observer that needs gradients ---

def test_its_scales_are_those_of_the_record_and_one_by_one():
    session = calibrated(FISHER)
    session.end()
    made = record(make_model("llama_gqa"), make_batches(6), gradients=True, **QUIET)
    for name, module in session.model.named_modules():
        if hasattr(module, "input_scale"):
            wanted = result_of(made, (name, "input"), "fisher_mse", module.quantization_scheme.input_activations)
            assert torch.equal(module.input_scale, wanted.scale), name


def test_a_record_brings_it_back_in_another_session():
    fed = calibrated(FISHER)
    fed.end()
    again = Session(make_model("llama_gqa"), record=fed.record, recipe=QuantizationModifier(**FISHER))
    end_again(again)
    assert again.scales().equals(fed.scales())


def test_without_gradients_it_says_what_it_needs_and_the_model_is_as_it_was():
    model = make_model("llama_gqa")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="fisher_mse needs gradients, and calibrate.. runs forward alone"):
        calibrate(model, make_batches(2), QuantizationModifier(**FISHER), progress=False)
    assert differences(before, fingerprint(model)) == []
    session = calibrated(FISHER, gradients=False)
    with pytest.raises(SessionError, match="cannot end: fisher_mse needs gradients of at least five batches"):
        session.end()
    few = calibrated(FISHER, batches=4)
    assert "at least five batches" in few.legal()["end"]


def test_a_weight_or_many_scales_are_refused():
    with pytest.raises(ValueError, match="it was asked about 'weight'"):
        QuantizationModifier(**INT8, weight_observer="fisher_mse").initialize_quantization(make_model("llama_gqa"))


def test_the_recipe_says_that_production_lacks_it(tmp_path):
    text = to_yaml(QuantizationModifier(**FISHER))
    assert text.startswith("# llm-compressor has no observer fisher_mse: calibrate with qcal_nb")
    session = calibrated(FISHER)
    session.end()
    folder = session.save_checkpoint(tmp_path / "checkpoint")
    assert '"observer": "fisher_mse"' in (folder / "config.json").read_text()


# --- best, and asked ---

def test_the_model_says_that_it_helped(real):
    chosen = real.use_best("input")
    assert chosen and real.trial.helped and real.trial.held_out and real.trial.texts == 8
    assert real.trial.after < 0.7 * real.trial.before and real.trial.low <= real.trial.high < 0
    assert "other texts" in str(real.trial) and "kept" in str(real.trial)
    assert real.phase == "original" and real.code[-1] == "use_best(['input'])"
    end_again(real)
    real.reset()
    real.undo_best()
    assert real.modifier.resolved_config == QuantizationModifier(**INT8).resolved_config
    with pytest.raises(SessionError, match="cannot undo best"): real.undo_best()


def test_only_observers_of_production_if_asked(real):
    chosen = real.use_best("input", production=True)
    assert {choice["input"] for choice in chosen.values()} <= {"minmax", "static_minmax", "mse"} and real.trial.helped
    assert "llm-compressor has no observer" not in to_yaml(real.recipe())
    real.undo_best()


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "INT8_STATIC"])
def test_a_record_without_the_sessions_observers_is_enough(scheme):
    "Weights are at hand: observers that were not attached look at them now, and find what attached ones find."
    made = record(make_model("llama_gqa"), make_batches(6), gradients=True, **QUIET)
    recipe = QuantizationModifier(scheme=scheme, ignore=["lm_head"])
    plain = Session(make_model("llama_gqa"), make_batches(6), recipe=recipe, record=made)
    fed = Session(make_model("llama_gqa"), make_batches(6), recipe=recipe)
    for step in ("initialize", "start"): getattr(fed, step)()
    fed.feed_all(gradients=True)
    columns = ["module", "observer", "scale", "sqnr_db", "kl"]
    one, other = (session.comparison(["weight"])[columns].set_index(["module", "observer"]) for session in (plain, fed))
    assert one.sqnr_db.notna().sum() >= 2 * 14      # those that have a scale for each channel
    assert one.sqnr_db.xs("imatrix_mse", level="observer").isna().all()     # it needs data
    alone = one.drop("imatrix_mse", level="observer")
    pd.testing.assert_frame_equal(alone, other.loc[alone.index], check_exact=False, rtol=1e-9)


def test_massive_activations_do_not_spoil_the_rest(monkeypatch, real):
    "With the clipped inputs it is no help; without them it is kept, and the trial says so."
    clipped = [f"model.layers.{n}.mlp.down_proj" for n in (0, 2)]
    clip(monkeypatch, clipped)
    chosen = real.use_best("input")
    assert chosen and not chosen.keys() & set(clipped) and real.trial.helped and real.trial.left == 2
    assert "without 2 inputs whose massive activations no forecast can judge: kept" in str(real.trial)
    own = real.own_observers()
    assert {own[name, "input"] for name in clipped} == {"minmax"}
    assert own["model.layers.1.mlp.down_proj", "input"] != "minmax"
    assert real.code[-1] == "use_best(['input'])" and real.phase == "original"
    real.undo_best()


def test_if_nothing_else_is_left_the_model_is_asked_once(monkeypatch, real):
    names = [name for name, base in real.record.tensors if base == "input"]
    clip(monkeypatch, names)
    asked = []
    monkeypatch.setattr(session_module, "divergences", lambda *args: asked.append(1) or divergences(*args))
    recipe, code = to_yaml(real.recipe()), real.code
    assert real.use_best("input") == {} and len(asked) == 2 and real.trial.left == 0 and not real.trial.helped
    assert to_yaml(real.recipe()) == recipe and real.code == code


def test_what_does_not_help_is_taken_back(monkeypatch):
    "The choice is made to be the worst: the model finds that out, and recipe, script and model are as before."
    session = calibrated(batches=8)
    choose_for_all(monkeypatch, session, ("percentile", {"percentile": 60.0}))
    session.reset()
    before, recipe, code = fingerprint(session.model), to_yaml(session.recipe()), session.code
    assert session.use_best("input") == {}
    assert not session.trial.helped and session.trial.high > 0 and session.trial.after > session.trial.before
    assert "taken back" in str(session.trial) and not session.trial.held_out and "flatter" in str(session.trial)
    assert to_yaml(session.recipe()) == recipe and session.code == code
    assert differences(before, fingerprint(session.model)) == [] and session.phase == "original"
    with pytest.raises(SessionError, match="cannot undo best"): session.undo_best()
    end_again(session)


@pytest.mark.parametrize("by", ["stop", "interrupt"])
def test_a_stopped_trial_takes_it_back(monkeypatch, by):
    session = calibrated(batches=6)
    choose_for_all(monkeypatch, session, "mse")
    recipe = to_yaml(session.recipe())
    def halt(what):
        if what != "compare": return
        if by == "interrupt": raise KeyboardInterrupt
        session.stop()
    session.listen(halt)
    if by == "stop": assert session.use_best("input") == {}
    else:
        with pytest.raises(KeyboardInterrupt): session.use_best("input")
    assert to_yaml(session.recipe()) == recipe and session.phase == "original" and not session.running
    assert session.trial is None and session.before is None
    session._listeners.clear()
    end_again(session)


def test_what_cannot_be_asked_is_said_before_anything_changes():
    session = calibrated(batches=3, gradients=False)
    recipe = to_yaml(session.recipe())
    with pytest.raises(SessionError, match="on 3 batches: at least 5 are needed"): session.use_best("input")
    with pytest.raises(TypeError, match="check='yes' must be True or False"): session.use_best("input", check="yes")
    assert to_yaml(session.recipe()) == recipe and session.phase == "fed"


def test_too_damaged_tensors_keep_their_observer():
    session = calibrated(batches=6)
    costs = {name: g for name, g in session.record.gradients.items()}
    for gradients in {id(g.histogram): g for g in costs.values()}.values():
        gradients.histogram.sums[:] *= 1e12     # as if every input were badly damaged
    with pytest.raises(SessionError, match="every tensor is too damaged to forecast: measure"):
        session.use_best("input", check=False)


def test_a_saved_record_chooses_the_same_without_being_asked(tmp_path):
    session = calibrated(batches=6)
    saved = Saved(session.record.save(tmp_path / "run"))
    chosen = saved.use_best("input")
    assert chosen == session.use_best("input", check=False) and saved.trial is None
    shipped = Saved(session.record.without_gradients().save(tmp_path / "small"))
    assert shipped.use_best("input") == chosen


# --- a budget ---

def test_a_budget_becomes_the_recipe_and_is_taken_back():
    session = calibrated(batches=6)
    whole = sum(p.numel() * p.element_size() for p in session.model.parameters())
    found = session.allocate(whole // 2, keep=["re:.*layers.0.*q_proj"])
    assert session.recipe().resolved_config == found.recipe.resolved_config and found.bytes <= whole // 2
    assert session.code[-1] == f"allocate({whole // 2}, keep=['re:.*layers.0.*q_proj'])" and session.phase == "original"
    with pytest.raises(ValueError, match="holds the whole model: nothing has to be quantized"): session.allocate(whole)
    with pytest.raises(ValueError, match="budget=10: the smallest mixture"): session.allocate(10)
    assert session.recipe().resolved_config == found.recipe.resolved_config
    session.undo_best()
    assert session.modifier.resolved_config == QuantizationModifier(**INT8).resolved_config
    bare = calibrated(batches=6, gradients=False)
    with pytest.raises(ValueError, match="the record has no gradients"): bare.allocate(whole)


def test_the_most_expensive_modules_are_spared_and_taken_back(real):
    found = real.spare(0.004)
    assert found.kl < 0.004 and 0 < len(found.modules) < 6 and set(found.modules) <= set(real.ignore)
    assert real.code[-1] == "spare(0.004)" and real.phase == "original"
    end_again(real)
    assert not hasattr(real.model.get_submodule(found.modules[0]), "quantization_scheme")
    real.reset()
    real.undo_best()
    assert real.modifier.resolved_config == QuantizationModifier(**INT8).resolved_config
    with pytest.raises(ValueError, match="target='much' must be a number above 0"): real.spare("much")
