"""Long life: what is left of memory, threads, figures, hooks and files after much use. By hand:

    PYTHONPATH=tests python -m benchmarks.long_life [tiny|smollm2]

Each work is done once first, so that what is made once is there; then memory is read before and after. A line a work.
"""
import ctypes
import gc
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch

from qcal_nb import Workbench, load_tiny_llama, record
from qcal_nb.lifecycle import reset_quantization
from qcal_nb.models import calibration_texts, load_smollm2
from qcal_nb.pipelines import batches
from qcal_nb.session import Session


def resident() -> float:
    "MiB of this process in memory now."
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)    # what was freed goes back to the system
    with open("/proc/self/statm") as file: return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())


def state(model: torch.nn.Module) -> dict[str, float]:
    return dict(MiB=resident(), threads=threading.active_count(), figures=len(plt.get_fignums()), hooks=hooks_of(model),
                modules=sum(isinstance(o, torch.nn.Module) for o in gc.get_objects()))


def one_token_batches(model: torch.nn.Module, texts: list, n: int) -> Session:
    "A session that feeds `n` batches of one token, one step each time, and is reset."
    session = Session(model, [torch.tensor([[i % 256]]) for i in range(n)], scheme="INT8_STATIC")
    session.initialize()
    session.start()
    for _ in range(n): session.feed(1)
    session.end()
    session.reset()
    return session


def workbenches(model: torch.nn.Module, texts: list, n: int) -> None:
    "Workbenches that are opened, fed a batch, looked at and closed."
    for _ in range(n):
        bench = Workbench(model, texts[:1], scheme="INT8_STATIC")
        bench.initialize()
        bench.start()
        bench.feed(1)
        for panel in bench.panels: bench.turn_to(panel)
        bench.static_png()
        bench.close()


class AtCall:
    "A hook that interrupts at its `number`th call."

    def __init__(self, number: int) -> None: self.left = number

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0: raise KeyboardInterrupt


def interrupted_feeds(model: torch.nn.Module, texts: list, n: int) -> None:
    "Feeds that stop in the middle of a batch, each followed by a reset."
    for i in range(n):
        session = Session(model, texts[:2], scheme="INT8_STATIC")
        session.initialize()
        session.start()
        stop = AtCall(1 + i)
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        handles = [m.register_forward_pre_hook(stop) for m in layers]
        try: session.feed_all()
        except KeyboardInterrupt: pass
        for handle in handles: handle.remove()
        session.reset()
        reset_quantization(model)


def records(model: torch.nn.Module, texts: list, n: int) -> None:
    for _ in range(n): record(model, texts[:1], progress=False)


WORKS: list[tuple[str, Callable, int, int]] = [
    ("batches of one token in one session, then reset", one_token_batches, 20, 1000),
    ("workbenches opened, fed and closed", workbenches, 3, 50),
    ("feeds interrupted, then reset", interrupted_feeds, 3, 30),
    ("records", records, 3, 30),
]


def main(name: str = "tiny") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2() if name == "smollm2" else load_tiny_llama()
    texts = list(batches(calibration_texts()[:2], tokenizer, 1, 64))
    for words, work, few, many in WORKS:
        work(model, texts, few)
        before = state(model)
        began = time.perf_counter()
        work(model, texts, many)
        after = state(model)
        change = ", ".join(f"{key} {before[key]:,.0f} -> {after[key]:,.0f}" for key in before)
        print(f"{name}: {many:,} {words}: {change}; {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__": main(*sys.argv[1:])
