"The embedded model, its texts, and outlier injection: what would bore a reader of 00_models."
import copy
import hashlib
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import qcal_nb
from qcal_nb.models import calibration_texts, heldout_texts, inject_outliers, load_tiny_llama, perplexity

DATA = Path(qcal_nb.__file__).parent / "data"
SMALL = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=99, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=None
)
LLAMAS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama tied, biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
}
OTHERS = {
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=32)),
        "Llama-style model",
    ),
    "gemma": (lambda: GemmaForCausalLM(GemmaConfig(**SMALL)), r"weight \* x"),
    "gemma2": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)),
        "further norms post_feedforward_layernorm, pre_feedforward_layernorm",
    ),
}


@pytest.fixture(scope="module")
def tiny():
    return load_tiny_llama()


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in lzma.open(DATA / "texts.jsonl.xz", "rt", encoding="utf-8")]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


def randomized(model, seed=0):
    "Norm weights and biases away from their initial ones and zeros, so that a mistake with them shows"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1: parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model.eval()


def logits(model, ids):
    with torch.no_grad(): return model(input_ids=ids).logits


@pytest.mark.slow
def test_perplexity_on_all_heldout_texts_is_at_most_14(tiny):
    value = perplexity(*tiny, heldout_texts())
    print(f"held-out perplexity {value:.3f}")
    assert 1 < value <= 14


def test_heldout_and_training_share_no_fifty_characters(rows):
    def windows(text): return {text[i:i + 50] for i in range(len(text) - 49)}
    held = set().union(*(windows(row["text"]) for row in rows if row["split"] == "heldout"))
    assert len(held) > 100_000
    for row in rows:
        if row["split"] != "heldout": assert not windows(row["text"]) & held, row["name"]


def test_the_hash_of_the_name_decides_the_split(rows):
    for row in rows:
        bucket = int(hashlib.sha256(row["name"].encode()).hexdigest(), 16) % 20
        assert row["split"] == {0: "heldout", 1: "calibration"}.get(bucket, "train"), row["name"]
    assert len({row["name"] for row in rows}) == len(rows)


def test_texts_are_those_of_the_file_whatever_the_interpreter(rows):
    assert heldout_texts() == [row["text"] for row in rows if row["split"] == "heldout"]
    documents = [row["text"] for row in rows if row["split"] == "calibration"]
    assert all(any(passage in text for text in documents) for passage in calibration_texts())


def test_texts_cannot_be_spoilt_by_a_caller():
    heldout_texts().clear(); calibration_texts().clear()
    assert heldout_texts() and calibration_texts()


def test_calibration_passages_fit_the_positions(tiny):
    model, tokenizer = tiny
    lengths = [len(tokenizer(text)["input_ids"]) for text in calibration_texts()]
    assert 40 <= len(lengths) <= 128 and max(lengths) <= model.config.max_position_embeddings == 512


