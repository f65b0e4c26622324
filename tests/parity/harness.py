"""The parity harness: small models of many architectures, many recipes, and both engines run on them in this process.

`measure(architecture, configuration, pipeline)` calibrates the same model twice, once by llm-compressor's own `oneshot`
and once by us, and compares every scale, zero point and global scale bit for bit. Tests and the parity page both use
it.
"""
import contextlib
import functools
import os
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch.nn import Module
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    ViTConfig,
    ViTModel,
)

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import load_tiny_llama
from qcal_nb.pipelines import calibrate
from qcal_nb.schemes import preset

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SIZE = dict(vocab_size=128, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
WIDE = SIZE | dict(intermediate_size=256)
MOE = WIDE | dict(num_key_value_heads=2, num_experts_per_tok=2)


def causal(config: Any) -> Module: return AutoModelForCausalLM.from_config(config)


ARCHITECTURES: dict[str, tuple[Callable[[], Module], torch.dtype]] = {
    "Llama, grouped queries": (lambda: causal(LlamaConfig(**WIDE, num_key_value_heads=2)), torch.float32),
    "Llama, tied, bf16": (
        lambda: causal(LlamaConfig(**WIDE, num_key_value_heads=4, tie_word_embeddings=True)), torch.bfloat16
    ),
    "Mistral": (lambda: causal(MistralConfig(**WIDE, num_key_value_heads=2, sliding_window=8)), torch.float32),
    "Qwen2, bf16": (lambda: causal(Qwen2Config(**WIDE, num_key_value_heads=2)), torch.bfloat16),
    "Qwen3": (lambda: causal(Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=32)), torch.float32),
    "Gemma 3": (lambda: causal(Gemma3TextConfig(**WIDE, num_key_value_heads=2, head_dim=32, sliding_window=8,
                                                layer_types=["sliding_attention", "full_attention"])), torch.float32),
    "Mixtral": (lambda: causal(MixtralConfig(**MOE, num_local_experts=4)), torch.float32),
    "Qwen3-MoE, bf16": (
        lambda: causal(Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=128, head_dim=32)), torch.bfloat16
    ),
    "DeepSeek-V3": (
        lambda: causal(DeepseekV3Config(
            **MOE | dict(num_key_value_heads=4), moe_intermediate_size=128, n_routed_experts=4, n_group=1, topk_group=1,
            q_lora_rank=128, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32,
            first_k_dense_replace=1
        )),
        torch.float32,
    ),
    "GPT-NeoX": (lambda: causal(GPTNeoXConfig(**WIDE)), torch.float32),
    "OPT": (lambda: causal(OPTConfig(**SIZE, ffn_dim=256, word_embed_proj_dim=128)), torch.float32),
    "Phi": (lambda: causal(PhiConfig(**WIDE)), torch.float32),
    "Falcon": (
        lambda: causal(FalconConfig(vocab_size=128, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)),
        torch.float32,
    ),
    "BLOOM": (lambda: causal(BloomConfig(vocab_size=128, hidden_size=128, n_layer=2, n_head=4)), torch.float32),
    "BERT": (lambda: BertModel(BertConfig(**WIDE)), torch.float32),
    "ViT": (
        lambda: ViTModel(ViTConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=32,
            patch_size=8
        )),
        torch.float32,
    ),
}
NO_CACHE = {"GPT-NeoX", "Falcon", "BLOOM", "BERT", "ViT"}  # nothing that compressed-tensors could hook
NO_HEADS_IN_CONFIG = {"OPT"}  # the reference asks for num_key_value_heads
# The reference's sequential pipeline traces the model. Where its code keeps the function that makes the causal mask in
# a variable, the tracer calls it with a config rebuilt from its dictionary, which lacks the attention implementation,
# so that transformers makes no mask. Its own basic pipeline knows better; ours is compared with that. `test_known.py`
# shows it.
MASK_LOST = {"Mistral", "Mixtral", "Qwen3-MoE, bf16"}
# Heads that share one cached latent have no scales of their own; we say so, the reference writes a checkpoint that
# cannot run.
ONE_LATENT = {("DeepSeek-V3", "KV cache by head, static_minmax")}

INT8 = dict(num_bits=8, type="int", symmetric=True)
INT4 = dict(num_bits=4, type="int", symmetric=True)
FP8 = dict(num_bits=8, type="float", symmetric=True)


