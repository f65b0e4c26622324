"""Starts ranks/cases.py as real processes, by torchrun where there are several, and collects what each returned."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("cases.py")


def launch(
    folder: Path, ranks: int, cases: list[str], limit: float = 300, patience: float = 60
) -> tuple[list[dict], str, int]:
    """Run cases on `ranks` processes: what each returned, what was printed, the exit status. Longer than `limit`
    seconds is a failure; they count from when all ranks are up, which takes long on a busy machine."""
    folder.mkdir(parents=True, exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *torchrun, str(CASES), str(folder), str(patience), *cases], env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    pids = [folder/f"{r}.pid" for r in range(ranks)]
    late = time.monotonic() + 300
    while process.poll() is None and not all(p.exists() for p in pids) and time.monotonic() < late: time.sleep(0.05)
    try: printed, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # torchrun gives each rank a session of its own
        for pid in [process.pid, *(int(p.read_text()) for p in folder.glob("*.pid"))]:
            try: os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        process.communicate()
        pytest.fail(
            f"{ranks} ranks were not done with {cases} after {limit} seconds: a rank waits for another that does not "
            "come"
        )
    saved = [folder/f"{r}.pt" for r in range(ranks)]
    return [torch.load(p, weights_only=False) if p.exists() else {} for p in saved], printed, process.returncode


def good(folder, ranks, cases):
    results, printed, status = launch(folder, ranks, cases)
    assert status == 0, printed
    return results
