"""The engine without the reference: scales that equalled the reference's when they were stored (see stored_scales.py)
come out again."""
import pytest
import torch
from safetensors.torch import load_file
from stored_scales import FILE, cases, scales_of

STORED = load_file(FILE)


@pytest.mark.parametrize(("model", "recipe"), cases())
def test_scales_come_out_again(model, recipe):
    """Weights: to the bit on any machine. Activations pass matrix products, which differ in the last bits between
    processors."""
    found, prefix = scales_of(model, recipe), f"{model}/{recipe}/"
    assert {n.removeprefix(prefix) for n in STORED if n.startswith(prefix)} == set(found)
    for name, value in found.items():
        stored = STORED[prefix + name]
        if "weight" in name and recipe != "imatrix": assert torch.equal(value, stored), name
        else: torch.testing.assert_close(value, stored, rtol=2e-2 if recipe in ("mse", "imatrix") else 1e-5, atol=0)
