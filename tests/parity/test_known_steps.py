"""Known differences in steps, arguments and words, not in numbers."""
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from harness import (
    CONFIGURATIONS,
    INT8,
    linears,
    make,
    ours,
    reference,
)
from transformers import AutoModelForCausalLM, GPT2Config

from qcal_nb.observers import feeding
from qcal_nb.lifecycle import LifecycleError, QuantizationModifier
from qcal_nb.observers import Observer, current_feed
from tests.parity.known import data, llama, nan_in_fresh_memory

pytestmark = pytest.mark.parity
pytest.importorskip("llmcompressor", reason="no reference: pip install -e '.[dev]'")


def test_it_writes_to_the_callers_scheme():
    from llmcompressor.modifiers.quantization import QuantizationModifier as Reference

    from qcal_nb.lifecycle import QuantizationModifier
    def scheme(): return QuantizationScheme(targets=["Linear"], input_activations=INT8 | dict(strategy="tensor"))
    theirs, mine = scheme(), scheme()
    Reference(config_groups={"group_0": theirs}).resolved_config  # noqa: B018
    QuantizationModifier(config_groups={"group_0": mine}).resolved_config  # noqa: B018
    assert theirs != scheme() and mine == scheme()


def test_one_scheme_for_two_modifiers():
    "What the first one asks for, the second one gets."
    from llmcompressor.modifiers.quantization import QuantizationModifier as Reference
    def second(modifier):
        scheme = QuantizationScheme(targets=["Linear"], input_activations=INT8 | dict(strategy="tensor"))
        modifier(config_groups={"group_0": scheme}, input_observer="mse").resolved_config  # noqa: B018
        return modifier(
            config_groups={"group_0": scheme}
        ).resolved_config.config_groups["group_0"].input_activations.observer
    assert (second(Reference), second(QuantizationModifier)) == ("mse", "minmax")


def test_it_writes_to_the_callers_observer_kwargs():
    from llmcompressor.observers import Observer as Theirs
    def left(observers):
        args = QuantizationArgs(**INT8, strategy="tensor", observer_kwargs={"averaging_constant": 0.5})
        observers.load_from_registry("minmax", base_name="input", args=args, averaging_constant=0.9)
        return args.observer_kwargs["averaging_constant"]
    assert (left(Theirs), left(Observer)) == (0.9, 0.5)


def test_a_group_quantized_in_part_leaves_its_model_half_changed():
    from llmcompressor.modifiers.quantization import QuantizationModifier as Reference
    recipe, theirs, mine = dict(scheme="NVFP4", ignore=["lm_head", "re:.*k_proj"]), llama(), llama()
    modifier = Reference(**recipe)
    modifier.initialize_quantization(theirs)
    with pytest.raises(AssertionError): modifier.start_calibration(theirs)
    with pytest.raises(ValueError, match="q_proj/k_proj/v_proj share one global scale, but k_proj"):
        QuantizationModifier(**recipe).initialize_quantization(mine)
    def attached(model): return [n for n, m in model.named_modules() if n.endswith("_observer") or m._forward_pre_hooks]
    assert attached(theirs) and not attached(mine)


def test_its_steps_out_of_order_are_silent():
    from llmcompressor.modifiers.quantization import QuantizationModifier as Reference
    theirs, mine, modifier = llama(), llama(), Reference(scheme="FP8")
    with nan_in_fresh_memory():
        modifier.start_calibration(theirs)
        modifier.initialize_quantization(theirs)
        modifier.end_calibration(theirs)
    with torch.no_grad(): assert theirs(**data()[0]).logits.isnan().all()
    modifier = QuantizationModifier(scheme="FP8")
    with pytest.raises(LifecycleError, match="initialize_quantization first"): modifier.start_calibration(mine)
    modifier.initialize_quantization(mine)
    with pytest.raises(LifecycleError, match="start_calibration first"): modifier.end_calibration(mine)
    with torch.no_grad(): assert torch.equal(mine(**data()[0]).logits, llama()(**data()[0]).logits)


def test_it_accepts_unknown_observers_until_start():
    from llmcompressor.modifiers.quantization import QuantizationModifier as Reference
    modifier, model = Reference(scheme="FP8", input_observer="minmaxx"), llama()
    modifier.initialize_quantization(model)
    with pytest.raises(KeyError): modifier.start_calibration(model)
    with pytest.raises(ValueError, match="observer='minmaxx' is unknown"):
        QuantizationModifier(scheme="FP8", input_observer="minmaxx")


def test_its_nested_disable_hooks_enables():
    from llmcompressor.modifiers.quantization import QuantizationModifier as Reference
    from llmcompressor.modifiers.utils.hooks import HooksMixin
    heard, layer, x = [], torch.nn.Linear(4, 4), torch.ones(1, 4)
    Reference(scheme="FP8").register_hook(layer, lambda *_: heard.append("x"), "forward")
    with HooksMixin.disable_hooks():
        layer(x)
        assert heard == []
        with HooksMixin.disable_hooks(): layer(x)
        layer(x)
        assert heard == ["x"]
    with feeding("outer"):
        with feeding("inner"): assert current_feed.get() == "inner"
        assert current_feed.get() == "outer"


def test_a_rank_without_statistics_asks_for_nothing(monkeypatch):
    "So its next operation meets another observer's. Ours contributes an identity: tests/calibration/test_ranks.py."
    from llmcompressor.observers import Observer as Theirs
    calls = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda value, op, async_op: calls.append(op))
    for value in (torch.empty(0, 3, 8), torch.randn(2, 3, 8)):
        observer = Theirs.load_from_registry(
            "static_minmax", base_name="input", args=QuantizationArgs(**INT8, strategy="tensor")
        )
        observer(value).sync_activation_stats()
        assert len(calls) == 2 * bool(value.numel())


@pytest.mark.parametrize("strategy", ["group", "tensor_group"])
def test_it_calibrates_static_groups_of_activations_that_cannot_run(strategy):
    recipe, theirs = linears(inputs=INT8 | dict(strategy=strategy, group_size=16)) | dict(ignore=["lm_head"]), llama()
    assert reference(theirs, data(), **recipe)
    with torch.no_grad(), pytest.raises(RuntimeError): theirs(**data()[0])
    with pytest.raises(ValueError, match="group scales of an activation must be dynamic"):
        ours(llama(), data(), **recipe)


def test_where_it_finds_nothing_to_do_it_says_nothing():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ).eval()
    assert reference(model, data(), scheme="FP8", ignore=["lm_head"]) == {}
    with pytest.warns(UserWarning, match="8 Conv1D"): assert ours(model, data(), scheme="FP8", ignore=["lm_head"]) == {}
    cache = CONFIGURATIONS["FP8 and KV cache"] | dict(ignore=["lm_head"])
    assert not any("k_scale" in n for n in reference(make("GPT-NeoX"), data(), **cache))
    with pytest.raises(ValueError, match="no attention module whose cache can be hooked"):
        ours(make("GPT-NeoX"), data(), **cache)


def test_it_asks_opt_for_a_field_that_opt_does_not_have():
    cache = CONFIGURATIONS["FP8 and KV cache"] | dict(ignore=["lm_head"])
    with pytest.raises(ValueError, match="num_key_value_heads"): reference(make("OPT"), data(), **cache)
    mine = ours(make("OPT"), data(), **cache)
    assert all(mine[f"model.decoder.layers.{i}.self_attn.{name}_scale"].isfinite() for i in range(2) for name in "kv")
