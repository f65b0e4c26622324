"""How fast qcal_nb is beside llm-compressor, and whether it finds the same scales: `make bench`. No test asserts a
time."""
import os
import sys
from pathlib import Path

# Threads that wait for each other sleep instead of spinning. On a machine that does other work too, a spinning thread
# keeps the one that it waits for from running: a call of 20 microseconds then takes 8 milliseconds, the length of a
# time slice. It holds for both sides.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")  # the reference would write a line for every step
sys.path.append(str(Path(__file__).resolve().parents[1]/"parity"))  # where the harness lives