def test_package_data_is_small_and_names_its_source():
    files = [p for p in DATA.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 8_000_000
    names = {p.relative_to(DATA).as_posix() for p in files}
    assert names == {"NOTICE.md", "LICENSE-CPYTHON.txt", "texts.jsonl.xz"} | {
        f"tiny_llama/{name}"
        for name in (
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "training.csv"
        )
    }
    assert "PSF-2.0" in (DATA / "NOTICE.md").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (DATA / "LICENSE-CPYTHON.txt").read_text(encoding="utf-8")


def test_loading_is_quiet_offline_and_leaves_the_random_state_alone(capfd):
    torch.manual_seed(7); expected = torch.rand(3); torch.manual_seed(7)
    started = time.perf_counter()
    model, tokenizer = load_tiny_llama()
    seconds = time.perf_counter() - started
    assert torch.equal(torch.rand(3), expected)
    assert capfd.readouterr() == ("", "")
    assert isinstance(model, LlamaForCausalLM) and isinstance(tokenizer, PreTrainedTokenizerFast) and not model.training
    print(f"loaded in {seconds:.2f} s")


@pytest.mark.slow
def test_loading_from_another_folder_with_the_network_cut():
    code = """
import socket
def cut(*args, **kwargs): raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = cut
from qcal_nb.models import load_tiny_llama, calibration_texts, heldout_texts
model, tokenizer = load_tiny_llama()
assert sum(p.numel() for p in model.parameters()) == 2_623_744
assert calibration_texts() and heldout_texts()
"""
    env = {**os.environ, "PYTHONPATH": str(DATA.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_bar_setting_is_put_back(enabled):
    from transformers.utils import logging
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    try:
        load_tiny_llama()
        assert logging.is_progress_bar_enabled() == enabled
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype):
    model, _ = load_tiny_llama(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model, torch.tensor([[0, 5, 9]])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float32", None])
def test_wrong_dtype(dtype):
    with pytest.raises(ValueError, match="dtype must be one of .*float32"): load_tiny_llama(dtype)


def test_copies_are_independent(tiny):
    other, _ = load_tiny_llama()
    with torch.no_grad(): other.model.norm.weight.zero_()
    assert tiny[0].model.norm.weight.abs().sum() > 0


@pytest.mark.parametrize("text", [
    "", "a", "  two  spaces\n\tand a tab ", "naïve → 日本語 🙂", "def f(x): return x**2  # <s> no\r\n",
    "don 't , stop . \x00",
])
def test_tokenizer_round_trip(tiny, text):
    _, tokenizer = tiny
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *ids] and max([0, *ids]) < 1024


def test_generation_is_english_of_a_sort(tiny):
    model, tokenizer = tiny
    prompt = tokenizer("Return True if the", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=80, do_sample=False)[0], skip_special_tokens=True)
    known = {word for passage in calibration_texts() + heldout_texts() for word in passage.lower().split()}
    words = text.lower().split()
    print(text)
    assert len(words) >= 15 and sum(word in known for word in words) / len(words) > 0.6


def test_perplexity_is_the_formula(tiny):
    model, tokenizer = tiny
    texts = heldout_texts()[4:7] + [heldout_texts()[0]]
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for i in range(0, len(ids), 511):
            piece = ids[i:i + 511]
            probabilities = logits(model, torch.tensor([[0, *piece]]))[0].double().softmax(-1)
            total -= sum(probabilities[t, token].log().item() for t, token in enumerate(piece)); count += len(piece)
    assert perplexity(model, tokenizer, texts) == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    with torch.no_grad(): model.model.norm.weight.zero_()
    assert perplexity(model, tokenizer, heldout_texts()[:1]) == pytest.approx(1024, rel=1e-4)


def test_perplexity_without_a_bos_token(tiny):
    model, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    tokenizer.bos_token = None
    value = perplexity(model, tokenizer, heldout_texts()[:1])
    assert 1 < value != perplexity(*tiny, heldout_texts()[:1])
    with pytest.raises(ValueError, match="at least one token"): perplexity(model, tokenizer, ["", "e"])


def test_perplexity_says_so_when_the_model_is_broken(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    with torch.no_grad(): model.model.norm.weight[0] = float("nan")
    value = perplexity(model, tokenizer, heldout_texts()[:1])
    assert value != value


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_perplexity_refuses_a_window_that_predicts_nothing(tiny, max_length):
    with pytest.raises(ValueError, match="max_length must be"): perplexity(*tiny, ["some text"], max_length=max_length)


def test_perplexity_leaves_the_mode_and_no_hooks(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]).train(), tiny[1]
    perplexity(model, tokenizer, ["some text"])
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_perplexity_keeps_the_modes_of_single_modules(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]).train(), tiny[1]
    model.model.layers[0].eval()
    perplexity(model, tokenizer, ["some text"])
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training


@pytest.mark.parametrize("factor", [2.0, 32.0, 1024.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_leave_the_logits_to_the_bit(dtype, factor):
    model, tokenizer = load_tiny_llama(dtype)
    batches = [tokenizer(text, return_tensors="pt")["input_ids"] for text in calibration_texts()[:6]]
    before = [logits(model, ids) for ids in batches]
    inject_outliers(model, n_channels=6, factor=factor, seed=3)
    assert all(
        torch.equal(a.view(torch.uint8), logits(model, ids).view(torch.uint8))
        for a, ids in zip(before, batches, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LLAMAS)
def test_outliers_in_other_llamas(name, dtype):
    torch.manual_seed(0)
    model = randomized(LLAMAS[name]()).to(dtype)
    ids = torch.randint(99, (2, 40))
    before = logits(model, ids)
    changed = inject_outliers(model, channels=[5, 63])
    assert torch.equal(before, logits(model, ids))
    assert set(changed) == {
        f"model.layers.{i}.{norm}" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
    }


def test_absmax_grows_by_the_factor_and_nowhere_else(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    ids = tokenizer(calibration_texts()[0], return_tensors="pt")["input_ids"]

    def absmax():
        seen = {}
        hooks = [
            m.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].abs().amax(dim=(0, 1))}))
            for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
        ]
        logits(model, ids)
        for hook in hooks: hook.remove()
        return seen

    before, changed, after = absmax(), inject_outliers(model, factor=64.0), absmax()
    chosen = changed["model.layers.0.input_layernorm"]
    assert len(chosen) == 4 and all(channels == chosen for channels in changed.values())
    for name in before:
        expected = before[name].clone()
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            expected[chosen] *= 64
            assert after[name].max() > 4 * before[name].max()
        assert torch.equal(after[name], expected), name


