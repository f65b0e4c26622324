"""Small mixtures of experts of every kind, with random weights that are not small."""
import pytest
import torch
from helpers import SMALL, make_batches, outputs
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Lfm2MoeConfig,
    Llama4TextConfig,
    MiniMaxConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from qcal_nb.modeling import unfused_experts

HEADS = SMALL | dict(num_key_value_heads=2, head_dim=16, pad_token_id=0)
MLA = SMALL | dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
)
DEEPSEEK = dict(
    intermediate_size=96, moe_intermediate_size=48, n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=3,
    first_k_dense_replace=0, n_group=1, topk_group=1
)
LLAMA4 = dict(intermediate_size=96, intermediate_size_mlp=96, num_local_experts=6, num_experts_per_tok=1)
CONFIGS = dict(
    mixtral=lambda: MixtralConfig(**HEADS, intermediate_size=96, num_local_experts=6, num_experts_per_tok=3),
    qwen2_moe=lambda: Qwen2MoeConfig(
        **SMALL, num_key_value_heads=2, moe_intermediate_size=48, shared_expert_intermediate_size=32, num_experts=6,
        num_experts_per_tok=3
    ),
    qwen3_moe=lambda: Qwen3MoeConfig(**HEADS, moe_intermediate_size=48, num_experts=6, num_experts_per_tok=3),
    olmoe=lambda: OlmoeConfig(
        **SMALL, num_key_value_heads=2, intermediate_size=48, num_experts=6, num_experts_per_tok=3
    ),
    deepseek_v3=lambda: DeepseekV3Config(**MLA, **DEEPSEEK),
    glm4_moe=lambda: Glm4MoeConfig(**HEADS, **DEEPSEEK),
    gpt_oss=lambda: GptOssConfig(**HEADS, intermediate_size=48, num_local_experts=6, num_experts_per_tok=3),
    granitemoe=lambda: GraniteMoeConfig(
        **SMALL, num_key_value_heads=2, intermediate_size=48, num_local_experts=6, num_experts_per_tok=3
    ),
    phimoe=lambda: PhimoeConfig(**SMALL, num_key_value_heads=2, intermediate_size=48, num_local_experts=6),
    lfm2_moe=lambda: Lfm2MoeConfig(
        **SMALL, num_key_value_heads=2, intermediate_size=96, moe_intermediate_size=48, num_experts=6,
        num_experts_per_tok=3, num_dense_layers=0, layer_types=["conv", "full_attention"]
    ),
    minimax=lambda: MiniMaxConfig(**HEADS, intermediate_size=48, num_local_experts=6, num_experts_per_tok=3),
    nemotron_h=lambda: NemotronHConfig(
        **HEADS | dict(num_hidden_layers=None), layers_block_type=["attention", "moe"], n_routed_experts=6,
        num_experts_per_tok=3, moe_intermediate_size=48, moe_shared_expert_intermediate_size=32, n_group=1, topk_group=1
    ),
    llama4=lambda: Llama4TextConfig(**HEADS, **LLAMA4),
)
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
EVERY = pytest.mark.parametrize("name", CONFIGS)
BOTH = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@torch.no_grad()
def make(name, dtype=torch.float32, implementation=None):
    "A small model whose parameters are all random and not small, biases too."
    config = CONFIGS[name]()
    if implementation: config._experts_implementation = implementation
    return randomize(AutoModelForCausalLM.from_config(config)).to(dtype).eval()


@torch.no_grad()
def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters(): p.copy_(0.15 * torch.randn(p.shape, generator=generator))
    return model


def logits(model): return [outputs(model, batch) for batch in make_batches(2)]


def same(a, b): return all(torch.equal(x, y) and not x.isnan().any() for x, y in zip(a, b, strict=True))


def memory(*modules):
    "Bytes behind parameters and buffers, shared memory counted once."
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def linears(model):
    "The Linears of a model's experts, by (container, expert, projection)."
    return {(name, e, part): linear for name, group in unfused_experts(model).items() for e, expert in enumerate(group)
            for part, linear in expert.named_children()}
