"""The benchmarks themselves: every row runs, they alternate, and scales that differ are seen. No test asserts a
time."""
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

pytest.importorskip("llmcompressor", reason="no reference: pip install -e '.[dev]'")
from benchmarks import __main__ as command
from benchmarks import measuring, results, sides
from benchmarks.measuring import (
    Agreement, Found, Spread, Work, agreement, alternate, memory, one_read, same_bits, search_error, threads
)
from benchmarks.model_rows import ROWS
from benchmarks.sides import INT4_GROUP, INT8_TENSOR, NVFP4, OBSERVERS, QUICK

from qcal_nb.observers import Observer, Registry
from qcal_nb.observers import StaticMinMaxObserver

pytestmark = [pytest.mark.parity, pytest.mark.slow]
WITHOUT_SCALES = {
    "record", "live plots", "import", "temporaries", "reset", "growth", "growth of steps", "SmolLM2 CPU",
    "SmolLM2 session", "SmolLM2 analysis", "SmolLM2 memory",
}


def has_scales(row, line):
    "Whether a line is about scales that the reference finds too: of a row about everything, its hooks."
    return row.name not in WITHOUT_SCALES and not line.row.endswith(": record")


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_row_runs(row): check(row, row.run(replace(QUICK, rounds=1)))


@pytest.mark.real
@pytest.mark.parametrize("name", ["SmolLM2 own attention", "SmolLM2 memory"])
def test_row_runs_on_smollm2(name):
    row = next(r for r in ROWS if r.name == name)
    lines = row.run(replace(QUICK, rounds=1, model="SmolLM2"))
    check(row, lines)
    assert all(line.agreement is None or line.agreement.scales == 210 for line in lines)


def check(row, lines):
    "Lines have names of their own and finite numbers, and scales where there are any, of which none differs."
    assert lines and len({line.row for line in lines}) == len(lines) and row.what.endswith(".")
    for line in lines:
        spreads = [s for s in (line.ours, line.reference, line.ratio) if s is not None]
        assert all(math.isfinite(v) for s in spreads for v in (s.median, s.low, s.high))
        assert line.limit is None or math.isfinite(line.limit)
        assert (line.agreement is not None) == has_scales(row, line)
        if line.agreement: assert line.agreement.scales and line.agreement.differ == 0
        if line.points: assert len(line.points["x"]) == len(line.points["seconds"]) > 1
    assert all(line.row in results.table(lines) for line in lines)


def test_names_are_unique(): assert len({r.name for r in ROWS}) == len(ROWS)


def test_rows_that_need_smollm2_say_so(): assert all(r.real == r.name.startswith("SmolLM2") for r in ROWS)


# --- the clock ---


def test_alternates():
    calls = []
    works = {name: Work(calls.append, lambda name=name: name) for name in "AB"}
    times = alternate(works, rounds=3, clock=lambda work, n=1: measuring.seconds(work))
    # the first round does not count
    assert calls == list("AB" * 4) and {name: len(t) for name, t in times.items()} == dict(A=3, B=3)


def test_a_slow_first_round_counts():
    took = iter([30.0, 20.0, 31.0, 21.0, 32.0, 22.0])
    times = alternate({"A": Work(print), "B": Work(print)}, clock=lambda work, n=1: next(took))
    assert times == dict(A=[30.0, 31.0, 32.0], B=[20.0, 21.0, 22.0])


def test_what_is_slow_takes_part_in_the_first_rounds_only():
    calls = []
    def clock(work, n=1):
        calls.append(work.prepare())
        return 3.0
    works = {name: Work(print, lambda name=name: name) for name in "AB"}
    times = alternate(works, rounds=4, clock=clock, seldom=["B"])
    # B not in the round that does not count, and no more after five seconds
    assert "".join(calls) == "A" + "ABABAA" and {name: len(t) for name, t in times.items()} == dict(A=4, B=2)


def test_quick_work_is_called_several_times_in_a_row():
    calls = []
    alternate({"A": Work(lambda _: calls.append("A")), "B": Work(lambda _: calls.append("B"))}, rounds=1)
    assert "".join(calls) == "AB" + "A" * measuring.CALLS + "B" * measuring.CALLS


