"""compare_schemes: each row is what calibrating and measuring by hand would say, and files are as large as it says."""
import math

import pandas as pd
import pytest
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from helpers import differences, fingerprint, make_model
from safetensors import safe_open

from qcal_nb.evaluate.divergence import eval_batches, logits_of, name_of
from qcal_nb.evaluate import compare_schemes, sensitivity
from qcal_nb.lifecycle import reset_quantization
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts, evaluating, heldout_texts, load_tiny_llama, perplexity
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import save_quantized
from qcal_nb.evaluate.schemes import SCHEME_COLUMNS, stored_bytes
from tests.evaluate.samples import QUIET, W4, W4A4, Counting, current_logits, direct


def test_a_row_is_what_calibrate_and_perplexity_say():
    model, tokenizer = load_tiny_llama()
    texts, held = calibration_texts()[:2], [t[:300] for t in heldout_texts()[:3]]
    table = compare_schemes(model, texts, ["FP8"], eval_data=held, tokenizer=tokenizer, **QUIET)
    assert list(table.columns) == SCHEME_COLUMNS and table.scheme.tolist() == ["original", "FP8"]
    assert math.isclose(table.perplexity[0], perplexity(model, tokenizer, held), rel_tol=1e-5)
    batch = eval_batches(held, tokenizer, batch_size=3)[0]
    with evaluating(model): original = logits_of(model, batch)
    calibrate(model, texts, QuantizationModifier(scheme="FP8", ignore=["lm_head"]), tokenizer=tokenizer, **QUIET)
    assert math.isclose(table.perplexity[1], perplexity(model, tokenizer, held), rel_tol=1e-5)
    assert (table.perplexity_before == table.perplexity[0]).all()
    n, loss, kl, same = direct(current_logits(model, batch), original, batch)
    assert math.isclose(table.loss[1], loss, rel_tol=1e-4) and math.isclose(table.kl[1], kl, rel_tol=0.02)
    assert abs(table.top1[1] - same) < 2.5 / n


def test_padded_batches_give_the_figures_of_single_texts():
    model, tokenizer = load_tiny_llama()
    held = [t[:200 + 150 * i] for i, t in enumerate(heldout_texts()[:3])]
    one, three = (
        compare_schemes(model, None, W4, eval_data=held, tokenizer=tokenizer, batch_size=n, **QUIET) for n in (1, 3)
    )
    for column in ("loss", "kl"): assert (one[column] - three[column]).abs().max() < 1e-4
    assert one.worst[1] == three.worst[1] and math.isclose(one.worst_sqnr_db[1], three.worst_sqnr_db[1], abs_tol=1e-6)


def test_worst_is_the_worst_of_explicit_qdq(llama, data, evals):
    table = compare_schemes(
        llama, data, QuantizationModifier(scheme=W4A4, ignore=["lm_head"]), eval_data=evals, **QUIET
    )
    modifier = QuantizationModifier(scheme=W4A4, ignore=["lm_head"])
    seen = {}
    def see(name): return lambda _, args: seen.setdefault(name, []).append(args[0])
    hooks = [m.register_forward_pre_hook(see(n)) for n, m in llama.named_modules() if n.endswith("_proj")]
    with evaluating(llama):
        for batch in evals: logits_of(llama, batch)
    for hook in hooks: hook.remove()
    calibrate(llama, data, modifier, **QUIET)
    db = {}
    for name, values in seen.items():
        module = llama.get_submodule(name)
        for base, part, tensors in (("input", "input_activations", values), ("weight", "weights", [module.weight])):
            quantized = [forward_quantize(module, x, base, getattr(module.quantization_scheme, part)) for x in tensors]
            signal = sum(x.double().square().sum().item() for x in tensors)
            noise = sum((q.double() - x.double()).square().sum().item() for x, q in zip(tensors, quantized))
            db[f"{name}.{base}"] = 10 * math.log10(signal / noise)
    worst = min(db, key=db.get)
    assert table.worst[1] == worst and math.isclose(table.worst_sqnr_db[1], db[worst], rel_tol=1e-9)


