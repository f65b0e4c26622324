"""Mixtures of experts: scales and zero points are those of `oneshot`, which takes experts apart and shows them every
token, as we do."""
import pytest
import torch
from harness import reference, unequal
from helpers import make_batches, qparams

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import calibrate
from tests.modeling.mixtures import make

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scheme", ["FP8", "W8A8", "NVFP4"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "nemotron_h"])
def test_scales_of_experts(name, scheme, dtype, tokenizer):
    ours = make(name, dtype)
    theirs = make(name, dtype)
    data = make_batches()
    recipe = dict(scheme=scheme, ignore=["lm_head"])
    theirs.config.dtype = dtype  # the reference makes its Linears in the config's dtype
    calibrate(ours, data, QuantizationModifier(**recipe), progress=False)
    right = reference(theirs, data, tokenizer, **recipe)
    assert sum(".experts." in key for key in right) >= 12 and unequal(right, qparams(ours)) == []


def test_scales_depend_on_who_sees_what(tokenizer):
    "An expert that sees only its own tokens has other input scales: the comparison above can fail."
    ours = make("mixtral")
    theirs = make("mixtral")
    data = make_batches()
    recipe = dict(scheme="FP8", ignore=["lm_head"])
    theirs.config.dtype = torch.float32
    calibrate(ours, data, QuantizationModifier(**recipe), all_experts=False, progress=False)
    found = unequal(reference(theirs, data, tokenizer, **recipe), qparams(ours))
    assert len([name for name in found if ".experts." in name and name.endswith("input_scale")]) > 10
    assert not any(name.endswith("weight_scale") for name in found)
