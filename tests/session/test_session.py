"""The session: long work in a thread, who may run the model meanwhile, and what is left when something is
interrupted."""
import inspect
import linecache
import threading
import time

import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model, qparams

from qcal_nb.lifecycle import QuantizationModifier, reset_quantization
from qcal_nb.calibration import ModelBusyError
from qcal_nb.observers import histogram
from qcal_nb.observers import Observer, Registry
from qcal_nb.observers import MinMaxObserver
from qcal_nb.pipelines import calibrate
from qcal_nb.records import record
from qcal_nb.session import Session, SessionError
from qcal_nb.session.script import observer_code


class Slow(torch.nn.Module):
    "A model whose forward pass waits until it is let through."

    def __init__(self):
        super().__init__()
        self.layer, self.gate, self.inside = torch.nn.Linear(8, 8), threading.Semaphore(0), threading.Event()

    def forward(self, x):
        self.inside.set()
        if not self.gate.acquire(timeout=120): raise TimeoutError("nobody let this batch through")
        return self.layer(x)


def slow_session(n=1000):
    session = Session(Slow(), [torch.randn(2, 8) for _ in range(n)], ignore=[])
    session.initialize()
    session.start()
    return session


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_stop_within_two_of_a_thousand_batches():
    session = slow_session()
    thread = session.in_background()
    session.model.gate.release(3)
    wait_for(lambda: session.fed == 3)
    session.model.inside.wait(120)
    session.stop()
    session.model.gate.release(2)
    thread.join(120)
    assert not thread.is_alive() and session.fed <= 5 and session.phase == "fed" and session.running == ""
    assert session.record.batches == session.fed == session.model.layer.input_observer.counts.batches
    session.back()
    assert session.fed == 0 and session.phase == "started"


def test_pause_and_resume():
    session = slow_session(6)
    pause_now = threading.Event()
    session.listen(lambda what: (session.pause(), pause_now.set()) if what == "batch" and session.fed == 2 else None)
    thread = session.in_background()
    session.model.gate.release(6)
    pause_now.wait(120)
    time.sleep(0.1)
    assert session.fed == 2 and thread.is_alive()
    session.resume()
    thread.join(120)
    assert session.fed == 6


def test_while_a_feed_runs_everything_else_is_refused_by_name():
    session, x = slow_session(), torch.randn(2, 8)
    thread = session.in_background()
    session.model.inside.wait(120)
    for step in ("initialize", "start", "feed", "end", "back", "reset"):
        with pytest.raises(SessionError, match="feed_all is running; stop it or wait"): getattr(session, step)()
    for foreign in (lambda: session.model(x), lambda: session.model.layer(x)):
        with pytest.raises(ModelBusyError, match=r"session .* \(feed_all\(\)\) is feeding this model"): foreign()
    modifier = QuantizationModifier(scheme="FP8", targets="Linear")
    for other in (
        lambda: record(session.model, [x], progress=False),
        lambda: calibrate(session.model, [x], modifier, progress=False),
    ):
        with pytest.raises(ModelBusyError, match="is at work on it; wait for it or stop it first"): other()
    session.stop()
    session.model.gate.release(2)
    thread.join(120)
    assert session.model.layer.input_observer.counts.observations == session.fed


def test_between_two_feeds_foreign_forward_passes_are_not_heard():
    session = Session(make_model("llama_gqa"), make_batches(2))
    session.initialize()
    session.start()
    session.feed()
    counts = session.model.model.layers[0].mlp.up_proj.input_observer.counts
    with torch.no_grad(): session.model(**make_batches(1, seed=9)[0])
    assert session.model.model.layers[0].mlp.up_proj.input_observer.counts == counts


