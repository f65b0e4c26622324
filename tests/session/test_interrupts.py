"""An interrupt may fall at any line of any step. After a reset, nothing of the step is left."""
import os
import random
import time

import pytest

from tests.session.interrupting import STEPS, AfterSeconds, AtLine, left_after, left_behind, one_layer, state_of

WHOLE = os.environ.get("QCAL_INTERRUPTS") == "whole"    # every line; else a sample of 100 and 16 of any moment


def lines_of(step: str) -> int:
    "How many lines a step has, when what is made once is there."
    left_after(step, AtLine())
    counting = AtLine()
    assert left_after(step, counting) == []
    return len(counting.lines)


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupt_at_a_line(step):
    lines = lines_of(step)
    assert lines > 50
    sample = range(lines) if WHOLE else sorted(random.Random(step).sample(range(lines), 6))
    found = {}
    fell = 0
    for number in sample:
        interrupt = AtLine(number)
        left = left_after(step, interrupt, again=not WHOLE)
        fell += interrupt.place is not None
        if left: found[interrupt.place] = left
    assert found == {} and fell >= len(sample) * 0.9


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupt_at_a_line_that_was_passed_before(step):
    "Lines count each time they are reached: the third hook, the second batch."
    counting = AtLine(distinct=False)
    left_after(step, counting)
    moments = random.Random(step).sample(range(counting.count), 200 if WHOLE else 1)
    found = {number: left for number in moments if (left := left_after(step, AtLine(number, distinct=False)))}
    assert found == {}


def seconds_of(step: str) -> float:
    left_after(step, AtLine(-1))
    began = time.perf_counter()
    left_after(step, AfterSeconds(60), again=False)
    return time.perf_counter() - began


@pytest.mark.parametrize("step", ["calibrate", "calibrate, sequential", "record", "session: feed_all"])
def test_an_interrupt_by_a_timer(step):
    "As Ctrl-C comes: between any two instructions, also in the libraries."
    seconds = seconds_of(step)
    moments = [random.Random(i).uniform(0, seconds) for i in range(250 if WHOLE else 10)]
    found = {moment: left for moment in moments if (left := left_after(step, AfterSeconds(moment)))}
    assert found == {}


def test_an_interrupt_that_is_not_noticed_would_be():
    "The look itself: a hook that stays is found."
    model = one_layer()
    before = state_of(model)
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert left_behind(model, before) != []
    handle.remove()
    assert left_behind(model, before) == []
