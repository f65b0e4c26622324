"""`python -m benchmarks.peak SmolLM2 record 4096`: MiB that this process uses before a pass of a model with its own
attention, and at the highest point of it; `bare` or recorded. It is a process of its own, because memory that another
pass left free would be used again and not seen."""
import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from qcal_nb.models import load_smollm2, load_tiny_llama
from qcal_nb.pipelines import as_batch, calibration_context, feed
from qcal_nb.records import record

MODELS = {"SmolLM2": load_smollm2, "embedded Llama": load_tiny_llama}  # from what they are called to how one is made
MIB = 2**20
MMAP_THRESHOLD = -3  # what mallopt calls the size from which a block is one of the system's own
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def give_back() -> None:
    """Give memory that was freed to the system, or what is allocated next would take it and not be seen. From now on
    each large block goes back at once, or what is kept would vary by 40 MiB from run to run. Only glibc can."""
    gc.collect()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "malloc_trim"): return
    libc.mallopt(MMAP_THRESHOLD, 2**18)
    libc.malloc_trim(0)


def forget_peak() -> None:
    "Let the highest point begin at what is used now. Only Linux can; elsewhere it is that of the whole process."
    if FORGET.exists(): FORGET.write_text("5")


def peak() -> float:
    "MiB at the highest point."
    if STATUS.exists():
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


def run(model: Module, what: str, tokens: int) -> Any:
    "One pass, bare or recorded."
    ids = torch.randint(0, 1024, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    if what == "record": return record(model, [ids], attention="model", progress=False)
    with calibration_context(model, "model"): return feed(model, as_batch(dict(input_ids=ids)))


def main(name: str, what: str, tokens: int) -> None:
    model, _ = MODELS[name]()
    run(model, "record", 8)  # for both: compiled loops are loaded, and pools of threads made
    give_back()
    forget_peak()
    before = peak()
    kept = run(model, what, tokens)
    print(before, peak())
    del kept


if __name__ == "__main__": main(*sys.argv[1:3], int(sys.argv[3]))