def test_final_norm_embedding_and_head_are_left_alone(tiny):
    model = copy.deepcopy(tiny[0]); before = weights(model)
    inject_outliers(model)
    after = weights(model)
    touched = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {name.split(".", 3)[-1] for name in touched}
    assert kinds == {
        "input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"
    }
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_outliers_are_a_function_of_the_seed_and_leave_the_random_state(tiny):
    copies = [copy.deepcopy(tiny[0]) for _ in range(3)]
    torch.manual_seed(7); expected = torch.rand(3); torch.manual_seed(7)
    first, again, other = (inject_outliers(m, seed=seed) for m, seed in zip(copies, (0, 0, 1), strict=True))
    assert torch.equal(torch.rand(3), expected)
    assert first == again != other and same_bits(weights(copies[0]), weights(copies[1]))


def test_the_reciprocal_takes_it_back(tiny):
    model = copy.deepcopy(tiny[0]).train(); before = weights(model)
    changed = inject_outliers(model, n_channels=9)
    inject_outliers(model, factor=1 / 32, channels=changed["model.layers.0.input_layernorm"])
    assert same_bits(weights(model), before) and model.training


@pytest.mark.parametrize("name", OTHERS)
def test_unsupported_models_are_refused_and_unchanged(name):
    make, words = OTHERS[name]
    torch.manual_seed(0)
    model = make(); before = weights(model)
    with pytest.raises(ValueError, match=words): inject_outliers(model)
    assert same_bits(weights(model), before)


@pytest.mark.parametrize("kwargs, words", [
    (dict(factor=10), "power of two"), (dict(factor=0), "power of two"), (dict(factor=-2), "power of two"),
    (dict(factor=float("inf")), "power of two"), (dict(factor=float("nan")), "power of two"),
    (dict(factor=2.0**200), "not exact"),
    (dict(n_channels=0), "n_channels"), (dict(n_channels=257), "n_channels"), (dict(channels=[]), "channels"),
    (dict(channels=[256]), "channels"), (dict(channels=[-1]), "channels"), (dict(channels=[3, 3]), "channels"),
])
def test_wrong_arguments_are_refused_and_change_nothing(tiny, kwargs, words):
    model = copy.deepcopy(tiny[0]); before = weights(model)
    with pytest.raises(ValueError, match=words): inject_outliers(model, **kwargs)
    assert same_bits(weights(model), before)


def test_float16_is_refused_where_digits_would_be_lost():
    model, _ = load_tiny_llama(torch.float16); before = weights(model)
    with pytest.raises(ValueError, match="not exact in torch.float16"): inject_outliers(model)
    assert same_bits(weights(model), before)


def test_float16_is_refused_where_activations_could_overflow():
    model = LLAMAS["llama"]().half()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, torch.nn.Linear): m.weight.fill_(0.5)
    with pytest.raises(ValueError, match="too large for torch.float16"): inject_outliers(model, factor=2.0**13)


def test_another_reader_of_the_norm_is_noticed_and_put_back(tiny):
    "A model whose names are Llama's but whose attention also uses the norm's output as it is"
    model = copy.deepcopy(tiny[0]); before = weights(model)
    layer = model.model.layers[2]
    layer.mlp.register_forward_hook(lambda module, args, out: out + args[0])
    with pytest.raises(ValueError, match="logits .* would change"): inject_outliers(model)
    assert same_bits(weights(model), before)


def test_a_model_without_its_weights_in_memory_is_refused():
    with torch.device("meta"): model = LLAMAS["llama"]()
    with pytest.raises(ValueError, match="meta tensors"): inject_outliers(model)


def test_a_layer_without_the_expected_projections_is_refused(tiny):
    model = copy.deepcopy(tiny[0])
    del model.model.layers[1].mlp.up_proj
    before = weights(model)
    with pytest.raises(ValueError, match=r"model.layers.1 with no mlp.up_proj"): inject_outliers(model)
    assert same_bits(weights(model), before)