def linears(weights: dict | None = None, inputs: dict | None = None) -> dict[str, Any]:
    "A recipe for all Linears."
    return dict(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)}
    )


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "W8A8": dict(scheme="W8A8"),
    "FP8": dict(scheme="FP8"),
    "FP8_DYNAMIC": dict(scheme="FP8_DYNAMIC"),
    "FP8_BLOCK": dict(scheme="FP8_BLOCK"),
    "W4A16": dict(scheme="W4A16"),
    "W4A16_ASYM": dict(scheme="W4A16_ASYM"),
    "W4AFP8": dict(scheme="W4AFP8"),
    "NVFP4": dict(scheme="NVFP4"),
    "NVFP4A16": dict(scheme="NVFP4A16"),
    "MXFP4": dict(scheme="MXFP4"),
    "INT8_STATIC": dict(config_groups={"group_0": preset("INT8_STATIC")}),
    "W4 g32 mse": linears(INT4 | dict(strategy="group", group_size=32, observer="memoryless_mse")),
    "W8 tensor asym mse, A static_minmax asym": linears(
        INT8 | dict(strategy="tensor", symmetric=False, observer="memoryless_mse"),
        INT8 | dict(strategy="tensor", symmetric=False, observer="static_minmax")),
    "FP8 mse": dict(scheme="FP8", observer={"weights": "mse", "input": "mse"}),
    "A mse, averaging_constant 0.3, grid 50": linears(
        INT8 | dict(strategy="channel"),
        INT8 | dict(
            strategy="tensor",
            observer="mse",
            observer_kwargs=dict(averaging_constant=0.3, grid=50.0, maxshrink=0.5, norm=2.0),
        ),
    ),
    "W4 channel mse, patience 0": linears(
        INT4 | dict(strategy="channel", observer="memoryless_mse", observer_kwargs=dict(patience=0))
    ),
    "FP8_BLOCK mse": dict(scheme="FP8_BLOCK", weight_observer="memoryless_mse"),
    "NVFP4 mse": dict(scheme="NVFP4", weight_observer="memoryless_mse"),
    "NVFP4A16 expanded mse": dict(scheme="NVFP4A16", weight_observer="nvfp4_expanded_mse"),
    "MXFP4 mse": dict(scheme="MXFP4", weight_observer="memoryless_mse"),
    "W4 channel imatrix": linears(INT4 | dict(strategy="channel", observer="imatrix_mse")),
    "W4 g32 asym imatrix, patience 0": linears(
        INT4 | dict(
            strategy="group", group_size=32, symmetric=False, observer="imatrix_mse", observer_kwargs=dict(patience=0)
        )
    ),
    "NVFP4 expanded imatrix": dict(scheme="NVFP4", weight_observer="nvfp4_expanded_imatrix"),
    "A minmax, averaging_constant 0.5": linears(
        INT8 | dict(strategy="tensor"),
        INT8 | dict(strategy="tensor", observer="minmax", observer_kwargs=dict(averaging_constant=0.5)),
    ),
    "FP8 and KV cache": dict(scheme="FP8", kv_cache_scheme=FP8 | dict(strategy="tensor", dynamic=False)),
    "KV cache by head, static_minmax": dict(
        targets=[], kv_cache_scheme=INT8 | dict(strategy="attn_head", dynamic=False, observer="static_minmax")
    ),
    "KV cache mse": dict(scheme="W8A8", kv_cache_scheme=FP8 | dict(strategy="tensor", dynamic=False, observer="mse")),
}
PIPELINES = ("basic", "sequential")
FAMILIES: dict[str, list[str]] = {  # configurations that go the same way through both engines
    "one scale or one a channel": ["W8A8", "FP8", "FP8_DYNAMIC", "INT8_STATIC", "A minmax, averaging_constant 0.5"],
    "groups and blocks": ["FP8_BLOCK", "W4A16", "W4A16_ASYM", "W4AFP8"],
    "four-bit floats": ["NVFP4", "NVFP4A16", "MXFP4"],
    "a search for each scale": [
        "W4 g32 mse", "W8 tensor asym mse, A static_minmax asym", "FP8 mse", "A mse, averaging_constant 0.3, grid 50",
        "W4 channel mse, patience 0", "FP8_BLOCK mse"
    ],
    "four-bit floats, searched": ["NVFP4 mse", "NVFP4A16 expanded mse", "MXFP4 mse"],
    "weighted by what is heard": ["W4 channel imatrix", "W4 g32 asym imatrix, patience 0", "NVFP4 expanded imatrix"],
    "keys and values": ["FP8 and KV cache", "KV cache by head, static_minmax", "KV cache mse"],
}


def make(architecture: str, seed: int = 0) -> Module:
    "A small model with random weights; the same for the same seed."
    build, dtype = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = build().to(dtype).eval()
    model.config.dtype = dtype  # the reference makes its Linears of experts in the config's dtype
    return model


