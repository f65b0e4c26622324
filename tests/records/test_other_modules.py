"""Models that come from elsewhere: quantized checkpoints just loaded, TorchScript, compiled."""
import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model
from transformers import AutoModelForCausalLM

from qcal_nb.lifecycle import QuantizationModifier, match_report
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import save_quantized
from qcal_nb.records import record
from qcal_nb.session import Session

FP8 = QuantizationModifier(scheme="FP8", ignore=["lm_head"])
KEY = ("model.layers.1.mlp.down_proj", "input")


@pytest.mark.parametrize("scheme", ["FP8", "INT8_STATIC", "W8A8", "FP8_DYNAMIC"])
def test_a_quantized_checkpoint_is_recorded_as_it_computes(tmp_path, scheme):
    model, data = make_model("llama_gqa"), make_batches(2)
    calibrate(model, data, QuantizationModifier(scheme=scheme, ignore=["lm_head"]), progress=False)
    save_quantized(model, tmp_path/"x")
    seen = []
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path/"x") for _ in range(2)]
    fresh, run = loaded  # the second has computed something before
    with torch.no_grad(): run(**data[0])
    hook = run.get_submodule(KEY[0]).register_forward_pre_hook(lambda m, args: seen.append(args[0].float()))
    with torch.no_grad(): [run(**batch) for batch in data]
    hook.remove()
    for one in loaded:
        made = record(one, data, base_names=["input", "weight"], attention="model", progress=False)
        stats = made[KEY]
        assert (stats.min, stats.max) == (min(x.min().item() for x in seen), max(x.max().item() for x in seen))
        weight = made[KEY[0], "weight"]
        assert weight.absmax == one.get_submodule(KEY[0]).weight.float().abs().max().item()


def test_a_quantized_checkpoint_is_refused_in_words_by_everything_that_would_quantize_it(tmp_path):
    model, data = make_model("llama_gqa"), make_batches(1)
    calibrate(model, data, FP8, progress=False)
    save_quantized(model, tmp_path/"x")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path/"x")
    for ask in (lambda: calibrate(loaded, data, FP8, progress=False), lambda: Session(loaded, data).initialize()):
        with pytest.raises(ValueError, match="was quantized elsewhere .*; load the unquantized model"): ask()


def script(): return torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 4)))


def trace(): return torch.jit.trace(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.ones(1, 4))


def compiled(): return torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4)))


@pytest.mark.parametrize("make, words", [(script, "model is TorchScript"), (trace, "model is TorchScript"),
                                         (compiled, "compiled by torch.compile.*pass the original, model._orig_mod")])
def test_what_cannot_be_hooked_is_refused_in_words(make, words):
    model, data = make(), [torch.ones(2, 4)]
    before = fingerprint(model) if make is compiled else None
    for ask in (lambda: calibrate(model, data, FP8, progress=False), lambda: record(model, data, progress=False),
                lambda: match_report(model, FP8), lambda: Session(model, data).initialize()):
        with pytest.raises(TypeError, match=words): ask()
    assert before is None or differences(before, fingerprint(model)) == []
