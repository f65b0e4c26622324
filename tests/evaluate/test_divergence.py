"""Loss, KL and top-1 against direct computation; switched off, a model is the original to the bit."""
import math

import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model
from torch.nn.functional import cross_entropy

from qcal_nb.evaluate import divergence
from qcal_nb.evaluate.divergence import QuantizationSwitches, divergence_of, logits_of
from qcal_nb.evaluate import compare_observers, compare_schemes, sensitivity
from qcal_nb.lifecycle import reset_quantization
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts, evaluating, heldout_texts, load_tiny_llama
from qcal_nb.pipelines import calibrate
from qcal_nb.evaluate.schemes import SCHEME_COLUMNS, evaluated
from tests.evaluate.samples import QUIET, W4, W4A4, current_logits, direct


@pytest.mark.parametrize("side", ["right", "left"])
def test_divergence_is_that_of_float64_and_padding_does_not_count(monkeypatch, side):
    monkeypatch.setattr(divergence, "POSITIONS", 7)
    g = torch.Generator().manual_seed(0)
    logits, original = (torch.randn(2, 12, 50, generator=g) for _ in "ab")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    if side == "left": mask = mask.flip(1)
    batch = dict(input_ids=torch.randint(0, 50, (2, 12), generator=g), attention_mask=mask)
    found, (n, loss, kl, same) = divergence_of(logits, batch, original), direct(logits, original, batch)
    assert found.positions == n == 7 + 11 and found.top1 == same
    assert math.isclose(found.loss, loss, rel_tol=1e-6) and math.isclose(found.kl, kl, rel_tol=1e-6)


def test_tokens_that_are_impossible_for_both_add_nothing():
    p = torch.tensor([[[0.0, 1.0, -math.inf]] * 2])
    found = divergence_of(p + torch.tensor([0.0, 1.0, 0.0]), {"input_ids": torch.tensor([[0, 1]])}, p)
    assert 0 < found.kl < 1 and math.isfinite(found.loss)


