"""Where tensors pass: what `watch` shows, that it changes nothing, and that nobody else hooks a module to look at
it."""
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers import make_batches, make_model
from torch.nn import Linear, Module

import qcal_nb
from qcal_nb.calibration import observer_of
from qcal_nb.lifecycle import QuantizationModifier, State, reset_quantization
from qcal_nb.modeling import attention_modules, hook_attention
from qcal_nb.lifecycle import restore, snapshot
from qcal_nb.taps import TAPS, has_tap, unwatch, watch

PACKAGE = Path(qcal_nb.__file__).parent
# who registers hooks for something else: a guard against foreign passes, the modules that a block's pass meets, a
# quantized output
NOT_TO_LOOK = {
    "calibration/lock.py", "modeling/uncalled.py", "pipelines/sequential.py", "lifecycle/steps.py", "taps.py"
}


class Named(Module):
    "Calls a layer with names only."

    def __init__(self):
        super().__init__()
        self.inner = Linear(4, 4)

    def forward(self, mask=None, *, hidden_states): return self.inner(input=hidden_states), mask


def test_nobody_else_hooks_a_module_to_look_at_it():
    hooks = {
        p.relative_to(PACKAGE).as_posix()
        for p in PACKAGE.rglob("*.py") if re.search(r"register_forward_(pre_)?hook\(", p.read_text())
    }
    assert hooks <= NOT_TO_LOOK, hooks - NOT_TO_LOOK


def test_named_arguments_and_tuples():
    model, seen = Named(), {}
    for name, module in (("outer", model), ("inner", model.inner)):
        for base_name in ("input", "output"):
            watch(module, base_name, lambda value, key=(name, base_name): seen.update({key: value}))
    x = torch.ones(2, 4)
    with torch.no_grad(): y, _ = model(None, hidden_states=x)
    assert seen["outer", "input"] is x and seen["inner", "input"] is x
    assert seen["outer", "output"] is y and seen["inner", "output"] is y


def test_states_of_attention_as_they_are_and_the_same_logits():
    model = make_model("llama_gqa")
    batch = make_batches(1)[0]
    with torch.no_grad(): exact = model(**batch).logits
    before, seen = snapshot(model), {}
    attention = next(iter(attention_modules(model).values()))
    assert not any(has_tap(attention, state) for state in "qkv")
    with pytest.raises(
        ValueError, match="base_name='k': no such tensor passes this LlamaAttention.*only where attention is hooked"
    ):
        watch(attention, "k", print)
    hook_attention(model, attention)
    handles = [watch(attention, state, lambda value, state=state: seen.update({state: value})) for state in "qkv"]
    with torch.no_grad(): assert torch.equal(model(**batch, use_cache=False).logits, exact)
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    assert [seen[state].shape[1] for state in "qkv"] == [heads[0], heads[1], heads[1]]
    for handle in handles: handle.remove()
    restore(model, before)


def test_a_copied_model_shows_its_tensors_to_its_own_observers():
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(scheme="INT8_STATIC", input_observer="static_minmax", ignore=["lm_head"])
    modifier.on_initialize(State(model))
    modifier.start_calibration(model)
    copied = deepcopy(model)
    with torch.no_grad(): copied(**make_batches(1)[0])
    name = "model.layers.0.self_attn.q_proj"
    assert observer_of(copied.get_submodule(name), "input").has_statistics
    assert not observer_of(model.get_submodule(name), "input").has_statistics
    reset_quantization(model)


def test_unwatch_removes_what_it_was_asked_to_remove_and_nothing_else():
    layer, mine, yours = Linear(3, 3), [], []
    foreign = layer.register_forward_pre_hook(lambda *_: None)
    for base_name in ("input", "output"):
        watch(layer, base_name, mine.append)
        watch(layer, base_name, yours.append)
    unwatch(layer, mine.append)
    layer(torch.zeros(1, 3))
    assert not mine and len(yours) == 2 and foreign.id in layer._forward_pre_hooks
    unwatch(layer, yours.append)
    assert len(layer._forward_pre_hooks) == 1 and not layer._forward_hooks and not layer._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("base_name", ["weight", "outputs", "", None])
def test_unknown_names_are_refused(base_name):
    said = f"base_name={base_name!r}: no such tensor passes this Linear; it must be one of {', '.join(map(repr, TAPS))}"
    with pytest.raises(ValueError, match=re.escape(said)):
        watch(Linear(2, 2), base_name, print)
