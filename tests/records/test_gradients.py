"""`record(gradients=True)`: the gradients of a plain backward pass, however split, and a model that is as before."""
import gc
import inspect
import weakref
from dataclasses import replace
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from operator import or_

import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model, offload
from torch.nn import Linear
from transformers import BertConfig, BertModel

from qcal_nb.lifecycle import LifecycleError, QuantizationModifier
from qcal_nb.models import load_tiny_llama
from qcal_nb.pipelines import as_batch, backward_context, calibrate, calibration_context, feed
from qcal_nb.pipelines.gradient_pass import backward, labelled
from qcal_nb.records import CalibrationRecord, gradient_collector, record, record_equal, unequal_parts
from qcal_nb.records.calibration_record import FORMAT, to_tree
from qcal_nb.records.files import write_tree
from qcal_nb.records.gradient_collector import GradientCollector, expected_bytes, free_bytes
from qcal_nb.stats import PARTS, ROWS, uniform_at
from qcal_nb.taps import watch_gradients
from tests.records.samples import QUIET

NAMES = ["llama_gqa", "llama_tied", "qwen3", "gemma2", "opt", "phi", "gpt_neox", "mixtral"]


def linears(model): return {name: m for name, m in model.named_modules() if type(m) is Linear and name != "lm_head"}


def seen_gradients(model, value):
    "Input and gradients by module, inside a context that has gradients."
    seen = {}
    with ExitStack() as watching:
        for name, module in linears(model).items():
            def see(x, g, h, name=name): seen[name] = x.detach(), g, h
            watching.enter_context(watch_gradients(module, see))
        feed(model, value, lambda output: backward(output.logits, value, 0))
    return seen


@contextmanager
def plain_context(model):
    "Gradients with nothing recomputed; the embedding's output asks for them."
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda m, args, y: y.requires_grad_())
    with calibration_context(model, head=True), torch.enable_grad(): yield
    handle.remove()


