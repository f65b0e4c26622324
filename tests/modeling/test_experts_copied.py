"""Models whose experts are apart, copied, cast, saved and offloaded."""
from copy import deepcopy

import pytest
import torch

from qcal_nb.modeling import fused_experts, take_experts_apart, unfused_experts
from qcal_nb.lifecycle import edits, restore, snapshot, undo
from tests.modeling.mixtures import linears, logits, make, memory, same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "llama4"])
def test_a_deep_copy_is_as_small_and_shares_nothing(name):
    model = make(name)
    before, size = logits(model), memory(model)
    take_experts_apart(model)
    twin = deepcopy(model)
    sources = [group.source[0] for group in unfused_experts(twin).values()]
    assert same(before, logits(twin)) and memory(twin) == size == memory(twin, *sources)
    assert memory(model, twin) == 2 * size
    with torch.no_grad():
        for p in twin.parameters(): p.zero_()
    assert same(before, logits(model)) and not any(s.down_proj.any() for s in sources)


def test_a_deep_copy_keeps_a_weight_that_was_replaced():
    model = take_experts_apart(make("mixtral"))
    linear = model.model.layers[0].mlp.experts[1].up_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone() + 1)
    twin = deepcopy(model)
    other = twin.model.layers[0].mlp.experts[1].up_proj
    assert torch.equal(other.weight, linear.weight) and other.weight.data_ptr() != linear.weight.data_ptr()
    assert same(logits(twin), logits(model))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_cast_reaches_the_stacks(name):
    "`model.to(...)` between unfusing and undoing: the module that comes back was cast with the others."
    model, plain = make(name), make(name).bfloat16()
    state, parameters = snapshot(model), dict(model.named_parameters())
    done = edits(state, snapshot(take_experts_apart(model)))
    model.bfloat16()
    assert memory(model, *(g.source[0] for g in unfused_experts(model).values())) == memory(plain)
    assert same(logits(plain), logits(model))
    undo(done)
    assert all(p is parameters[name] and p.dtype == torch.bfloat16 for name, p in model.named_parameters())
    assert same(logits(plain), logits(model))


def test_a_state_dict_goes_both_ways():
    model, other = make("deepseek_v3"), make("deepseek_v3")
    state, before = snapshot(other), logits(model)
    with torch.no_grad():
        for p in other.parameters(): p.zero_()
    take_experts_apart(other).load_state_dict(take_experts_apart(model).state_dict())
    restore(other, state)
    assert same(before, logits(other))


def test_weights_on_the_meta_device():
    "Without values there is nothing to compute with, but the structure can be had."
    model = take_experts_apart(make("mixtral").to("meta"))
    assert len(linears(model)) == 2 * 6 * 3 and all(p.is_meta for p in model.parameters())


def test_offloaded_experts():
    "Kept in CPU memory by compressed-tensors: the Linears are offloaded as the stacks were, and share their memory."
    from compressed_tensors.offload import disable_onloading, offload_module
    model = make("mixtral")
    before = logits(model)
    (path, fused), *_ = fused_experts(model).items()
    offload_module(fused, "cpu", "cpu")
    state = snapshot(model)
    take_experts_apart(model)
    linear = model.get_submodule(path)[0].gate_proj
    assert type(linear._parameters).__name__ == "CPUCache" and same(before, logits(model))
    with disable_onloading():
        assert (
            linear._parameters["weight"].untyped_storage().data_ptr()
            == fused._parameters["gate_up_proj"].untyped_storage().data_ptr()
        )
    restore(model, state)
    assert model.get_submodule(path) is fused and same(before, logits(model))


def test_experts_on_disk(tmp_path):
    from compressed_tensors.offload import offload_module
    model = make("mixtral")
    before = logits(model)
    (path, fused), *_ = fused_experts(model).items()
    offload_module(fused, torch.device("cpu"), "disk", offload_dir=str(tmp_path))
    take_experts_apart(model)
    assert type(model.get_submodule(path)[0].gate_proj._parameters).__name__ == "DiskCache"
    assert same(before, logits(model))