def test_preparing_is_not_on_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    def wait(seconds): now[0] += seconds
    assert measuring.seconds(Work(lambda made: wait(made), lambda: wait(100) or 2.0), calls=3) == 2.0


def test_the_clock_of_the_processor_does_not_see_sleep():
    sleeping = Work(lambda _: measuring.time.sleep(0.05))
    assert measuring.cpu_seconds(sleeping) < measuring.seconds(sleeping)


def test_rounds():
    assert measuring.rounds_for([0.001]) == measuring.MOST
    assert measuring.rounds_for([9.0, 9.0]) == measuring.LEAST >= 5
    assert measuring.rounds_for([25.0, 1.0]) == measuring.FEW


def test_garbage_is_collected_as_before_afterwards():
    import gc
    with pytest.raises(ZeroDivisionError): alternate({"A": Work(lambda _: 1 / 0)})
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_spread(): assert Spread.of([3, 1, 2, 5, 4]) == Spread(3, 2, 4) and Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_threads():
    before = torch.get_num_threads()
    with threads(1): assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


# --- agreement ---


def test_same_bits():
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.tensor([0.0, 1.0])
    assert same_bits(nan, nan.clone()).tolist() == [True, True]
    assert same_bits(zero, -zero.flip(0).flip(0)).tolist() == [False, False]  # 0.0 and -0.0 are not the same bits
    assert not same_bits(zero, zero.double()).any() and not same_bits(zero, zero[:1]).any()
    assert not same_bits(zero, None).any()
    assert same_bits(None, None).all()


@pytest.fixture
def off_by_one_ulp():
    "An observer of ours that is wrong by the least possible amount."
    @Observer.register("off_by_one_ulp")
    class OffByOneUlp(StaticMinMaxObserver):
        def update_statistics_from_observed(self, observed):
            super().update_statistics_from_observed(observed)
            self.max_vals = torch.nextafter(self.max_vals, self.max_vals + 1)
            self.min_vals = torch.nextafter(self.min_vals, self.min_vals - 1)
    return OffByOneUlp


def test_a_wrong_observer_is_seen(off_by_one_ulp):
    x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    theirs, right, wrong = (sides.found_by(sides.an_observer(side, name, "input", INT8_TENSOR)(x)) for side, name in
                            (("reference", "static_minmax"), ("ours", "static_minmax"), ("ours", "off_by_one_ulp")))
    assert agreement(theirs, right) == Agreement(1, 1, 0)
    assert agreement(theirs, wrong).differ == 1


def test_a_wrong_observer_is_seen_on_a_model(off_by_one_ulp, monkeypatch):
    model, batch, args = sides.llama(QUICK), sides.batch_of(QUICK.batch), INT8_TENSOR | dict(observer="static_minmax")
    with threads(1):
        assert sides.hooks_agree(model, batch, args) == Agreement(7, 7, 0)
        monkeypatch.setitem(Registry._classes, "staticminmax", off_by_one_ulp)
        assert sides.hooks_agree(model, batch, args).differ > 3


def test_scales_that_differ_meet_no_target():
    line = results.Result("r", "s", Spread.of([1.0]), ratio=Spread.of([9.0]), agreement=Agreement(2, 1, 1))
    assert results.judged(line, results.faster(5)).met is True                # a tie is right
    assert results.judged(replace(line, agreement=Agreement(2, 1, 0)), results.faster(5)).met is False
    assert results.judged(line, results.faster(10)).met is False and results.judged(line, None).met is None


def search(scales, x=None, dtype=torch.float32):
    "LiveResults about one tensor with these scales, and their error."
    x = torch.linspace(-1, 1, 1001).reshape(1, 1, -1).to(dtype) if x is None else x
    args = QuantizationArgs(**INT8_TENSOR)
    found = [Found(torch.tensor([s], dtype=dtype), torch.zeros(1, dtype=torch.int8)) for s in scales]
    return found, search_error(x, args, 2.4)


