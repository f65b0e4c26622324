"""Experts on disk: taken apart, quantized, put back, and no file is left."""
import gc
import os

import accelerate
import pytest
import torch
from helpers import make_batches, make_model, offload, outputs, qparams

from qcal_nb.lifecycle import QuantizationModifier, reset_quantization
from qcal_nb.pipelines import calibrate

STATIC = dict(scheme="INT8_STATIC", ignore=["lm_head"])


def stored(folder): return sorted((f, os.path.getsize(os.path.join(folder, f))) for f in os.listdir(folder))


@pytest.mark.parametrize(
    "recipe",
    [dict(scheme="FP8", ignore=["lm_head"]), dict(scheme="FP8", ignore=["lm_head", "re:.*experts.*"])],
    ids=["apart", "fused"],
)
def test_a_mixture_on_disk_leaves_no_files_behind(recipe, tmp_path):
    model = offload(make_model("mixtral"), "disk", tmp_path)
    before, exact = stored(tmp_path), outputs(model, make_batches()[0])
    forwards = {n: m.__dict__.get("forward") for n, m in model.named_modules() if "experts" in n}
    for _ in range(2):
        calibrate(model, make_batches(), QuantizationModifier(**recipe), progress=False)
        reset_quantization(model)
        gc.collect()
    assert stored(tmp_path) == before and torch.equal(outputs(model, make_batches()[0]), exact)
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules() if "experts" in n} == forwards


def test_experts_that_accelerate_keeps_on_disk_are_quantized(tmp_path):
    model = make_model("mixtral")
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    exact = outputs(model, make_batches()[0])
    calibrate(model, make_batches(), QuantizationModifier(**STATIC), progress=False)
    assert sum(n.endswith("weight_scale") and ".experts." in n for n in qparams(model)) == 2 * 4 * 3
    reset_quantization(model)
    assert torch.equal(outputs(model, make_batches()[0]), exact) and hasattr(model.lm_head, "_hf_hook")
