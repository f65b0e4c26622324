"""Experts that cannot be taken apart stay as they are, and all or none are."""
from copy import deepcopy

import pytest
import torch
from helpers import SMALL, differences, fingerprint, make_model
from transformers import (
    AutoModelForCausalLM,
    JetMoeConfig,
)

import qcal_nb.modeling.experts as experts_module
from qcal_nb.calibration import exclusive
from qcal_nb.modeling.experts import expert_layout, refused_experts
from qcal_nb.modeling import fused_experts, matches_experts, take_experts_apart, unfused_experts
from tests.modeling.mixtures import make

pytestmark = pytest.mark.usefixtures("one_thread")


def unfuse_warns(model, match):
    prior = fingerprint(model)
    with pytest.warns(UserWarning, match=match): take_experts_apart(model)
    assert differences(prior, fingerprint(model)) == []


def test_matrices_of_another_form_stay():
    jet = AutoModelForCausalLM.from_config(
        JetMoeConfig(**SMALL, num_key_value_heads=4, kv_channels=16, num_local_experts=4, intermediate_size=96)
    )
    assert not fused_experts(jet) and all("weight" in reason for reason in refused_experts(jet).values())
    unfuse_warns(jet, "input_linear and 7 more stay fused")


def test_experts_that_compute_something_else_stay():
    class OddExperts(type(make("mixtral").model.layers[0].mlp.experts)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * super().forward(hidden_states, top_k_index, top_k_weights)
    model = make("mixtral", implementation="eager")
    model.model.layers[1].mlp.experts.__class__ = OddExperts
    assert len(fused_experts(model)) == 2  # it looks like any other
    with pytest.warns(UserWarning, match="layers.1.*computes something other"): take_experts_apart(model)
    assert list(unfused_experts(model)) == ["model.layers.0.mlp.experts"]


@pytest.mark.parametrize("spoil, reason", [
    (lambda m: m.register_parameter("extra", torch.nn.Parameter(torch.zeros(2))), "its parameters are"),
    (lambda m: setattr(m, "down_proj", torch.nn.Parameter(m.down_proj[1:].detach())), "do not fit together"),
    (lambda m: setattr(m, "is_transposed", True), "do not fit together"),
    (lambda m: m.to(torch.float8_e4m3fn), "float8_e4m3fn: quantized already"),
    (lambda m: setattr(m, "forward", lambda *a: None), "forward was replaced"),
    (lambda m: m._modules.pop("act_fn"), "no act_fn"),
])
def test_reasons(spoil, reason):
    model = make("mixtral")
    spoil(fused := model.model.layers[0].mlp.experts)
    if reason == "no act_fn": type(fused)._apply_gate, gate = None, type(fused)._apply_gate
    try:
        if reason == "no act_fn": del type(fused)._apply_gate
        assert reason in refused_experts(model)["model.layers.0.mlp.experts"]
        with pytest.raises(ValueError, match=reason): expert_layout(fused)
        with pytest.warns(UserWarning, match=reason): take_experts_apart(model)
        assert model.model.layers[0].mlp.experts is fused
        assert list(unfused_experts(model)) == ["model.layers.1.mlp.experts"]
    finally:
        if reason == "no act_fn": type(fused)._apply_gate = gate


def test_the_experts_alone_have_no_place_to_be_replaced_in():
    fused = make("mixtral").model.layers[0].mlp.experts
    with pytest.warns(UserWarning, match="MixtralExperts stay fused.*the whole model"): take_experts_apart(fused)
    assert not unfused_experts(fused)


@pytest.mark.parametrize("call", [take_experts_apart, fused_experts, refused_experts])
def test_not_a_model(call):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"): call("mixtral")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("what", ["_linear", "UnfusedExperts", "_prove"])
def test_all_or_nothing(what, error, monkeypatch):
    "A failure at the second layer leaves the first as it was, too."
    model, calls, right = make("mixtral"), [], getattr(experts_module, what)
    prior, limit = fingerprint(model), dict(_linear=25).get(what, 1)
    def failing(*args):
        calls.append(args)
        if len(calls) > limit: raise error("no memory")
        return right(*args)
    monkeypatch.setattr(experts_module, what, failing)
    with pytest.raises(error, match="no memory"): take_experts_apart(model)
    assert len(calls) == limit + 1 and differences(prior, fingerprint(model)) == []


def test_a_model_in_use_is_left_alone():
    import threading
    model, refused = make("mixtral"), []
    def attempt():
        try: take_experts_apart(model)
        except Exception as e: refused.append(str(e))
    with exclusive(model, "calibrate()"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "calibrate() is at work" in refused[0] and len(fused_experts(model)) == 2


def test_which_targets_concern_experts():
    model = make("qwen2_moe")
    for targets, ignore, expected in (
        (["Linear"], [], True), (["re:.*experts.5.gate_proj$"], [], True), (["re:.*experts.6.gate_proj$"], [], False),
        (["re:.*shared_expert.*"], [], False), (["Linear"], ["re:.*mlp.experts.*"], False), (["Embedding"], [], False)
    ):
        assert matches_experts(model, targets, ignore) == expected, (targets, ignore)
        apart = take_experts_apart(deepcopy(model))
        from compressed_tensors.utils.match import match_named_modules
        names = {n for n, _ in match_named_modules(apart, targets, ignore)}
        assert any(".experts." in n for n in names) == expected
    assert not matches_experts(make_model("llama_gqa"), ["Linear"])