def test_ties():
    (a, b), error = search([0.01, 0.011])
    assert agreement(a, a, error) == Agreement(1, 1, 0)
    assert agreement(a, b, error) == Agreement(1, 0, 0)                       # one is better than the other
    (a, b), error = search([1.0, 2.0], torch.zeros(1, 1, 8))
    assert agreement(a, b, error) == Agreement(1, 0, 1)                       # both are right
    assert agreement(a, b) == Agreement(1, 0, 0)                              # without a search there are no ties


def test_where_ties_count():
    args, x = QuantizationArgs(**INT8_TENSOR), torch.randn(1, 8, 8)
    assert sides.error_of("mse", "input", args, x) is not None
    assert sides.error_of("mse", "input", args, x.bfloat16()) is None
    assert sides.error_of("static_minmax", "input", args, x) is None


@pytest.mark.parametrize("name, base_name, args", [
    ("memoryless_mse", "weight", INT4_GROUP), ("nvfp4_expanded_mse", "weight", NVFP4),
    ("imatrix_mse", "weight", INT4_GROUP),
    ("mse", "input", INT8_TENSOR)])
def test_the_range_that_was_found_is_better_than_a_narrower_one(name, base_name, args):
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    with sides.quietly(): found = sides.found_by(sides.an_observer("reference", name, base_name, args)(x))
    error = sides.error_of(name, base_name, QuantizationArgs(**args), x)
    scale = (found.scale if found.searched is None else found.searched) / 2
    assert (error(found) < error(replace(found, searched=scale))).float().mean() > 0.9


def test_both_sides_are_asked(): assert list(OBSERVERS) == ["reference", "ours"] and OBSERVERS["ours"] is Observer


# --- memory ---


def test_memory():
    x = torch.zeros(2**20)                                                    # 4 MiB
    assert memory(one_read([x]))[0] < 0.1
    peak, kept = memory(Work(lambda _: (x.abs() + 1).sum()))
    assert 8 <= peak < 8.1 and kept < 0.1                                     # two tensors as large as x, and none left
    peak, kept = memory(Work(lambda _: x + 1))
    assert 4 <= kept <= peak < 4.1


# --- the command and its file ---


def test_file(tmp_path):
    line = results.timing(
        "one", dict(ours=[1.0, 2.0], reference=[4.0, 4.0], limit=[0.5, 0.5]), results.faster(2), Agreement(3, 3, 0)
    )
    grown = replace(
        line, row="two", ratio=None, reference=None, agreement=None, points=dict(x=[1, 2], seconds=[1.0, 2.0])
    )
    results.write("a", "What it is.", [line], tmp_path/"r.json")
    results.write("b", "Another.", [grown], tmp_path/"r.json")
    read = results.read(tmp_path/"r.json")
    assert read["a"]["results"] == [line] and read["b"]["results"] == [grown]
    assert read["a"]["machine"]["llmcompressor"] and line.met is True and line.limit == 3.0
    assert str(results.FILE.parents[2]) not in (tmp_path/"r.json").read_text()


def test_command(capsys):
    command.main(["--quick", "iMatrix"])
    printed = capsys.readouterr().out
    assert "imatrix_mse weight" in printed and "static_minmax" not in printed and "nothing was written" in printed
    with pytest.raises(SystemExit): command.main(["--quick", "no such row"])


def test_command_says_at_once_that_smollm2_is_missing(monkeypatch):
    def missing(): raise ModuleNotFoundError("pip install it")
    monkeypatch.setattr(command, "require_smollm2", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install it"): command.main(["smollm2"])


ONE_TENSOR = """
import torch
from benchmarks import peak
kept = [torch.ones(16)]
peak.forget_peak()
before = peak.peak()
kept.append(torch.ones(64 * 2**18))     # 64 MiB
print(peak.peak() - before)
"""


def test_the_highest_point_of_a_process():
    "In a process of its own: memory that another test has freed would be used again."
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", ONE_TENSOR], env=env, capture_output=True, text=True, timeout=300)
    assert 60 <= float(done.stdout) < 80, done.stderr
