"""What one calibration hands on: tokens are counted anew, the head sees what quantized blocks return."""
import torch
from helpers import make_batches, make_model, qparams

from qcal_nb.lifecycle import QuantizationModifier, unfuse_experts
from qcal_nb.pipelines import calibrate

STATIC = dict(scheme="INT8_STATIC", ignore=["lm_head"])


def test_tokens_of_experts_are_counted_anew_for_each_calibration():
    model, found = make_model("mixtral"), []
    unfuse_experts(model)
    for _ in range(2):
        modifier = QuantizationModifier(**STATIC)
        calibrate(model, make_batches(), modifier, progress=False)
        found.append([r.expert_tokens for r in modifier.coverage])
    assert found[0] == found[1]


def test_the_head_sees_what_quantized_blocks_return():
    "Handed on quantized, the last block's output differs from the float one, and so does the head's input scale."
    found = []
    for propagate in ("float", "quantized"):
        model = make_model("llama_gqa")
        calibrate(
            model,
            make_batches(),
            QuantizationModifier(scheme=dict(
                weights=dict(num_bits=4, strategy="channel"),
                input_activations=dict(num_bits=8, strategy="tensor", observer="static_minmax"),
            )),
            pipeline="sequential",
            propagate=propagate,
            progress=False,
        )
        found.append(qparams(model)["lm_head.input_scale"])
    seen = []
    model.lm_head.register_forward_pre_hook(lambda m, a: seen.append(a[0].abs().max()))
    with torch.no_grad():
        for batch in make_batches(): model(**batch)
    assert found[0] != found[1]
    torch.testing.assert_close(found[1], torch.stack(seen).max().reshape(1) / 127.5, rtol=1e-5, atol=0)
