"""Quantized values are scaled code points, and quantizing them again changes nothing."""
import numpy as np
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcal_nb.observers import Observer
from qcal_nb.schemes import code_points, preset

FLOATS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
INPUT = preset("INT8_STATIC").input_activations


def tensors(shape=(2, 3, 4)): return hnp.arrays(np.float32, shape, elements=FLOATS).map(torch.from_numpy)


def observed(name, stream, **kwargs):
    observer = Observer.load_from_registry(name, base_name="input", args=INPUT, **kwargs)
    for tensor in stream: observer(tensor)
    return observer


@given(tensors((4, 8)), st.sampled_from(["FP8", "INT8_STATIC", "W8A8"]))
def test_fake_quantization_is_idempotent(x, name):
    args = preset(name).weights
    q = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args)(x).get_qparams()
    once = fake_quantize(x, q["scale"], q["zero_point"], args)
    assert torch.allclose(fake_quantize(once, q["scale"], q["zero_point"], args), once, rtol=1e-6, atol=0)


@given(tensors((4, 8)))
def test_quantized_values_are_scaled_code_points(x):
    args = preset("INT8_STATIC").input_activations
    q = observed("static_minmax", [x]).get_qparams()
    steps = fake_quantize(x, q["scale"], q["zero_point"], args).double() / q["scale"].double()
    assert set(steps.round().flatten().tolist()) <= set(code_points(args).tolist())
    assert (steps - steps.round()).abs().max() < 1e-3
