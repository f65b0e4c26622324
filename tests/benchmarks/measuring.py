"""What every row measures with: a clock that alternates, agreement of scales bit by bit, live bytes."""
import contextlib
import gc
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

LEAST, MOST, FEW = 5, 25, 3      # rounds: at least, at most, and where one call takes longer than SLOW
SLOW, BUDGET = 20.0, 10.0        # seconds: a slow call; what rounds beyond LEAST may take in all
SELDOM = 5.0                     # seconds after which a work that is only there to compare with takes part no longer
SHORTEST, CALLS = 0.01, 20       # seconds that one entry should take at least; calls in a row to get there, at most
TIE = 1e-6                       # relative difference of two errors below which only the order of summation decides

# --- time ---


@dataclass(frozen=True)
class Work:
    "Something to be timed: `run` gets what `prepare` made, and only `run` is on the clock."

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


def seconds(work: Work, calls: int = 1, now: Callable[[], float] | None = None) -> float:
    "Mean seconds of a call, over some calls in a row."
    total, now = 0.0, now or time.perf_counter
    for _ in range(calls):
        made = work.prepare()
        began = now()
        work.run(made)
        total += now() - began
    return total / calls


def cpu_seconds(work: Work, calls: int = 1) -> float:
    "Mean seconds that the processor works on a call, on all threads of this process together."
    return seconds(work, calls, time.process_time)


def rounds_for(warm: Iterable[float], budget: float = BUDGET) -> int:
    "How many rounds, given the seconds of each call in one: more where it is quick, for then noise matters more."
    warm = list(warm)
    return FEW if max(warm) > SLOW else min(MOST, max(LEAST, int(budget / sum(warm))))


def alternate(works: dict[str, Work], rounds: int | None = None, budget: float = BUDGET,
              clock: Callable[..., float] = seconds, seldom: Collection[str] = ()) -> dict[str, list[float]]:
    """Seconds of each work, an entry a round. A round is A B C, and the next one A B C again; one before them counts
    only where it is slow. Works of `seldom` take part in the first rounds only, until each took SELDOM seconds, and not
    in the one before them, which then never counts. The first work is not one of them."""
    with collected() as collect:
        warm = {name: clock(work) for name, work in works.items() if name not in seldom}
        calls = {name: max(1, min(CALLS, round(SHORTEST / max(took, 1e-6)))) for name, took in warm.items()}
        counts = max(warm.values()) > SLOW and not seldom
        times: dict[str, list[float]] = {name: [warm[name]] if counts else [] for name in works}
        while len(next(iter(times.values()))) < (rounds or rounds_for(warm.values(), budget)):
            collect()
            for name, work in works.items():
                if name in seldom and sum(times[name]) >= SELDOM: continue
                times[name].append(clock(work, calls.get(name, 1)))
    return times


@contextlib.contextmanager
def collected() -> Iterator[Callable[[], Any]]:
    """Inside the block garbage is collected only when asked for, and what is there already is not gone through: that
    would take longer than many rows."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try: yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    "torch's number of threads inside the block."
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try: yield
    finally: torch.set_num_threads(before)


def one_read(tensors: Iterable[Tensor]) -> Work:
    "The physical limit: smallest and largest value of each tensor, contiguous, in one read."
    ready = [t.contiguous() for t in tensors]
    return Work(lambda _: [torch.aminmax(t) for t in ready])


@dataclass(frozen=True)
class Spread:
    "The median of some measurements, and the quartiles around it."

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        if len(values) == 1: return cls(*values * 3)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


# --- agreement ---


@dataclass(frozen=True)
class Agreement:
    """How many scales (each with its zero point) were compared, how many are equal bit for bit, and how many of the
    others are ties: their errors agree to 1e-6, so that the order of an fp32 sum decides."""

    scales: int = 0
    equal: int = 0
    ties: int = 0

    @property
    def differ(self) -> int: return self.scales - self.equal - self.ties

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.scales + other.scales, self.equal + other.equal, self.ties + other.ties)


@dataclass(frozen=True)
class Found:
    """What one side concluded about a tensor. `searched`: the scale that its search tried, where that is another than
    the final one."""

    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None
    searched: Tensor | None = None


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor | None, b: Tensor | None) -> Tensor:
    "Elementwise: the same bits? A single False where dtype or shape differ, a single True if both are None."
    if a is None and b is None: return torch.tensor(True)
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape: return torch.tensor(False)
    a, b = (v.detach().contiguous().view(_BITS[v.element_size()]) for v in (a, b))
    return a == b


def search_error(
    observed: Tensor, args: QuantizationArgs, norm: float, importance: Tensor | None = None
) -> Callable[[Found], Tensor]:
    """The error Σ importance·|QDQ(x) − x|^norm of a conclusion about `observed` (num_observations, *qparam_shape,
    group_size), summed in float64."""
    row = args.model_copy(update={"strategy": "token"})  # one scale a row, broadcast over the group

    def error(found: Found) -> Tensor:
        scale = found.scale if found.searched is None else found.searched
        quantized = fake_quantize(observed, scale.unsqueeze(-1), found.zero_point.unsqueeze(-1), row)
        terms = (quantized.to(observed.dtype) - observed).double().abs_().pow_(norm)
        if importance is not None: terms.mul_(importance)
        return terms.sum(dim=(0, -1))
    return error


def agreement(theirs: Found, mine: Found, error: Callable[[Found], Tensor] | None = None) -> Agreement:
    "Compare two conclusions. With `error` (only where errors are summed in fp32), what differs is looked at for ties."
    equal = same_bits(theirs.scale, mine.scale) & same_bits(theirs.zero_point, mine.zero_point)
    equal = (equal & same_bits(theirs.global_scale, mine.global_scale)).expand(theirs.scale.shape)
    ties = 0
    if error is not None and not equal.all() and theirs.scale.shape == mine.scale.shape:
        a, b = error(theirs), error(mine)
        ties = int((((a - b).abs() <= TIE * torch.maximum(a, b)) & ~equal).sum())
    return Agreement(equal.numel(), int(equal.sum()), ties)


# --- memory ---

MIB = 2**20


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int]]:
    for event in events:
        if event.tag == _EventType.Allocation: yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """What the process itself writes to stderr inside the block is dropped: the profiler is talkative, and not in
    Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try: yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def numpy_memory(work: Work) -> tuple[float, float]:
    "The same for what NumPy and Python itself allocate, which tracemalloc follows."
    made = work.prepare()
    with threads(1):
        tracemalloc.start()
        try:
            kept = work.run(made)
            live, peak = tracemalloc.get_traced_memory()
        finally: tracemalloc.stop()
    del kept
    return peak / MIB, live / MIB


def torch_memory(work: Work) -> tuple[float, float]:
    """MiB that torch allocates above what was live before, at one thread: its profiler reports every block, those
    inside of kernels too."""
    made = work.prepare()
    with threads(1), without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work.run(made)
    live = peak = 0
    for _, size in sorted(
        _allocations(seen.profiler.kineto_results.experimental_event_tree()), key=lambda event: event[0]
    ):
        live += size
        peak = max(peak, live)
    del kept
    return peak / MIB, live / MIB


def memory(work: Work) -> tuple[float, float]:
    """MiB above what was live before: the highest point while `run` ran, and what is left at its end. torch's highest
    and NumPy's are added, though they need not be at one time."""
    return tuple(a + b for a, b in zip(torch_memory(work), numpy_memory(work)))
