"""Scales that were equal to the reference's, bit for bit, when they were stored: what the engine is held to where the
reference is not installed.

    python tests/stored_scales.py      # store them anew; stops if one differs from the reference's
"""
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationScheme
from helpers import make_batches, make_model, qparams
from safetensors.torch import save_file

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import calibrate
from qcal_nb.schemes import preset

FILE = Path(__file__).parent/"data"/"scales.safetensors"
INT4 = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
FP8 = dict(num_bits=8, type="float", symmetric=True, strategy="tensor", dynamic=False)
RECIPES = {
    "FP8": dict(scheme="FP8"),
    "INT8_STATIC": dict(config_groups={"group_0": preset("INT8_STATIC")}),
    "NVFP4": dict(scheme="NVFP4"),
    "mse": dict(scheme="FP8", observer={"weights": "mse", "input": "mse"}),
    "group mse": dict(config_groups={"group_0": QuantizationScheme(
        targets=["Linear"], weights=INT4 | dict(observer="memoryless_mse", symmetric=False))}),
    "expanded mse": dict(scheme="NVFP4A16", weight_observer="nvfp4_expanded_mse"),
    "imatrix": dict(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=INT4 | dict(observer="imatrix_mse"))}
    ),
    "KV cache": dict(targets=[], kv_cache_scheme=FP8 | dict(strategy="attn_head")),
}
MODELS = ("llama_gqa", "mixtral", "phi", "bert")


def cases():
    "(model, recipe) pairs; a KV cache only where there is one."
    return [(model, recipe) for model in MODELS for recipe in RECIPES if (model, recipe) != ("bert", "KV cache")]


def scales_of(model: str, recipe: str) -> dict[str, torch.Tensor]:
    "The scales that the engine finds now."
    network = make_model(model)
    calibrate(network, make_batches(), QuantizationModifier(**RECIPES[recipe], ignore=["lm_head"]), progress=False)
    return {name: value for name, value in qparams(network).items() if name.endswith("scale")}


def main() -> None:
    import sys
    sys.path.insert(0, str(FILE.parent.parent/"parity"))
    from harness import one_thread, reference, unequal
    stored = {}
    with one_thread():
        for model, recipe in cases():
            mine, network = scales_of(model, recipe), make_model(model)
            network.config.dtype = torch.float32
            theirs = reference(network, make_batches(), **RECIPES[recipe], ignore=["lm_head"])
            theirs = {name: value for name, value in theirs.items() if name.endswith("scale")}
            if found := unequal(theirs, mine): raise SystemExit(f"{model}, {recipe}: not the reference's: {found}")
            stored |= {f"{model}/{recipe}/{name}": value for name, value in mine.items()}
    save_file(stored, FILE)
    print(f"{len(stored)} tensors, {sum(v.numel() for v in stored.values())} scales, {FILE.stat().st_size} bytes")


if __name__ == "__main__": main()
