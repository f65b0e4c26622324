"""What an observer looks at again: a new weight at an old address, one that changed, statistics that came later."""
import pytest
import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import QuantizationArgs
from helpers import make_model, offload

from qcal_nb.calibration import update_qparams
from qcal_nb.lifecycle import QuantizationModifier, State
from qcal_nb.observers import Observer


def test_a_new_weight_at_the_old_address_is_looked_at():
    args = QuantizationArgs(num_bits=8, strategy="tensor")
    for _ in range(20):
        observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args)
        weight = torch.randn(16, 16)
        observer(weight)
        del weight
        new = torch.randn(16, 16)
        assert observer(new).max_vals.item() == new.max().item()


def test_an_offloaded_weight_that_changed_is_looked_at(tmp_path):
    model = offload(make_model("llama_gqa"), "disk", tmp_path)
    modifier = QuantizationModifier(scheme="W8A8", ignore=["lm_head"])
    modifier.on_initialize(State(model)); modifier.on_start(State(model))
    layer = model.model.layers[0].mlp.up_proj
    for factor in (2.0, 3.0, 4.0):
        layer.weight_observer(layer.weight)
        update_offload_parameter(layer, "weight", layer.weight * factor)
        assert torch.equal(layer.weight_observer(layer.weight).max_vals, layer.weight.amax(1, keepdim=True))


def test_statistics_that_came_after_the_reading_are_not_consumed():
    "q is read, looked at again, and then k and v are read: what q saw last was not written and is not consumed."
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(scheme="NVFP4A16", ignore=["lm_head"])
    modifier.on_initialize(State(model)); modifier.on_start(State(model))
    q, k, v = (getattr(model.model.layers[0].self_attn, f"{n}_proj") for n in "qkv")
    for layer in (q, k, v): layer.weight_observer(layer.weight)
    update_qparams(q, "weight")
    with torch.no_grad(): q.weight.mul_(2)
    q.weight_observer(q.weight)
    update_qparams([k, v], "weight")
    assert not q.weight_observer.consumed
    update_qparams(q, "weight")
    assert q.weight_observer.consumed


def test_an_observer_needs_arguments():
    for args in (None, dict(num_bits=8)):
        with pytest.raises(TypeError, match="args must be QuantizationArgs, got"):
            Observer.load_from_registry("minmax", base_name="input", args=args)