def test_an_interrupt_keeps_the_batches_before_it():
    model, calls = make_model("llama_gqa"), []
    session = Session(model, make_batches(4))
    session.initialize()
    session.start()
    def interrupt(*_):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
    handle = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt): session.feed_all()
    handle.remove()
    assert (session.fed, session.phase, session.running) == (2, "fed", "")
    assert {m.input_observer.counts.batches for m in model.modules() if hasattr(m, "input_observer")} == {2}
    session.feed_all()
    session.end()
    straight = make_model("llama_gqa")
    calibrate(straight, make_batches(4), QuantizationModifier(scheme="FP8", ignore=["lm_head"]), progress=False)
    assert all(torch.equal(v, qparams(straight)[k]) for k, v in qparams(model).items())


def test_a_feed_that_fails_at_once_leaves_nothing_to_take_back():
    session = Session(make_model("llama_gqa"), [torch.tensor([[999]])])
    session.initialize()
    session.start()
    before = fingerprint(session.model)
    with pytest.raises(ValueError, match="input_ids go from"): session.feed()
    assert session.phase == "started" and len(session.history) == 2
    assert differences(before, fingerprint(session.model)) == []


def test_the_session_equals_calibrate():
    data, stepped, at_once = make_batches(5), make_model("qwen3"), make_model("qwen3")
    session = Session(stepped, data, scheme="INT8_STATIC")
    session.initialize()
    session.start()
    session.feed(2)
    session.feed_all()
    session.end()
    calibrate(at_once, data, QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"]), progress=False)
    assert all(torch.equal(v, qparams(at_once)[k]) for k, v in qparams(stepped).items())
    alone = record(make_model("qwen3"), data, progress=False)
    assert session.record.tensors == alone.tensors
    assert (session.record.batches, session.record.tokens) == (alone.batches, alone.tokens)


def remembered(session):
    "What every observer knows, the record's own ones among them; tensors as bytes."
    plain = lambda v: v.numpy().tobytes() if isinstance(v, torch.Tensor) else v
    observers = {n: m for n, m in session.model.named_modules() if isinstance(m, Observer)}
    mine = {
        (n, k): plain(v) for n, m in observers.items() for k, v in vars(m).items() if k not in vars(torch.nn.Module())
    }
    kept = {key: {k: plain(v) for k, v in memory.items()} for key, memory in session.memory.items()}
    return mine, kept, dict(session.record.results).keys()


def test_the_way_back_over_every_feed_is_exact_and_keeps_only_what_changed():
    session = Session(make_model("llama_gqa"), make_batches(4), scheme="INT8_STATIC")
    session.initialize()
    session.start()
    seen = []
    for _ in range(4):
        seen.append((fingerprint(session.model), remembered(session), session.record))
        session.feed()
    inputs = {m.input_observer for m in session.model.modules() if hasattr(m, "input_observer")}
    for past in session.history[2:]:
        assert {edit.obj for edit in past.model.edits} == inputs  # of 60 modules; and of the record, weights are shared
        assert len(past.model.edits) < 8 * len(inputs) and not past.model.scales and not past.model.orders
    for earlier, later in zip(session.history[3:], [*session.history[4:], session]):
        assert all(stats is later.record[key] for key, stats in earlier.record.tensors.items() if key[1] == "weight")
    for before, known, record_then in reversed(seen):
        session.back()
        assert differences(before, fingerprint(session.model)) == [] and remembered(session) == known
        assert session.record is record_then
    assert session.phase == "started"


def test_configure_before_and_not_after():
    session = Session(make_model("llama_gqa"), make_batches(2))
    with pytest.raises(ValueError, match="'FP9' is not a preset"): session.scheme = "FP9"
    assert session.scheme == "FP8"
    session.configure(scheme="W8A8", ignore=["lm_head", "re:.*mlp.*"])
    session.initialize()
    with pytest.raises(SessionError, match="the scheme is in use"): session.scheme = "FP8"
    assert not hasattr(session.model.model.layers[0].mlp.up_proj, "quantization_scheme")


def test_a_session_wants_an_original_model():
    model = make_model("llama_gqa")
    calibrate(model, make_batches(), QuantizationModifier(scheme="FP8", ignore=["lm_head"]), progress=False)
    with pytest.raises(ValueError, match="this model is calibrated; a session starts with an original one"):
        Session(model)
    reset_quantization(model)
    Session(model)


def test_a_listener_hears_every_step():
    session, heard = Session(make_model("llama_gqa"), make_batches(2)), []
    end = session.listen(heard.append)
    session.initialize()
    session.start()
    session.feed_all()
    session.end()
    session.back()
    end()
    session.reset()
    assert heard == ["initialize", "start", "batch", "batch", "feed", "end", "back"]


def test_the_script_imports_the_module_of_an_observer_of_ones_own_and_it_is_none_for_llm_compressor():
    Observer.register("test_session_own")(type("Own", (MinMaxObserver,), {"__module__": __name__}))
    session = Session(
        make_model("llama_gqa"),
        make_batches(1),
        recipe=QuantizationModifier(scheme="FP8", input_observer="test_session_own"),
    )
    assert f"import {__name__}  # registers the observer {__name__}:Own\n" in session.script()
    assert "llm-compressor has no observer test_session_own" in session.production()
    assert observer_code(QuantizationModifier(scheme="INT8_STATIC")) == []


def test_an_observer_of_a_notebook_is_defined_in_the_script():
    own = "@Observer.register('test_cell')\nclass Cell(MinMaxObserver):\n    def hears(self): return True"
    text = f"x = 1\n\n{own}\n\ny = 2\n"
    space = dict(__name__="__main__", Observer=Observer, MinMaxObserver=MinMaxObserver)
    linecache.cache["<cell>"] = len(text), None, text.splitlines(keepends=True), "<cell>"
    exec(compile(text, "<cell>", "exec"), space)
    recipe = QuantizationModifier(scheme="FP8", input_observer="test_cell")
    imported, defined = observer_code(recipe, recipe)
    assert imported == "from qcal_nb.observers import MinMaxObserver, Observer" and defined.endswith(f"uses\n{own}")
    del linecache.cache["<cell>"]
    assert observer_code(recipe) == [
        "# the observer __main__:Cell has to be defined or imported here, its source is not known"
    ]
    fresh = {"__name__": "fresh"}
    exec(f"{imported}\n{defined}", fresh)
    assert issubclass(fresh["Cell"], MinMaxObserver)


@pytest.mark.parametrize(("more", "expected"), [("", 0), ("    extra = 1\n", 2)])
def test_the_package_s_own_observer_run_again_from_its_chapter_is_not_the_user_s(more, expected, monkeypatch):
    """As nbdev-test does: several chapters in one kernel. A class of the same name that is another one has to be
    defined."""
    name = f"<chapter {expected}>"
    text = inspect.getsource(histogram.PercentileObserver) + more
    monkeypatch.setitem(linecache.cache, name, (len(text), None, text.splitlines(keepends=True), name))
    exec(compile(text, name, "exec"), vars(histogram) | {"__name__": "__main__"})
    assert Registry._classes["percentile"].__module__ == "__main__"
    assert len(observer_code(QuantizationModifier(scheme="FP8", input_observer="percentile"))) == expected


def test_back_leaves_what_others_put_on_the_model():
    "A hook and a note of your own, put there between two steps, stay; so does the order of all other hooks."
    session = Session(make_model("llama_gqa"), make_batches(2), scheme="INT8_STATIC")
    q = session.model.model.layers[0].self_attn.q_proj
    session.initialize()
    calls = []
    handle = q.register_forward_pre_hook(lambda *_: calls.append("own"))
    session.start()
    q.note = "mine"
    session.feed_all()
    session.end()
    scales = session.scales()
    session.back()
    session.end()
    assert session.scales().equals(scales)
    while session.history: session.back()
    assert session.phase == "original" and q.note == "mine" and list(q._forward_pre_hooks) == [handle.id]
    calls.clear()
    session.model(**make_batches(1)[0])
    assert calls == ["own"] and not hasattr(q, "weight_scale") and not hasattr(q, "quantization_scheme")
