"""Steps of a calibration, interrupted at any line or at any time, and what is left of them after a reset."""
import contextlib
import gc
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from helpers import differences, fingerprint, make_batches
from transformers import AutoModelForCausalLM, LlamaConfig

import qcal_nb
from qcal_nb.calibration import lock
from qcal_nb.evaluate import compare_schemes
from qcal_nb.lifecycle import QuantizationModifier, State, is_interrupted, reset_quantization
from qcal_nb.observers.hearing import current_feed, feed_owner
from qcal_nb.pipelines import calibrate, context
from qcal_nb.records import record
from qcal_nb.session import Session, SessionError

ONE_LAYER = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                 intermediate_size=32, max_position_embeddings=32)
QUIET = dict(progress=False)
BATCHES = make_batches(2, 64, (1, 8))
CACHE = dict(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)
FILES = (str(Path(qcal_nb.__file__).parent), contextlib.__file__)


def one_layer() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**ONE_LAYER)).eval()


def recipe() -> QuantizationModifier:
    return QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"], kv_cache_scheme=CACHE)


# --- what is done to a model before the step, the step itself, and the way back ---

def by_hand(*steps: str) -> Callable[[torch.nn.Module], QuantizationModifier]:
    def prepare(model):
        modifier = recipe()
        for step in steps: getattr(modifier, step)(model)
        if "start_calibration" in steps:
            with torch.no_grad(): model(**BATCHES[0], use_cache=False)
        return modifier
    return prepare


def in_session(*steps: str, **options: Any) -> Callable[[torch.nn.Module], Session]:
    def prepare(model):
        session = Session(model, BATCHES, recipe=recipe(), **options)
        for step in steps: getattr(session, step)()
        return session
    return prepare


def calibrated(pipeline: str) -> Callable:
    return lambda model, _: calibrate(model, BATCHES, recipe(), pipeline=pipeline, progress=False)


def recorded(model, _): record(model, BATCHES, scheme="INT8_STATIC", base_names=("input", "k", "weight"), **QUIET)
def compared(model, _): compare_schemes(model, BATCHES, ["INT8_STATIC"], eval_data=BATCHES[:1], **QUIET)
def reset_model(model, _): reset_quantization(model)


def reset_session(model, session):
    "As a user would: if it says that nothing is to be reset, that has to be true."
    try: session.reset()
    except SessionError as told: assert "the model is as it was" in str(told), told
    assert (session.phase, session.fed, session.history, session.running) == ("original", 0, [], "")


def step_of(name: str) -> Callable: return lambda _, session: getattr(session, name)()


ATTACHED = ("initialize_quantization", "start_calibration")
STEPS = {
    "calibrate": (by_hand(), calibrated("basic"), reset_model),
    "calibrate, sequential": (by_hand(), calibrated("sequential"), reset_model),
    "record": (by_hand(), recorded, reset_model),
    "compare_schemes": (by_hand(), compared, reset_model),
    "modifier: initialize": (by_hand(), lambda m, one: one.initialize_quantization(m), reset_model),
    "modifier: start": (by_hand(*ATTACHED[:1]), lambda m, one: one.start_calibration(m), reset_model),
    "modifier: end": (by_hand(*ATTACHED), lambda m, one: one.on_end(State(m)), reset_model),
    "reset_quantization": (by_hand(*ATTACHED), reset_model, reset_model),
    "session: initialize": (in_session(), step_of("initialize"), reset_session),
    "session: start": (in_session("initialize"), step_of("start"), reset_session),
    "session: feed": (in_session("initialize", "start"), lambda _, one: one.feed(1), reset_session),
    "session: feed_all": (in_session("initialize", "start", "feed"), step_of("feed_all"), reset_session),
    "session: sequential": (
        in_session("initialize", "start", pipeline="sequential"), step_of("feed_all"), reset_session
    ),
    "session: end": (in_session("initialize", "start", "feed_all"), step_of("end"), reset_session),
    "session: back": (in_session("initialize", "start", "feed_all", "end"), step_of("back"), reset_session),
    "session: reset": (in_session("initialize", "start", "feed_all", "end"), step_of("reset"), reset_session),
}


# --- interrupts ---

class AtLine:
    "Interrupts a step at its `number`th line, counted as they are first reached, or each time; notes the lines."

    def __init__(self, number: int | None = None, distinct: bool = True) -> None:
        self.number = number
        self.distinct = distinct
        self.lines: dict[tuple[str, int], None] = {}
        self.count = 0
        self.place = None           # where the interrupt fell

    def trace(self, frame: FrameType, event: str, _: Any) -> Callable | None:
        return self.line if frame.f_code.co_filename.startswith(FILES) else None

    def line(self, frame: FrameType, event: str, _: Any) -> Callable | None:
        place = frame.f_code.co_filename, frame.f_lineno
        if event != "line" or self.distinct and place in self.lines: return self.line
        self.lines[place] = None
        self.count += 1
        if self.count - 1 == self.number:
            self.place = place
            sys.settrace(None)
            raise KeyboardInterrupt
        return self.line

    @contextmanager
    def __call__(self):
        sys.settrace(self.trace)
        try: yield
        finally: sys.settrace(None)


class AfterSeconds:
    "Interrupts a step as Ctrl-C does, by a signal of a timer."

    def __init__(self, seconds: float) -> None: self.seconds = seconds

    @contextmanager
    def __call__(self):
        def stop(*_): raise KeyboardInterrupt
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try: yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def state_of(model: torch.nn.Module) -> dict:
    return dict(model=fingerprint(model), gradients=torch.is_grad_enabled())


def left_behind(model: torch.nn.Module, before: dict) -> list[str]:
    "What a step left: on the model, in the locks, in this thread."
    found = differences(before["model"], fingerprint(model))
    if model in lock._holders or is_interrupted(model): found.append("the model is still held")
    if current_feed.get() is not None or feed_owner.get() is not None: found.append("this thread still feeds")
    if torch.is_grad_enabled() != before["gradients"]: found.append("gradients are not as before")
    return found


def left_after(step: str, interrupt: Any, again: bool = True) -> list[str]:
    """What is left of an interrupted step after a reset: while its traceback is kept (as notebooks do); when that is
    gone; and, `again`, after one more calibration and reset."""
    prepare, act, back = STEPS[step]
    model = one_layer()
    before = state_of(model)
    state = prepare(model)
    kept = SimpleNamespace(error=None)
    try:
        with interrupt(): act(model, state)
    except KeyboardInterrupt as error: kept.error = error
    back(model, state)
    found = left_behind(model, before)
    kept.error = None
    gc.collect()
    found += [f"late: {d}" for d in left_behind(model, before)]
    if again:
        reset_quantization(calibrate(model, BATCHES, recipe(), progress=False))
        found += [f"again: {d}" for d in left_behind(model, before)]
        if context._patches: found.append("again: settings are still patched")
    return found
