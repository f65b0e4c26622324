"""Fused experts taken apart into Linear modules: the same logits to the last bit, no memory, and everything back in its
place afterwards."""
import gc
import weakref

import pytest
import torch
from helpers import differences, fingerprint, make_model

from qcal_nb.modeling.experts import BiasedLinear, implementation_of
from qcal_nb.modeling import fused_experts, take_experts_apart, tokens_per_expert, unfused_experts
from qcal_nb.lifecycle import edits, restore, snapshot
from tests.modeling.mixtures import BOTH, EVERY, linears, logits, make, memory, same

pytestmark = pytest.mark.usefixtures("one_thread")


@BOTH
@EVERY
def test_logits_to_the_last_bit_and_back(name, dtype):
    "With transformers' default implementation, and nothing is left when it is undone."
    model = make(name, dtype)
    fused, before, prior, state = fused_experts(model), logits(model), fingerprint(model), snapshot(model)
    kinds = {implementation_of(m) for m in fused.values()}
    assert fused and kinds == ({"eager"} if name == "llama4" else {"grouped_mm"})
    assert take_experts_apart(model) is model and not fused_experts(model)
    assert unfused_experts(model).keys() == fused.keys()
    assert same(before, logits(model))
    for path, old in fused.items(): assert model.get_submodule(path) is not old
    restore(model, state)
    assert all(model.get_submodule(path) is old for path, old in fused.items())
    assert differences(prior, fingerprint(model)) == [] and not edits(state, snapshot(model))
    assert same(before, logits(model))


@BOTH
@EVERY
def test_logits_of_the_eager_implementation(name, dtype):
    model = make(name, dtype, "eager")
    before = logits(model)
    assert {implementation_of(m) for m in fused_experts(model).values()} == {"eager"}
    assert same(before, logits(take_experts_apart(model)))


def test_the_order_of_a_sum_matters():
    "What the two tests above can see: the other implementation's order gives other bits."
    model = make("mixtral", torch.bfloat16)
    before = logits(model)
    take_experts_apart(model).config._experts_implementation = "eager"
    assert not same(before, logits(model))


@EVERY
def test_no_memory_and_the_same_storage(name):
    model = make(name)
    fused, before = list(fused_experts(model).values()), memory(model)
    stacks = {p.untyped_storage().data_ptr() for m in fused for p in m.parameters()}
    take_experts_apart(model)
    assert memory(model) == before == memory(model, *fused)
    found = {p.untyped_storage().data_ptr() for linear in linears(model).values() for p in linear.parameters()}
    assert found == stacks
    count = sum(p.numel() for linear in linears(model).values() for p in linear.parameters())
    assert count == sum(p.numel() for m in fused for p in m.parameters())  # every number once


@EVERY
def test_names_and_kinds(name):
    model = take_experts_apart(make(name))
    parts = ["up_proj", "down_proj"] if name == "nemotron_h" else ["gate_proj", "up_proj", "down_proj"]
    for path, group in unfused_experts(model).items():
        assert [key for key, _ in group.named_children()] == [str(i) for i in range(6)] and len(group[:2]) == 2
        for e in range(6):
            assert [key for key, _ in model.get_submodule(f"{path}.{e}").named_children()] == parts
            assert f"{path}.{e}.up_proj.weight" in model.state_dict()
    for linear in linears(model).values():
        assert isinstance(linear, torch.nn.Linear) and linear.weight.shape == (linear.out_features, linear.in_features)
        assert isinstance(linear, BiasedLinear) == (name == "gpt_oss") == (linear.bias is not None)


def test_no_random_number_is_drawn():
    model = make("mixtral")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    take_experts_apart(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_twice_and_without_experts():
    model = take_experts_apart(make("mixtral"))
    prior = fingerprint(model)
    take_experts_apart(model)
    assert differences(prior, fingerprint(model)) == []
    llama = make_model("llama_gqa")
    prior = fingerprint(llama)
    assert take_experts_apart(llama) is llama and differences(prior, fingerprint(llama)) == []
    assert tokens_per_expert(llama) == []


def test_weights_written_through_either_are_seen_by_both():
    model = make("gpt_oss")
    (path, fused), *_ = fused_experts(model).items()
    expert = unfused_experts(take_experts_apart(model))[path][2]
    with torch.no_grad(): expert.up_proj.weight.fill_(7.0)
    assert (fused.gate_up_proj[2, :, 1::2] == 7).all() and not (fused.gate_up_proj[2, :, 0::2] == 7).any()
    with torch.no_grad(): fused.down_proj_bias[2] = 3.0
    assert (expert.down_proj.bias == 3).all()


def test_hooks_on_the_experts_keep_working():
    model = make("mixtral")
    state, heard = snapshot(model), []
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, args: heard.append(type(m).__name__))
    take_experts_apart(model)
    logits(model)
    assert heard == ["UnfusedExperts"] * 2
    handle.remove()
    logits(model)
    assert len(heard) == 2
    restore(model, state)
    assert not model.model.layers[0].mlp.experts._forward_pre_hooks


def test_experts_used_in_two_places_stay_one():
    model = make("mixtral")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    before = logits(model)
    take_experts_apart(model)
    assert model.model.layers[1].mlp.experts is model.model.layers[0].mlp.experts and len(unfused_experts(model)) == 1
    assert same(before, logits(model))


def test_nothing_keeps_the_model_alive():
    model = take_experts_apart(make("mixtral"))
    stack = weakref.ref(model.model.layers[0].mlp.experts.source[0].down_proj)
    del model
    gc.collect()
    assert stack() is None
