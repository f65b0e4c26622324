"""The largest values stand where they are said to stand, with the token that made them."""
import math
import random

import torch
from helpers import make_batches, make_model
from torch.nn import Linear, Module

from qcal_nb.models import calibration_texts, inject_outliers, load_tiny_llama
from qcal_nb.stats import current_batch
from qcal_nb.records import record, record_equal
from tests.records.samples import QUIET, merged


def test_the_largest_values_stand_where_they_are_said_to_stand(tiny):
    "Every input of the embedded model, outliers injected, against brute force; and the token is that of the place."
    model, tokenizer = load_tiny_llama()
    channels = inject_outliers(model)["model.layers.1.input_layernorm"]
    texts, caught = calibration_texts()[:6], {}
    def catch(n): return lambda _, args: caught.setdefault(n, {}).setdefault(current_batch.get(), args[0].detach())
    handles = [
        m.register_forward_pre_hook(catch(n))
        for n, m in model.named_modules() if isinstance(m, Linear) and n != "lm_head"
    ]
    run = record(model, texts, tokenizer=tokenizer, max_length=96, base_names="input", **QUIET)
    for h in handles: h.remove()
    ids = [tokenizer(t, truncation=True, max_length=96).input_ids for t in texts]
    for n, seen in caught.items():
        flat = [(-abs(v), i, place // x.shape[-1], place % x.shape[-1])
                for i, x in seen.items() for v, place in zip(*(t.tolist() for t in x.flatten().abs().topk(8)))]
        top = run[n, "input"].top
        assert [(-abs(e.value), e.batch, e.position[1], e.channel) for e in top] == sorted(flat)[:8], n
        for e in top:
            assert e.value == seen[e.batch][e.position][e.channel].item() and e.position[0] == 0
            assert e.token == tokenizer.decode([ids[e.batch][e.position[1]]]) and e.token in e.context
            assert e.context == tokenizer.decode(ids[e.batch][max(0, e.position[1] - 8):e.position[1] + 9])
    assert {e.channel for e in run["model.layers.1.self_attn.q_proj", "input"].top} <= set(channels)
    assert run.has_text and "holds pieces of the calibration text" in repr(run)


def test_tokens_of_parts_are_tokens_of_the_whole(tiny):
    model, tokenizer = tiny
    texts = calibration_texts()[:6]
    options = dict(tokenizer=tokenizer, max_length=48, base_names="input", batch_size=2, **QUIET)
    whole = record(model, texts, **options)
    parts = [record(model, texts[i:i + 2], batch_indices=[i // 2], **options) for i in (4, 0, 2)]
    assert record_equal(merged(parts, random.Random(0)), whole)
    assert all(e.token is not None for s in whole.tensors.values() for e in s.top)
    assert all(
        e.token is None and e.context is None
        for s in record(model, texts, keep_text=False, **options).tensors.values() for e in s.top
    )


def test_a_batch_that_was_skipped_does_not_keep_others_from_being_told(tiny):
    "Its values are larger than all that come later, but they are not in the record."
    class Embedded(Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc = torch.nn.Embedding(128, 16), Linear(16, 16)
        def forward(self, input_ids): return self.fc(self.embed(input_ids))
    model, bad = Embedded(), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad(): model.embed.weight[1, 0], model.embed.weight[2:5] = math.nan, 1e3
    data = [bad, torch.arange(10, 40)[None], torch.arange(40, 100)[None]]
    run = record(model, data, tokenizer=tiny[1], nonfinite="skip", base_names="input", **QUIET)
    stats = run["fc", "input"]
    assert stats.skipped == 1 and stats.max < 10 and len(stats.top) == 8
    assert all(e.token == tiny[1].decode([int(data[e.batch][e.position])]) for e in stats.top)


def test_flattened_tokens_are_told_and_other_rows_are_not(tiny):
    "OPT's MLP sees (batch * seq, hidden); a pooler's rows are no tokens."
    model, data = make_model("opt"), make_batches(1)
    run = record(model, data, tokenizer=tiny[1], base_names="input", **QUIET)
    for e in run["model.decoder.layers.0.fc1", "input"].top:
        assert e.token == tiny[1].decode([int(data[0]["input_ids"][e.position])])
    run = record(make_model("bert"), data, tokenizer=tiny[1], base_names="input", **QUIET)
    assert all(e.token is None for e in run["pooler.dense", "input"].top)
    assert all(e.token for e in run["encoder.layer.0.attention.self.query", "input"].top)
