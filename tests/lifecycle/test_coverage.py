"""What a run leaves behind about itself: who saw what, tokens per expert, and scales to be suspicious of."""
import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model, outputs

from qcal_nb.lifecycle import QuantizationModifier, reset_quantization
from qcal_nb.stats import NonFiniteError
from qcal_nb.observers import Observer
from qcal_nb.pipelines import calibrate, calibration_context
from qcal_nb.records import record

FP8 = dict(scheme="FP8", ignore=["lm_head"])


def covered(model, modifier, **options):
    calibrate(model, make_batches(), modifier, progress=False, **options)
    return {(r.module, r.base_name): r for r in modifier.coverage}


def routed(model):
    "Tokens per expert by the routers' own choice, counted outside of the engine."
    found = {}
    def count(name): return lambda m, args, out: found.setdefault(name, []).append(out[-1].flatten())
    handles = [m.register_forward_hook(count(n)) for n, m in model.named_modules() if n.endswith("mlp.gate")]
    with calibration_context(model, all_experts=False):
        for batch in make_batches(): model(**batch)
    for handle in handles: handle.remove()
    return {
        name.removesuffix(".gate"): torch.bincount(torch.cat(chosen), minlength=4).tolist()
        for name, chosen in found.items()
    }


@pytest.mark.parametrize("pipeline", ["basic", "sequential"])
@pytest.mark.parametrize("all_experts", [True, False])
def test_tokens_per_expert(all_experts, pipeline):
    model = make_model("mixtral")
    rows = covered(model, QuantizationModifier(**FP8), all_experts=all_experts, pipeline=pipeline)
    right = routed(make_model("mixtral"))
    assert set(right) == {"model.layers.0.mlp", "model.layers.1.mlp"} and sum(right["model.layers.0.mlp"]) == 3 * 32 * 2
    for layer, counts in right.items():
        for expert, tokens in enumerate(counts):
            row = rows[f"{layer}.experts.{expert}.up_proj", "input"]
            assert row.expert_tokens == tokens
            assert row.elements == 64 * (3 * 32 if all_experts else tokens)
    assert rows["model.layers.0.self_attn.q_proj", "input"].expert_tokens is None


def lonely(model):
    "Mixtral whose routers never choose the last expert."
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3] = layer.mlp.gate.weight[:3].abs() + 1
            layer.post_attention_layernorm.weight.fill_(1)
    def positive(m, args): return (args[0].abs(),)
    return [layer.mlp.register_forward_pre_hook(positive) for layer in model.model.layers]


def test_an_expert_that_nobody_chose_is_marked():
    model = make_model("mixtral")
    handles = lonely(model)
    with pytest.raises(ValueError, match=r"experts\.3\.gate_proj\.input"):
        calibrate(model, make_batches(), QuantizationModifier(**FP8), all_experts=False, progress=False)
    reset_quantization(model)
    modifier = QuantizationModifier(**FP8)
    rows = covered(model, modifier, all_experts=False, on_uncalibrated="skip")
    row = rows["model.layers.0.mlp.experts.3.up_proj", "input"]
    assert row.never_seen and row.never_routed and not row.computed and row.scales == 0
    reset_quantization(model)
    assert modifier.coverage == []
    row = covered(model, QuantizationModifier(**FP8))["model.layers.0.mlp.experts.3.up_proj", "input"]
    assert row.never_routed and not row.never_seen and row.computed  # shown every token, chosen by none
    for handle in handles: handle.remove()


def test_dead_channels_are_at_eps():
    model = make_model("llama_gqa")
    with torch.no_grad(): model.model.layers[0].mlp.up_proj.weight[[1, 5]] = 0
    rows = covered(model, QuantizationModifier(scheme="W8A8", ignore=["lm_head"]))
    row = rows["model.layers.0.mlp.up_proj", "weight"]
    assert (row.scales, row.eps, row.zero, row.saturated) == (128, 2, 0, 0)
    assert rows["model.layers.1.mlp.up_proj", "weight"].eps == 0


def test_a_scale_that_equals_eps_by_chance_is_not_of_zeros():
    "In bfloat16 eps is 2^-7, and so is 3.5 / 448, the fp8 scale of a weight that reaches 3.5."
    from qcal_nb.analysis import coverage, findings
    model = make_model("llama_gqa", torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.weight.clamp_(-3, 3)[0, 0] = 3.5
        model.model.layers[1].mlp.up_proj.weight.zero_()
    scheme = dict(weights=dict(num_bits=8, type="float", strategy="tensor"))
    modifier = QuantizationModifier(scheme=scheme, ignore=["lm_head"])
    made = record(model, None, scheme=modifier, base_names="weight", progress=False)
    rows = covered(model, modifier)
    assert layer.weight_scale.item() == torch.finfo(torch.bfloat16).eps
    assert rows["model.layers.0.mlp.up_proj", "weight"].eps == 0
    assert rows["model.layers.1.mlp.up_proj", "weight"].eps == 1
    table = coverage(made).set_index("module").eps
    assert table["model.layers.0.mlp.up_proj"].tolist() != [1] and table.sum() == len(made.observers)
    said = [str(f) for f in findings(made) if "all values were zero" in str(f)]
    assert all("layers.0" not in line for line in said)


def test_a_saturated_scale_is_marked():
    """NVFP4 keeps its scales in fp8 below one global scale; an observer that reports too wide a range drives them to
    the top."""
    @Observer.register("much_too_wide")
    class MuchTooWide(Observer):
        def update_statistics_from_observed(self, observed):
            top = observed.abs().amax(dim=(0, -1))
            self.min_vals, self.max_vals = -top, top.max() * torch.ones_like(top)
    model = make_model("llama_gqa")
    rows = covered(model, QuantizationModifier(scheme="NVFP4A16", weight_observer="much_too_wide", ignore=["lm_head"]))
    row = rows["model.layers.0.mlp.down_proj", "weight"]
    assert row.scales == row.saturated == 64 * 8


def test_counts_of_a_skipped_batch():
    model, data = make_model("llama_gqa"), make_batches()
    with torch.no_grad(): model.model.embed_tokens.weight[5] = torch.nan
    data[1]["input_ids"][0, 3] = 5
    data = [
        dict(b, input_ids=torch.where(b["input_ids"] == 5, 6, b["input_ids"])) if i != 1 else b
        for i, b in enumerate(data)
    ]
    with pytest.raises(NonFiniteError): calibrate(model, data, QuantizationModifier(**FP8), progress=False)
    reset_quantization(model)
    modifier = QuantizationModifier(**FP8)
    calibrate(model, data, modifier, nonfinite="skip", progress=False)
    row = next(r for r in modifier.coverage if r.base_name == "input")
    assert row.skipped == 1 and row.first_nonfinite.batch == 1 and row.computed


def test_a_record_takes_experts_apart_and_leaves_them_as_they_were():
    model = make_model("mixtral")
    before, exact = fingerprint(model), outputs(model, make_batches()[0])
    found = record(model, make_batches(), progress=False)
    assert ("model.layers.0.mlp.experts.2.down_proj", "input") in found.tensors
    assert differences(before, fingerprint(model)) == [] and torch.equal(outputs(model, make_batches()[0]), exact)
