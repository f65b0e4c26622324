"""The panel that compares schemes, without a browser: in the background, stopped, failed, refused."""
from helpers import make_batches, make_model

from qcal_nb.evaluate import best_by_tensor, compare_in_pieces
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.records import CalibrationRecord
from qcal_nb.widgets.schemes import OWN, chosen_schemes, schemes_html, winners_html
from qcal_nb.widgets import SchemeComparison
from qcal_nb.session import Session


def test_schemes_are_compared_in_the_background_and_the_session_stays(session):
    panel = SchemeComparison(session)
    panel.names.value = [OWN, "W8A8"]
    assert not panel.go.disabled and panel.halt.disabled and "makes the figures look better" in panel.result.value
    notes, bars = [], []
    session.listen(
        lambda what: (notes.append(panel.note.value), bars.append(panel.bar.value)) if what == "compare" else None
    )
    panel.go.click()
    session._thread.join(180)
    assert session.compared.scheme.tolist() == ["original", OWN, "W8A8"] and session.phase == "original"
    assert panel.problem.value == ""
    assert "12 of 12 batches evaluated" in notes[-1] and bars[-1] == 1.0 and not panel.go.disabled
    assert panel.bar.value == 0
    table = session.compared
    assert f"{table.perplexity[2]:.4g}" in panel.result.value and table.worst[1] in panel.result.value
    assert "Closest to the original" in panel.result.value
    session.eval_data = ["x"]
    panel.refresh()
    assert "look better" not in panel.result.value
    panel.close()


def test_schemes_keep_targets_and_ignore(session):
    session.configure(ignore=["lm_head", "re:.*down_proj"])
    found = chosen_schemes(session, (OWN, "W8A8"))
    assert found[OWN] is session.modifier and found["W8A8"].resolved_config.ignore == ["lm_head", "re:.*down_proj"]


def test_stop_keeps_the_rows_that_are_finished(session):
    panel = SchemeComparison(session)
    panel.names.value = ["FP8", "W8A8", "INT8_STATIC"]
    beats = []
    def stop_later(what):
        if what == "compare": beats.append(1)
        if len(beats) == 9: panel.halt.click()
    session.listen(stop_later)
    panel.go.click()
    session._thread.join(180)
    assert session.compared.scheme.tolist() == ["original", "FP8"] and not panel.go.disabled and panel.halt.disabled
    panel.close()


def test_an_error_is_shown_where_it_happened(session):
    panel = SchemeComparison(session)
    panel.names.value = ["W4A16"]  # groups of 128 do not divide 64
    panel.go.click()
    session._thread.join(180)
    assert panel.problem.value == "" and session.running == "" and not panel.go.disabled
    assert "W4A16 was not measured: the scheme does not fit" in panel.result.value
    panel.names.value = ["NVFP4", "W4A16"]
    panel.go.click()
    session._thread.join(180)
    assert panel.problem.value == "" and session.compared.scheme.tolist() == ["original", "NVFP4", "W4A16"]
    assert "W4A16 was not measured: the scheme does not fit" in panel.result.value
    panel.names.value = ["FP8"]
    panel.go.click()
    session._thread.join(180)
    assert panel.problem.value == "" and len(session.compared) == 2
    panel.close()


def test_why_schemes_cannot_be_compared(session):
    panel = SchemeComparison(session)
    session.initialize()
    assert panel.go.disabled and "Press Back or Reset first" in panel.note.value
    session.reset()
    panel.names.value = []
    assert panel.go.disabled and "Choose at least one" in panel.note.value
    assert "must be a causal language model" in SchemeComparison(
        Session(make_model("bert"), make_batches(1))
    ).note.value
    assert "no text to measure on" in SchemeComparison(Session(make_model("llama_gqa"))).note.value
    saved = Session(make_model("llama_gqa"), make_batches(1))
    saved.model = None
    shown = SchemeComparison(saved)
    assert "saved record" in shown.note.value and shown.go.disabled and shown.result.value == ""
    shown.compare()
    assert "saved record" in shown.problem.value


def test_lines_of_text_are_escaped_and_shown():
    model, tokenizer = load_tiny_llama()
    session = Session(model, calibration_texts()[:2], tokenizer)
    panel = SchemeComparison(session)
    panel.names.value, panel.prompt.value = ["W8A16"], "class <T>"
    panel.go.click()
    session._thread.join(180)
    table = session.compared
    assert table.text.notna().all() and "continues with" in panel.result.value
    html = schemes_html(table.assign(text="<b>\n", weight_bytes=None, worst_sqnr_db=float("inf")))
    assert "&lt;b&gt; ↵" in html and "unknown" in html and "∞" in html and winners_html(table.iloc[:1]) == ""
    panel.close()


def test_rows_of_nothing():
    assert best_by_tensor(compare_in_pieces(CalibrationRecord(), "input"), {}).empty
