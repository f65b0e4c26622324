"""The context that calibration runs in, the forms of data, and who is heard."""
import threading

import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model, qparams
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from qcal_nb.calibration import ModelBusyError, exclusive, observers_in
from qcal_nb.observers import unobserved
from qcal_nb.lifecycle import QuantizationModifier, State, phase_of, reset_quantization
from qcal_nb.pipelines import batches, calibrate, calibration_context
from qcal_nb.records import record

FP8 = dict(scheme="FP8", ignore=["lm_head"])


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2", "bert", "gpt2", "mixtral"])
@pytest.mark.parametrize("attention", ["eager", "model"])
def test_the_context_puts_everything_back_also_after_an_error(name, attention):
    model = make_model(name).train()
    next(iter(model.children())).eval()
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), calibration_context(model, attention), calibration_context(model, "eager"):
        assert not any(m.training for m in model.modules()) and model.config._attn_implementation == "eager"
        model.train()
        raise ZeroDivisionError
    assert differences(before, fingerprint(model)) == []


def test_two_contexts_on_models_that_share_a_config_may_end_in_any_order():
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    a, b = LlamaForCausalLM(config), LlamaForCausalLM(config)
    before = dict(vars(config))
    first, second = calibration_context(a), calibration_context(b)
    first.__enter__(), second.__enter__(), first.__exit__(None, None, None)
    assert config._attn_implementation == "eager" and config.use_cache is False
    second.__exit__(None, None, None)
    assert vars(config) == before


def test_an_attention_that_does_not_exist_is_refused_for_any_model():
    with pytest.raises(ValueError, match="attention='flash'"), calibration_context(torch.nn.Linear(2, 2), "flash"): pass


def test_no_gradients_reach_the_statistics():
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.randn(2, 8, requires_grad=True)
    calibrate(model, [x], QuantizationModifier(scheme="FP8"), progress=False)
    assert not model[0].input_scale.requires_grad and x.grad is None


def test_forward_passes_of_a_data_generator_are_not_heard():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    def generated():
        for batch in make_batches(3):
            with torch.no_grad(): model(batch["input_ids"] * 0)
            yield batch
    calibrate(model, generated(), modifier, progress=False)
    assert {r.observations for r in modifier.coverage if r.base_name == "input"} == {3}
    reset_quantization(model)
    alone = record(model, make_batches(3), progress=False)
    assert record(model, generated(), progress=False).tensors == alone.tensors


def test_record_is_not_heard_by_observers_of_a_bare_start():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    modifier.initialize_quantization(model)
    modifier.start_calibration(model)
    record(model, make_batches(), progress=False)
    observer = model.model.layers[0].mlp.up_proj.input_observer
    assert observer.counts.observations == 0
    with torch.no_grad(): model(**make_batches()[0])
    assert observer.counts.observations == 1


def test_what_runs_unobserved_is_heard_by_nobody_and_changes_no_scale():
    cache = dict(num_bits=8, type="float", symmetric=True, strategy="tensor")
    model, plain, data = make_model("llama_gqa"), make_model("llama_gqa"), make_batches(3)
    for found, fed in ((model, data), (plain, data[:1])):
        modifier = QuantizationModifier(**FP8, kv_cache_scheme=cache)
        modifier.initialize_quantization(found)
        modifier.start_calibration(found)
        for i, batch in enumerate(fed):
            if i:
                with unobserved(), torch.no_grad(): model(**batch)
            else:
                with torch.no_grad(): found(**batch)
        assert {o.counts.observations for o in observers_in(found) if o.base_name != "weight"} == {1}
        modifier.on_end(State(found))
    assert all(torch.equal(scale, qparams(plain)[name]) for name, scale in qparams(model).items())