@pytest.mark.parametrize("name", ["llama_gqa", "llama_tied", "qwen3", "opt", "phi", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_switched_off_is_the_original_to_the_bit(name, scheme, evals):
    model = make_model(name)
    group = {"weights": dict(num_bits=4, strategy="group", group_size=32)} if scheme == "W4A16" else scheme
    with evaluating(model): before = [logits_of(model, b) for b in evals]
    calibrate(model, make_batches(1), QuantizationModifier(scheme=group, ignore=["lm_head"]), **QUIET)
    board = QuantizationSwitches(model)
    with evaluating(model):
        with board.only(): assert all(torch.equal(logits_of(model, b), x) for b, x in zip(evals, before))
        assert not torch.equal(logits_of(model, evals[0]), before[0])


def test_keys_and_values_are_switched_off_too(llama, evals):
    with evaluating(llama): before = logits_of(llama, evals[0])
    cache = dict(num_bits=8, type="float", strategy="tensor", symmetric=True)
    modifier = QuantizationModifier(kv_cache_scheme=cache, targets=[], scheme=None, config_groups=None)
    calibrate(llama, make_batches(2), modifier, **QUIET)
    board = QuantizationSwitches(llama)
    assert len(board.modules) == 2
    with evaluating(llama), board.only(): assert torch.equal(logits_of(llama, evals[0]), before)
    _, after, damage = evaluated(llama, evals)
    assert after.kl > 0 and set(damage.powers) == {f"model.layers.{i}.self_attn.{s}" for i in (0, 1) for s in "kv"}


def test_what_was_left_out_for_lack_of_a_scale_stays_off():
    model = make_model("mixtral")
    modifier = QuantizationModifier(scheme=W4A4, ignore=["lm_head"], on_uncalibrated="skip")
    calibrate(model, make_batches(1, shape=(1, 2)), modifier, all_experts=False, **QUIET)
    skipped = [
        n for n, m in model.named_modules()
        if getattr(m, "input_scale", None) is not None and m.input_scale.isnan().any()
    ]
    board = QuantizationSwitches(model)
    assert skipped and not set(skipped) & set(board.modules)
    with board.only(): pass
    with evaluating(model): assert logits_of(model, make_batches(1)[0]).isfinite().all()


def test_masked_tokens_do_not_count():
    model, tokenizer = load_tiny_llama()
    texts = [t[:n] for t, n in zip(calibration_texts()[:2], (120, 300))]
    options = dict(tokenizer=tokenizer, base_names=["input"], **QUIET)
    padded = compare_observers(model, texts, batch_size=2, mask=lambda b: b["attention_mask"].bool(), **options)
    single = compare_observers(model, texts, **options)
    assert (padded.sqnr_db - single.sqnr_db).abs().max() < 1e-3 and (padded.clipped == single.clipped).all()


def test_models_that_predict_no_next_token(data):
    for model in (make_model("bert"), make_model("llama_gqa").model, torch.nn.Linear(2, 2)):
        before = fingerprint(model)
        for call in (
            lambda m: compare_schemes(m, data, ["FP8"], eval_data=data),
            lambda m: sensitivity(m, data, "FP8", eval_data=data),
        ):
            with pytest.raises(TypeError, match="must be a causal language model"): call(model)
        assert differences(before, fingerprint(model)) == []
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        compare_schemes("x", data, ["FP8"], eval_data=data)


def test_the_loss_of_one_batch_is_cross_entropy(llama, data):
    table = compare_schemes(llama, None, W4, eval_data=data, **QUIET)
    def summed(batch):
        logits = current_logits(llama, batch)[:, :-1].flatten(0, 1)
        return cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum").item()
    total = sum(map(summed, data))
    assert math.isclose(table.loss[0], total / (2 * 2 * 15), rel_tol=1e-6)


def test_an_encoder_with_a_head_predicts_no_next_token():
    from transformers import BertConfig, BertForMaskedLM
    model = BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    ).eval()
    with pytest.raises(TypeError, match="must be a causal language model .* got BertForMaskedLM"):
        compare_schemes(model, make_batches(1, 64), ["FP8"], eval_data=make_batches(1, 64))


def test_a_line_of_text_is_what_greedy_generation_of_the_quantized_model_gives():
    model, tokenizer = load_tiny_llama()
    prompt, texts, evals = "The function returns", calibration_texts()[:2], [text[:300] for text in heldout_texts()[:2]]
    table = compare_schemes(
        model, texts, ["FP8", "W4A16"], eval_data=evals, tokenizer=tokenizer, prompt=prompt, **QUIET
    )
    assert list(table.columns) == [*SCHEME_COLUMNS, "text"]
    ids = tokenizer(prompt, return_tensors="pt")
    for label, text in zip(table.scheme, table.text):
        if label != "original":
            calibrate(
                model, texts, QuantizationModifier(scheme=label, ignore=["lm_head"]), tokenizer=tokenizer, **QUIET
            )
        # with a cache last bits differ, and with them a rounding now and then
        greedy = dict(max_new_tokens=24, do_sample=False, use_cache=False)
        out = model.generate(**ids, **greedy, pad_token_id=tokenizer.eos_token_id)[0, ids.input_ids.shape[1]:]
        assert text == tokenizer.decode(out, skip_special_tokens=True)
        reset_quantization(model)


def test_text_needs_a_tokenizer_and_a_token_and_leaves_the_model_as_it_was(data, evals):
    model, tokenizer = load_tiny_llama()
    model.train()
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    before, settings = fingerprint(model), model.generation_config.to_dict()
    # longer than the model can read
    compare_schemes(model, None, "W8A16", eval_data=evals, tokenizer=tokenizer, prompt="x" * 4000, **QUIET)
    assert model.training and model.generation_config.to_dict() == settings
    assert differences(before, fingerprint(model)) == []

    def silent(text): return dict(input_ids=[])  # a tokenizer that adds no token of its own
    options = dict(eval_data=evals, **QUIET)
    with pytest.raises(ValueError, match="pass the model's tokenizer"):
        compare_schemes(model, None, "W8A16", prompt="a", **options)
    with pytest.raises(ValueError, match="holds no token"):
        compare_schemes(model, None, "W8A16", tokenizer=silent, prompt="", **options)
    with pytest.raises(TypeError, match="prompt must be a str"):
        compare_schemes(model, None, "W8A16", tokenizer=tokenizer, prompt=3, **options)