@pytest.mark.filterwarnings("ignore")  # of what such checkpoints cannot do elsewhere
@pytest.mark.parametrize("name, scheme", [
    ("llama_tied", "W8A8"), ("llama_gqa", "FP8"), ("llama_tied", "NVFP4A16"), ("mixtral", "FP8_DYNAMIC"),
    ("llama_gqa", W4)
])
def test_weight_bytes_are_those_of_the_file(name, scheme, data, tmp_path):
    model = make_model(name)
    modifier = QuantizationModifier(scheme=scheme, ignore=["lm_head", "re:.*gate$"])
    table = compare_schemes(model, data, {"it": modifier}, eval_data=data, **QUIET)
    size = table.weight_bytes
    weights = sum(p.numel() for p in model.parameters())    # experts are views of what they were before
    assert table.bits_per_weight.tolist() == pytest.approx([32, 8 * size[1] / weights])
    calibrate(model, data, modifier, **QUIET)
    save_quantized(model, tmp_path/"quantized")
    reset_quantization(model).save_pretrained(tmp_path/"original")
    assert size.tolist() == [written(tmp_path/"original"), written(tmp_path/"quantized")]


def written(folder):
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as found:
            total += sum(t.numel() * t.element_size() for t in (found.get_tensor(k) for k in found.keys()))
    return total


def test_what_no_format_can_store_has_no_size(llama, data):
    odd = {"weights": dict(num_bits=4, type="float", strategy="group", group_size=8)}
    calibrate(llama, data, QuantizationModifier(scheme=odd, ignore=["lm_head"]), **QUIET)
    assert stored_bytes(llama) is None
    reset_quantization(llama)
    table = compare_schemes(
        llama, data, {"odd": QuantizationModifier(scheme=odd, ignore=["lm_head"])}, eval_data=data, **QUIET
    )
    assert table.weight_bytes.isna().tolist() == [False, True] and math.isfinite(table.loss[1])


def test_labels_of_iterables_are_told_apart(llama, data):
    schemes = (s for s in ["W8A8", QuantizationModifier(scheme="W8A8", ignore=["lm_head", "re:.*mlp.*"]), W4])
    table = compare_schemes(llama, None, schemes, eval_data=data, **QUIET)
    assert table.scheme.tolist() == ["original", "W8A8", "W8A8 (2)", name_of(W4)] and table.kl[2] != table.kl[1]


def test_data_that_can_be_read_once_is_enough_for_all(llama, data, evals):
    once = compare_schemes(llama, iter(data), ["FP8", "INT8_STATIC"], eval_data=iter(evals), **QUIET)
    assert once.equals(compare_schemes(llama, data, ["FP8", "INT8_STATIC"], eval_data=evals, **QUIET))


def test_evaluation_texts_may_be_cut_at_another_length(llama, data, evals):
    def cut(batches, length): return [{k: v[:, :length] for k, v in batch.items()} for batch in batches]
    for call in (compare_schemes, sensitivity):
        said = call(llama, data, "FP8", eval_data=evals, max_length=5, eval_max_length=7, **QUIET)
        pd.testing.assert_frame_equal(said, call(llama, cut(data, 5), "FP8", eval_data=cut(evals, 7), **QUIET))
        with pytest.raises(ValueError, match="eval_max_length=0 must be None or an int of at least 1"):
            call(llama, data, "FP8", eval_data=evals, eval_max_length=0, **QUIET)


def test_an_error_names_the_scheme(llama, data):
    Counting(llama, 3, RuntimeError)
    with pytest.raises(RuntimeError) as error:
        compare_schemes(llama, data, {"mine": "FP8"}, eval_data=data[:1], **QUIET)
    assert "at 'mine'" in error.value.__notes__[-1]


def test_tick_comes_after_each_batch_and_can_end_the_comparison(llama, data, evals, capsys):
    beats, before = [], fingerprint(llama)
    whole = compare_schemes(llama, data, ["FP8", "W8A8"], eval_data=evals, tick=lambda: beats.append(1), **QUIET)
    assert len(beats) == 3 * len(evals) and "text" not in whole

    def tick():
        beats.append(1)
        if len(beats) == 2 * len(evals) + 1: raise KeyboardInterrupt
    beats.clear()
    table = compare_schemes(llama, data, ["FP8", "W8A8"], eval_data=evals, tick=tick, **QUIET)
    assert table.equals(whole.iloc[:2]) and differences(before, fingerprint(llama)) == []
    assert capsys.readouterr().out == ""