def test_a_held_model_can_be_neither_reset_nor_initialized_from_elsewhere():
    model, errors = make_model("llama_gqa"), []
    def meddle():
        for action in (reset_quantization, QuantizationModifier(**FP8).initialize_quantization):
            try: action(model)
            except ModelBusyError as error: errors.append(str(error))
    with exclusive(model, "the test"):
        thread = threading.Thread(target=meddle)
        thread.start()
        thread.join()
    assert len(errors) == 2 and all("the test is at work on it" in e for e in errors) and phase_of(model) == "original"


def test_after_a_failed_batch_calibration_can_go_on_by_hand():
    model, data = make_model("llama_gqa"), make_batches(2)
    modifier = QuantizationModifier(**FP8)
    with pytest.raises(ValueError, match="input_ids go from 999 to 999"):
        calibrate(model, [data[0], torch.tensor([[999]])], modifier, progress=False)
    with torch.no_grad(), calibration_context(model): model(**data[1])
    from qcal_nb.lifecycle import State
    modifier.on_end(State(model))
    whole = make_model("llama_gqa")
    calibrate(whole, data, QuantizationModifier(**FP8), progress=False)
    assert all(torch.equal(v, qparams(whole)[k]) for k, v in qparams(model).items())


def test_models_of_several_parts_and_decoders_that_want_labels():
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        text_config=tower | dict(vocab_size=64), vision_config=tower | dict(image_size=16, patch_size=8),
        projection_dim=16
    )
    clip = CLIPModel(config).eval()
    pair = dict(input_ids=torch.randint(3, 60, (2, 8)), pixel_values=torch.randn(2, 3, 16, 16))
    calibrate(clip, [pair], QuantizationModifier(scheme="FP8"), max_length=4, progress=False)
    assert phase_of(clip) == "calibrated"
    config = T5Config(vocab_size=128, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, decoder_start_token_id=0)
    t5 = T5ForConditionalGeneration(config).eval()
    data = [batch | dict(labels=batch["input_ids"]) for batch in make_batches()]
    calibrate(t5, data, QuantizationModifier(**FP8), progress=False)
    assert phase_of(t5) == "calibrated"


def test_a_batch_that_the_model_cannot_take_says_what_it_needs():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

        def forward(self, left, right): return self.layer(left + right)
    with pytest.raises(ValueError, match=r"the batch has \['left'\], but the forward of Two also needs \['right'\]"):
        calibrate(Two(), [{"left": torch.ones(2, 8)}], QuantizationModifier(scheme="FP8"), progress=False)


def test_inference_tensors():
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        x = torch.randn(2, 8)
        assert len(record(model, [x], progress=False)) == 2
        calibrate(model, [x], QuantizationModifier(scheme="FP8"), progress=False)
    assert phase_of(model) == "calibrated"


def test_max_length_leaves_images_and_wide_masks_alone():
    batch = dict(
        input_ids=torch.ones(2, 8, dtype=torch.long), attention_mask=torch.ones(2, 8, dtype=torch.long),
        pixel_values=torch.ones(2, 8)
    )
    cut = next(batches([batch], max_length=4))
    assert cut["input_ids"].shape == cut["attention_mask"].shape == (2, 4) and cut["pixel_values"].shape == (2, 8)


def test_texts_in_the_forms_in_which_they_usually_come():
    from qcal_nb.models import load_tiny_llama
    _, tokenizer = load_tiny_llama()
    texts = ["One text.", "Another one.", "A third."]
    expected = [b["input_ids"].tolist() for b in batches(texts, tokenizer)]
    ids = [torch.tensor(tokenizer(t).input_ids) for t in texts]
    forms = [
        torch.utils.data.DataLoader(texts, batch_size=2), [{"text": texts}], [{"text": t} for t in texts],
        [i.numpy() for i in ids], iter(texts)
    ]
    for form in forms: assert [b["input_ids"].tolist() for b in batches(form, tokenizer)] == expected
    same = torch.utils.data.TensorDataset(torch.stack([ids[0], ids[0]]))
    assert [
        b["input_ids"].tolist() for b in batches(torch.utils.data.DataLoader(same, batch_size=2))
    ] == [[expected[0][0]] * 2]
