"""What the tests of known differences need."""
import contextlib
from copy import deepcopy

import torch
from harness import (
    SIZE,
    batches,
)
from transformers import AutoModelForCausalLM, LlamaConfig

LLAMA = LlamaConfig(**SIZE, intermediate_size=256, num_key_value_heads=2)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(deepcopy(LLAMA)).to(dtype).eval()


def data(n=3): return batches("Llama, grouped queries", n)


@contextlib.contextmanager
def nan_in_fresh_memory():
    "Memory that nobody has written to holds NaN inside the block."
    torch.use_deterministic_algorithms(True)
    try: yield
    finally: torch.use_deterministic_algorithms(False)
