"""*Use best*: what it changes of the session, what it leaves, and what it says."""
import numpy as np
from helpers import FOUR_BITS, differences, fingerprint, make_batches, make_model

from qcal_nb.widgets.comparison import ObserverComparison, used_html
from qcal_nb.session import Session
from qcal_nb.session import WorkbenchState
from tests.widgets.comparing import feed, ready


def test_use_best_says_what_it_changed_and_what_comes_next(session):
    session.scheme = FOUR_BITS
    panel = ready(feed(session))
    panel.check.value = False
    changed = panel.rows[panel.rows.best != "static_minmax"]
    best = changed.groupby("best").readers.agg(lambda some: sum(map(len, some))).to_dict()
    assert best
    assert panel.use_for.value == ("input",) and not panel.use.disabled
    panel.use.click()
    assert session.phase == "original" and session.code[-1] == "use_best(['input'], check=False)"
    assert "Initialize" in panel.used.value
    for name, n in best.items(): assert f"<b>{name}</b> for {n}" in panel.used.value
    for step in ("initialize", "start", "end"): getattr(session, step)()
    assert {
        m: s.input_activations.observer
        for m, s in session.modifier.resolved_config.config_groups.items() if s.targets != ["Linear"]
    }
    panel.wait()
    assert "The scheme's own observer has it everywhere" in panel.verdict.value
    panel.use_for.value = ("input", "weight")
    panel.use.click()
    assert session.code[-1] == "use_best(['input', 'weight'], check=False)" and "weight tensors: " in panel.used.value
    assert "Nothing was changed" in used_html({})
    panel.close()


def test_use_best_changes_nothing_where_nothing_is_known_to_be_better(session):
    panel = ready(feed(session))
    panel.check.value = False
    session.end()
    before = fingerprint(session.model)
    # eight bits of floating point: all are within what a histogram can tell
    assert (panel.rows.best == "static_minmax").all()
    panel.use.click()
    assert "Nothing was changed" in panel.used.value and session.phase == "ended"
    assert differences(before, fingerprint(session.model)) == []
    panel.close()


def test_an_observer_with_arguments_is_compared_and_found_again():
    kwargs, names = dict(observer_kwargs=dict(grid=50.0)), dict(weights="memoryless_mse", input_activations="mse")
    own = {part: fields | kwargs | dict(observer=names[part]) for part, fields in FOUR_BITS.items()}
    session = feed(Session(make_model("llama_gqa"), make_batches(2), scheme=own))
    state = WorkbenchState()
    panel = ready(session, state)
    for base_name, label in (("input", "mse(grid=50.0)"), ("weight", "memoryless_mse(grid=50.0)")):
        state.base_name = base_name
        panel.wait()
        assert panel.problem.value == "" and set(panel.rows.scheme) == {label}
        assert np.isfinite(panel.rows.scheme_db.astype(float)).all()
        names = set(panel.compared.observer)
        assert label in names and label.partition("(")[0] not in names  # that of the recipe stands for its name
    state.base_name, state.format = "input", "int3"  # of which nothing was attached
    panel.wait()
    assert panel.problem.value == "" and len(panel.rows) == 8
    panel.close()


def test_use_best_that_is_refused_is_explained(session):
    panel = ready(session)
    assert panel.use.disabled and "nothing was recorded" in panel.use.tooltip
    panel.use_best()
    assert "cannot use best: nothing was recorded" in panel.problem.value and session.phase == "original"
    panel.close()


def test_use_best_that_is_pressed_before_the_table_is_made_does_the_same():
    "The choice is made from the record, not from what the panel has shown so far."
    patient, session = (Session(make_model("llama_gqa"), make_batches(2), scheme=FOUR_BITS) for _ in range(2))
    panel = ready(feed(patient))
    panel.check.value = False
    panel.use.click()
    panel.close()
    hasty = ObserverComparison(feed(session), WorkbenchState(), visible=True)
    hasty.check.value = False
    hasty.use.click()
    assert session.phase == "original" and hasty.used.value == panel.used.value != ""
    assert session.modifier.resolved_config == patient.modifier.resolved_config
    hasty.close()