def batches(architecture: str, n: int = 3, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    "Random token ids with their mask, or random pixels."
    generator = torch.Generator().manual_seed(seed)
    if architecture == "ViT":
        return [dict(pixel_values=torch.randn(2, 3, 32, 32, generator=generator)) for _ in range(n)]
    ids = [torch.randint(0, 128, (2, 16), generator=generator) for _ in range(n)]
    return [dict(input_ids=i, attention_mask=torch.ones_like(i)) for i in ids]


def qparams(model: Module) -> dict[str, torch.Tensor]:
    "Every scale and zero point of a model, copied."
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(("_scale", "_zero_point"))
    }


@contextlib.contextmanager
def one_thread():
    "Parity is claimed at one thread: the reference's own bf16 search depends on their number."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield
    finally: torch.set_num_threads(before)


def reference(
    model: Module, data: list, tokenizer: Any = None, pipeline: str = "basic", **recipe: Any
) -> dict[str, torch.Tensor]:
    "The scales that llm-compressor's oneshot leaves on the model."
    import llmcompressor
    from llmcompressor.modifiers.quantization import QuantizationModifier as Reference
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)  # oneshot reads the config from disk again
        model.config._name_or_path = folder
        loader = torch.utils.data.DataLoader(data, batch_size=None)
        llmcompressor.oneshot(model=model, recipe=Reference(**deepcopy(recipe)), processor=tokenizer or _tokenizer(),
                              dataset=loader, pipeline=pipeline)
    return qparams(model)


def ours(model: Module, data: list, pipeline: str = "basic", **recipe: Any) -> dict[str, torch.Tensor]:
    "The scales that we leave on the model."
    calibrate(model, data, QuantizationModifier(**recipe), pipeline=pipeline, progress=False)
    return qparams(model)


def unequal(theirs: dict[str, torch.Tensor], mine: dict[str, torch.Tensor]) -> list[str]:
    "The names of scales that differ in name, dtype or a single bit."
    if not theirs: raise ValueError("the reference computed no scale at all: nothing was compared")
    def same(a: torch.Tensor, b: torch.Tensor) -> bool: return a.dtype == b.dtype and torch.equal(a, b)
    return sorted(theirs.keys() ^ mine.keys()) + sorted(
        n for n in theirs.keys() & mine.keys() if not same(theirs[n], mine[n])
    )


@dataclass(frozen=True)
class Cell:
    "One comparison: how many scales there were, and which differ."
    architecture: str
    configuration: str
    pipeline: str
    scales: int
    differ: list[str] = field(default_factory=list)


def applies(architecture: str, configuration: str) -> bool:
    "Whether both engines can be asked at all."
    return (
        "KV" not in configuration
        or not (architecture in NO_CACHE | NO_HEADS_IN_CONFIG or (architecture, configuration) in ONE_LATENT)
    )


Case = tuple[str, str, str]  # architecture, configuration, pipeline


def whole() -> list[Case]:
    "The whole matrix: every architecture, every configuration, by both pipelines."
    return [(a, c, p) for a in ARCHITECTURES for c in CONFIGURATIONS for p in PIPELINES if applies(a, c)]


def sample() -> list[Case]:
    """A part of the matrix by design: each architecture meets each family once, its members in turn, the pipelines in
    turn.

    So both pipelines run for every architecture and for every configuration; a test counts it.
    """
    cases = []
    for turn, members in enumerate(FAMILIES.values()):
        met = dict.fromkeys(members, 0)
        for architecture in ARCHITECTURES:
            able = [c for c in members if applies(architecture, c)]
            if not able: continue
            configuration = min(able, key=met.get)
            cases.append((architecture, configuration, PIPELINES[(met[configuration] + turn) % 2]))
            met[configuration] += 1
    return cases


@functools.cache
def _tokenizer() -> Any: return load_tiny_llama()[1]


@functools.cache
def _of_reference(architecture: str, configuration: str, pipeline: str) -> dict[str, torch.Tensor]:
    "What the reference finds; kept, for where it has lost the mask both pipelines are compared with its basic one."
    recipe = CONFIGURATIONS[configuration] | dict(ignore=["lm_head"])
    return reference(make(architecture), batches(architecture), pipeline=pipeline, **recipe)


def measure(architecture: str, configuration: str, pipeline: str = "basic") -> Cell:
    "Calibrate the same model by both engines at one thread, and compare every bit."
    recipe, data = CONFIGURATIONS[configuration] | dict(ignore=["lm_head"]), batches(architecture)
    wrong = architecture in MASK_LOST
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _of_reference(architecture, configuration, "basic" if wrong else pipeline)
        mine = ours(make(architecture), data, pipeline, **deepcopy(recipe))
    return Cell(architecture, configuration, pipeline, sum(v.numel() for v in theirs.values()), unequal(theirs, mine))