def gradients_of_the_loss(model, batch):
    "Gradients at the outputs of all Linears from a loss of labels that are drawn here, position by position."
    found, hooks = {}, []
    with plain_context(model):
        for name, module in linears(model).items():
            def listen(module, args, y, name=name): y.register_hook(partial(found.__setitem__, name))
            hooks.append(module.register_forward_hook(listen))
        logits = model(**batch).logits
        running = logits.detach()[:, :-1].float().softmax(-1).double().cumsum(-1)
        labels = [[int((running[row, at] < float(uniform_at(0, 0, row, at)[0]) * running[row, at, -1]).sum())
                   for at in range(running.shape[1])] for row in range(running.shape[0])]
        scores = logits[:, :-1].float().log_softmax(-1).gather(-1, torch.tensor(labels)[..., None])
        (-scores.sum()).backward()
    for hook in hooks: hook.remove()
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixtral"])
def test_block_by_block_is_a_plain_backward_pass(name):
    batch = make_batches(1)[0]
    model, twin = make_model(name), make_model(name)
    with backward_context(model): seen = seen_gradients(model, as_batch(batch))
    with plain_context(twin): expected = seen_gradients(twin, as_batch(batch))
    assert seen.keys() == expected.keys() == linears(model).keys()
    for key, values in seen.items():
        assert all(map(torch.equal, values, expected[key])), key
    by_loss = gradients_of_the_loss(make_model(name), batch)
    for key, (_, g, _) in seen.items():
        torch.testing.assert_close(g, by_loss[key].reshape(g.shape), rtol=1e-3, atol=1e-5 * float(g.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_as_before_and_observers_saw_the_same(name):
    model, data = make_model(name), make_batches(5)
    next(model.parameters()).requires_grad_(False)
    before = fingerprint(model)
    asking = [p.requires_grad for p in model.parameters()]
    plain = record(model, data, observers=["minmax", "percentile"], **QUIET)
    made = record(model, data, observers=["minmax", "percentile"], gradients=True, **QUIET)
    assert record_equal(plain, replace(made, gradients={}, labels=(0,) * PARTS))
    assert differences(before, fingerprint(model)) == []
    assert asking == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    assert made.gradients and made.labels == (30,) * PARTS


@pytest.mark.parametrize("name", ["llama_gqa", "mixtral"])
def test_any_split_in_any_order_is_the_same(name):
    model, data = make_model(name), make_batches(7)
    whole = record(model, data, gradients=True, **QUIET)
    for order in ([[0, 1, 2, 3, 4, 5, 6]], [[6], [4, 5], [0, 1, 2, 3]], [[2], [0], [1], [3, 6], [5, 4]]):
        parts = [record(model, [data[i] for i in some], gradients=True, batch_indices=some, **QUIET) for some in order]
        assert unequal_parts(reduce(or_, parts), whole) == []


def test_shared_inputs_share_a_histogram_and_samples_are_small():
    made = record(make_model("llama_gqa"), make_batches(6), gradients=True, **QUIET)
    q, k, o = (made.gradients[f"model.layers.0.self_attn.{n}_proj"] for n in "qko")
    assert q.histogram is k.histogram and q.histogram is not o.histogram
    assert all(len(sample.keys) == ROWS + 1 for sample in q.samples)
    assert q.rows().shape == (PARTS * ROWS, 64)


def test_a_record_with_gradients_comes_back_from_its_file(tmp_path):
    made = record(make_model("llama_gqa"), make_batches(5), gradients=True, **QUIET)
    again = CalibrationRecord.load(made.save(tmp_path/"with"))
    assert record_equal(made, again) and again.labels == made.labels and "with gradients" in repr(again)
    q, k = (again.gradients[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    assert q.histogram is k.histogram
    small = made.without_gradients()
    assert small.save(tmp_path/"small").stat().st_size < (tmp_path/"with").stat().st_size / 4 and not small.gradients


def test_a_file_of_the_first_version_still_loads(tmp_path):
    made = record(make_model("llama_gqa"), make_batches(1), **QUIET)
    tree = to_tree(made)
    del tree["gradients"]
    write_tree(tmp_path/"old", tree, FORMAT, 1, {})
    assert record_equal(CalibrationRecord.load(tmp_path/"old"), made)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gets_no_label_and_changes_no_gradient_of_the_text(side):
    ids = torch.randint(0, 128, (1, 12), generator=torch.Generator().manual_seed(3))
    pad = torch.zeros(1, 4, dtype=torch.int64)
    both = [pad, ids] if side == "left" else [ids, pad]
    mask = torch.cat([torch.full_like(part, part is ids) for part in both], 1)
    padded = dict(input_ids=torch.cat(both, 1), attention_mask=mask)
    assert int(labelled(as_batch(padded)).sum()) == 11
    model = make_model("opt")
    made = record(model, [padded] * 5, gradients=True, mask=lambda batch: batch["attention_mask"].bool(), **QUIET)
    assert made.labels == (11,) * PARTS
    places = torch.cat([sample.places for g in made.gradients.values() for sample in g.samples])[:, 2]
    text = mask[0].bool()
    assert text[places].float().mean() > 0.9, "padding carries no gradient"


def test_masked_tokens_get_no_label():
    data = make_batches(5)
    made = record(make_model("llama_gqa"), data, gradients=True, mask=[int(data[0]["input_ids"][0, 3])], **QUIET)
    assert made.labels[0] < 30 and sum(made.labels) == sum(
        int((batch["input_ids"][:, :-1] != data[0]["input_ids"][0, 3]).sum()) for batch in data)


def test_a_label_depends_on_its_place_alone():
    model, data = make_model("llama_gqa"), make_batches(3)
    seen = []
    for some in ([0, 1, 2], [2], [1, 2]):
        collector = GradientCollector(linears(model))
        with backward_context(model), collector.attached():
            for i in some:
                feed(model, as_batch(data[i], i), collector.then)
                found, _ = collector.take()
                if i == 2: seen.append(found["model.layers.1.mlp.down_proj"].output)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_an_interrupt_keeps_the_finished_batches():
    model, data = make_model("llama_gqa"), make_batches(6)
    before = fingerprint(model)
    expected = record(model, data[:2], gradients=True, **QUIET)
    calls = iter(range(100))
    def stop(*_):
        if next(calls) == 2 * 2 + 1: raise KeyboardInterrupt
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(stop)
    made = record(model, data, gradients=True, **QUIET)
    handle.remove()
    assert made.batches == 2 and unequal_parts(made, expected) == [] and differences(before, fingerprint(model)) == []


def test_bf16_is_close_to_float32():
    data = make_batches(5)
    exact = record(make_model("llama_gqa"), data, gradients=True, **QUIET)
    short = record(make_model("llama_gqa", torch.bfloat16), data, gradients=True, **QUIET)
    for name, g in exact.gradients.items():
        assert short.gradients[name].total.sum().item() == pytest.approx(g.total.sum().item(), rel=0.2), name


def test_what_has_no_gradients_is_refused_before_anything_runs():
    data = make_batches(5)
    bert = BertModel(BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=32))
    with pytest.raises(TypeError, match="must be a causal language model"): record(bert, data, gradients=True, **QUIET)
    model = make_model("llama_gqa")
    with pytest.raises(TypeError, match="gradients='yes' must be True or False"):
        record(model, data, gradients="yes", **QUIET)
    calibrate(model, None, QuantizationModifier(scheme="FP8_DYNAMIC", ignore=["lm_head"]), progress=False)
    with pytest.raises(LifecycleError, match="gradients=True needs the unquantized model"):
        record(model, data, gradients=True, **QUIET)
    away = offload(make_model("llama_gqa"), "cpu")
    before = fingerprint(away)
    with pytest.raises(ValueError, match="this model is offloaded"): record(away, data, gradients=True, **QUIET)
    assert differences(before, fingerprint(away)) == []


def test_what_memory_does_not_hold_is_refused_before_it_runs(monkeypatch):
    model, data = make_model("llama_gqa"), make_batches(5)
    monkeypatch.setattr(gradient_collector, "free_bytes", lambda device: 1_000_000)
    before, runs = fingerprint(model), []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match=r"of 2 x 16 tokens takes about \d MB beside the model, and 1 MB are free"):
        record(model, data, gradients=True, **QUIET)
    handle.remove()
    assert not runs and differences(before, fingerprint(model)) == []
    assert record(model, data, **QUIET).batches == 5


def test_longer_batches_take_more_memory():
    model = make_model("llama_gqa")
    def bytes_of(rows, length):
        batch = as_batch(dict(input_ids=torch.zeros(rows, length, dtype=torch.int64)), 0)
        return expected_bytes(model, linears(model), batch)
    with backward_context(model):
        eager = [bytes_of(*shape) for shape in ((1, 8), (2, 8), (1, 16), (1, 4096))]
    assert eager[1] - eager[0] < eager[2] - eager[0] and eager[3] > 4096 * 4096 * 4
    with backward_context(model, attention="model"): assert bytes_of(1, 4096) < eager[3] / 4
    assert 10**6 < free_bytes(torch.device("cpu")) < 10**13


def test_gradients_are_part_of_the_signature():
    assert inspect.signature(record).parameters["gradients"].default is False


def test_the_embedded_model_on_texts():
    model, tokenizer = load_tiny_llama()
    made = record(model, ["A list is mutable, and a tuple is not."] * 5, tokenizer=tokenizer, gradients=True, **QUIET)
    assert len(made.gradients) == 28 and min(made.labels) == max(made.labels) > 5


def test_a_pass_keeps_nothing_of_what_it_computed():
    "No cycle of references holds the tensors of a block until the garbage collector comes by."
    model, value, seen = make_model("llama_gqa"), as_batch(make_batches(1)[0]), []
    gc.collect()
    gc.disable()
    try:
        with backward_context(model), ExitStack() as watching:
            for module in linears(model).values():
                watching.enter_context(watch_gradients(module, lambda *all: seen.extend(map(weakref.ref, all))))
            feed(model, value, lambda output: backward(output.logits, value, 0))
        assert len(seen) == 3 * 14 and [one for one in seen if one() is not None] == []
    finally:
        gc.enable()
