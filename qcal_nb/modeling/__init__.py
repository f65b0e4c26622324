"""What models are like: attention, experts, blocks, embeddings, and weights that live elsewhere."""

from .attention import (
    attach_attention_scheme,
    attention_classes,
    attention_faults,
    attention_modules,
    eager_beneath,
    hook_attention,
    hook_kv_cache,
    states_of,
)
from .blocks import blocks_of, fused_layers
from .embeddings import check_causal, configs_of, embeddings_of, untie_embeddings
from .experts import (
    UnfusedExperts,
    all_experts,
    fused_experts,
    matches_experts,
    release,
    take_experts_apart,
    tokens_per_expert,
    unfused_experts,
)
from .offload import convert_offload, has_accelerate_hooks, hold_while_running
from .targets import Targets, check_quick
from .trial import trial_fault
from .uncalled import Uncalled, read_without_call

__all__ = [
    "Targets",
    "Uncalled",
    "UnfusedExperts",
    "all_experts",
    "attach_attention_scheme",
    "attention_classes",
    "attention_faults",
    "attention_modules",
    "blocks_of",
    "check_causal",
    "check_quick",
    "configs_of",
    "convert_offload",
    "eager_beneath",
    "embeddings_of",
    "fused_experts",
    "fused_layers",
    "has_accelerate_hooks",
    "hold_while_running",
    "hook_attention",
    "hook_kv_cache",
    "matches_experts",
    "read_without_call",
    "release",
    "states_of",
    "take_experts_apart",
    "tokens_per_expert",
    "trial_fault",
    "unfused_experts",
    "untie_embeddings",
]
