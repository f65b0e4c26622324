"""What several tests of the observers with a histogram need."""
import torch
from hypothesis import strategies as st

from qcal_nb.observers import Observer
from qcal_nb.schemes import preset

NAMES = ["percentile", "entropy", "histogram_mse"]
INT8 = preset("INT8_STATIC").input_activations
ARGS = {
    "int8": INT8,
    "int8 asymmetric": INT8.model_copy(update={"symmetric": False}),
    "int4": INT8.model_copy(update={"num_bits": 4}),
    "int4 asymmetric": INT8.model_copy(update={"num_bits": 4, "symmetric": False}),
    "fp8": preset("FP8").input_activations,
}
TENSORS = st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, -0.0, 1.0, 1e-40, -1e-40, 1e-3]))


def observed(name, stream, args=INT8, base_name="input", **kwargs):
    observer = Observer.load_from_registry(name, base_name=base_name, args=args, **kwargs)
    for tensor in stream: observer(tensor)
    return observer


def ends(observer): return tuple(end.item() for end in observer.clip_range())


def heavy(n=20_000, seed=0, dtype=torch.float32):
    "Values with tails: a product of two normal ones."
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, n, generator=generator) * torch.randn(1, n, generator=generator)).to(dtype)
