"""Models beside the matrix whose scales the reference gets wrong: by its sequential pipeline (a mask or a part that is
lost), or by both (keys and values of RecurrentGemma)."""
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import transformers as T
from harness import FP8, INT8, linears

WIDE = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
GROUPED = WIDE | dict(num_key_value_heads=2)
EYE = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
EARS = dict(
    vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16,
    max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)
ROPE = dict(type="mrope", rope_type="default", mrope_section=[2, 3, 3], rope_theta=10000.0)
INPUTS = linears(inputs=INT8 | dict(strategy="tensor", observer="static_minmax"))
INPUTS |= dict(ignore=["lm_head", "re:.*proj_out"])
CACHE = dict(kv_cache_scheme=FP8 | dict(strategy="tensor", dynamic=False))


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(5, 120, (2, 16), generator=torch.Generator().manual_seed(seed))


def text(seed: int) -> dict: return dict(input_ids=tokens(seed), attention_mask=torch.ones_like(tokens(seed)))


def sound(seed: int) -> dict: return dict(input_features=random(2, 8, 32, seed=seed), decoder_input_ids=tokens(seed))


def beside_images(count: int, *pixels: int) -> Callable[[int], dict]:
    "Token ids after the ids of `count` parts of an image."
    def batch(seed: int) -> dict:
        ids = torch.cat([torch.ones(2, count, dtype=torch.long), tokens(seed)], 1)
        return dict(input_ids=ids, pixel_values=random(*pixels, seed=seed))
    return batch


def qwen_batch(seed: int) -> dict:
    ids = torch.cat([torch.tensor([[3, 1]]), tokens(seed)[:1]], 1)
    return dict(input_ids=ids, pixel_values=random(4, 3 * 2 * 14 * 14, seed=seed),
                image_grid_thw=torch.tensor([[1, 2, 2]]), mm_token_type_ids=(ids == 1).long())


def llava() -> torch.nn.Module:
    return T.LlavaForConditionalGeneration(T.LlavaConfig(
        text_config=T.LlamaConfig(**GROUPED), vision_config=T.CLIPVisionConfig(**EYE), image_token_id=1,
        vision_feature_layer=-1, image_seq_length=4))


def idefics() -> torch.nn.Module:
    return T.Idefics3ForConditionalGeneration(T.Idefics3Config(
        text_config=T.LlamaConfig(**GROUPED, pad_token_id=0), vision_config=dict(EYE), scale_factor=2,
        image_token_id=1, pad_token_id=0))


def qwen() -> torch.nn.Module:
    vision = dict(depth=1, embed_dim=32, num_heads=2, mlp_ratio=2, hidden_size=64, patch_size=14, spatial_merge_size=2,
                  temporal_patch_size=2)
    return T.Qwen2VLForConditionalGeneration(T.Qwen2VLConfig(
        text_config=GROUPED | dict(rope_parameters=ROPE), vision_config=vision, image_token_id=1, video_token_id=2,
        vision_start_token_id=3, vision_end_token_id=4))


def recurrent() -> torch.nn.Module:
    sizes = GROUPED | dict(num_hidden_layers=3, num_key_value_heads=1)
    return T.RecurrentGemmaForCausalLM(T.RecurrentGemmaConfig(**sizes, lru_width=64, attention_window_size=16))


# name: how it is built, its batches, what its sequential pipeline does
SEQUENTIAL: dict[str, tuple[Callable, Callable[[int], dict], str]] = {
    "Phi-3": (lambda: T.Phi3ForCausalLM(T.Phi3Config(**GROUPED, pad_token_id=0)), text, "no causal mask"),
    "PhiMoE": (lambda: T.PhimoeForCausalLM(T.PhimoeConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1)), text,
               "no causal mask"),
    "Starcoder2": (lambda: T.Starcoder2ForCausalLM(T.Starcoder2Config(**GROUPED)), text, "no causal mask"),
    "Whisper": (lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**EARS)), sound, "encoder left out"),
    "Llava": (llava, beside_images(4, 2, 3, 28, 28), "vision tower left out"),
    "Idefics3": (idefics, beside_images(1, 2, 1, 3, 28, 28), "vision tower left out"),
    "Qwen2-VL": (qwen, qwen_batch, "vision tower left out"),
}


def made(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    "The same model each time."
    torch.manual_seed(0)
    return build().eval()


def both_pipelines(who: Callable, name: str) -> list[dict[str, Any]]:
    "What the reference, or we, compute for one of these models, basic and sequential."
    build, batch, _ = SEQUENTIAL[name]
    return [who(made(build), [batch(1), batch(2)], pipeline=p, **deepcopy(INPUTS)) for p in ("basic", "sequential")]
