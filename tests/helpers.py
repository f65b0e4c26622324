"""What several tests need: models made from configs, and an independent look at everything that calibration could leave
behind."""
import os

import torch
from compressed_tensors.offload import offload_module
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)

SMALL = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
WIDE = SMALL | dict(intermediate_size=128)
CONFIGS = dict(
    llama_gqa=lambda: LlamaConfig(**WIDE, num_key_value_heads=2),
    llama_tied=lambda: LlamaConfig(**WIDE, num_key_value_heads=4, tie_word_embeddings=True),
    qwen3=lambda: Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=16),
    gemma2=lambda: Gemma2Config(**WIDE, num_key_value_heads=2, head_dim=16, sliding_window=32),
    opt=lambda: OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64),
    phi=lambda: PhiConfig(**WIDE),
    gpt_neox=lambda: GPTNeoXConfig(**WIDE),
    mixtral=lambda: MixtralConfig(**WIDE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    gpt2=lambda: GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    bert=lambda: BertConfig(**WIDE),
)


# Four bits and the whole range: a scheme that other observers improve on, beyond what a histogram cannot tell
FOUR_BITS = {part: dict(num_bits=4, type="int", symmetric=True, strategy="tensor", observer=observer)
             for part, observer in (("weights", "memoryless_minmax"), ("input_activations", "static_minmax"))}


def make_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    "A small model with random weights of a well-known architecture; the same weights for the same seed."
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    model = BertModel(config) if name == "bert" else AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()


def make_batches(
    n: int = 3, vocab: int = 128, shape: tuple[int, int] = (2, 16), seed: int = 1
) -> list[dict[str, torch.Tensor]]:
    "Random token ids with their mask, as a data set gives them."
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, vocab, shape, generator=generator) for _ in range(n)]
    return [dict(input_ids=i, attention_mask=torch.ones_like(i)) for i in ids]


def offload(model: torch.nn.Module, kind: str, folder=None) -> torch.nn.Module:
    "Offload every module with parameters or buffers of its own to `cpu` or `disk`."
    kwargs = {}
    if kind == "disk":
        os.makedirs(folder, exist_ok=True)
        kwargs["offload_dir"] = str(folder)
    for module in model.modules():
        if module._parameters or module._buffers: offload_module(module, "cpu", kind, **kwargs)
    return model


def qparams(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    "Every scale and zero point of a model, copied."
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(("_scale", "_zero_point"))
    }


def _shown(value):
    "A value as it is if it is plain, else its identity."
    return value if isinstance(value, (bool, int, float, str, type(None), torch.dtype)) else id(value)


def fingerprint(model: torch.nn.Module) -> dict:
    """All that stands in a model's modules and configs: identities of objects, plain values, the bits of parameters and
    buffers."""
    state = {}
    for name, module in model.named_modules():
        state[name] = {
            k: {i: _shown(v) for i, v in value.items()} if isinstance(value, dict) else _shown(value)
            for k, value in vars(module).items()
        }
        config = getattr(module, "config", None)
        if config is not None: state[name, "config"] = {k: repr(v) for k, v in vars(config).items()}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return state | {
        ("bits", name): (id(t), hash(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()))
        for name, t in tensors
    }


def differences(a: dict, b: dict) -> list[str]:
    "Where two fingerprints differ, in words."
    found = [f"only before: {k}" for k in a.keys() - b.keys()] + [f"only after: {k}" for k in b.keys() - a.keys()]
    for key in a.keys() & b.keys():
        if a[key] == b[key]: continue
        if not isinstance(a[key], dict): found.append(f"{key}: {a[key]} -> {b[key]}")
        else:
            both = [(k, a[key].get(k, "none"), b[key].get(k, "none")) for k in a[key].keys() | b[key].keys()]
            found += [f"{key}.{k}: {old} -> {new}" for k, old, new in both if old != new]
    return found


@torch.no_grad()
def outputs(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    "What the model computes: logits, or the last hidden state of an encoder."
    result = model(**batch)
    return result.logits if "logits" in result else result.last_hidden_state
