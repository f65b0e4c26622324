"""Forms of data that people have: chats, what a tokenizer returned, data sets; and what is no data."""
import copy
import json

import pytest
import torch
from helpers import differences, fingerprint, make_model

from qcal_nb.lifecycle import QuantizationModifier, phase_of, reset_quantization
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.pipelines import batches, calibrate
from qcal_nb.records import record

CHAT = [dict(role="user", content="What is a scale?"), dict(role="assistant", content="A step.")]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    "One that writes a token for the beginning, and has a chat template that writes it, too."
    from tokenizers.processors import TemplateProcessing
    _, tokenizer = load_tiny_llama()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.eos_token
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids(data, tokenizer=None, **options):
    return [b["input_ids"][0].tolist() for b in batches(data, tokenizer, **options)]


def test_a_text_that_a_chat_template_wrote_begins_once(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text.startswith(tokenizer.bos_token) and tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    [found] = ids([text], tokenizer)
    assert found == tokenizer(text.removeprefix(tokenizer.bos_token))["input_ids"]
    assert found[0] == tokenizer.bos_token_id != found[1]
    [cut] = ids([text], tokenizer, max_length=7)
    assert cut == found[:7]
    two = tokenizer.bos_token * 2 + "x"  # somebody who writes two of them gets the second
    assert ids([two], tokenizer)[0][:3] == [tokenizer.bos_token_id] * 2 + ids(["x"], tokenizer)[0][1:2]


def test_conversations_are_data_in_every_form(tokenizer):
    wanted = ids([tokenizer.apply_chat_template(CHAT, tokenize=False)], tokenizer)
    for data in (CHAT, [CHAT], [dict(messages=CHAT)], (tuple(CHAT),)):
        assert ids(data, tokenizer) == wanted
    _, plain = load_tiny_llama()
    with pytest.raises(ValueError, match="messages .role and content., which need a tokenizer with a chat template"):
        ids([CHAT], plain)


def test_what_a_tokenizer_returned_is_data(tokenizer):
    texts = calibration_texts()[:3]
    together = tokenizer(texts)
    assert ids(together) == [row for row in together["input_ids"]] == ids(texts, tokenizer)
    assert ids(dict(together)) == ids(together)
    padded = tokenizer(texts, padding=True, return_tensors="pt") if tokenizer.pad_token else None
    if padded is not None:
        [only] = batches(padded)
        assert only["input_ids"].shape[0] == 3


def test_a_data_set_with_one_split_is_that_split_and_one_with_several_is_asked_about(tokenizer):
    texts = calibration_texts()[:2]
    assert ids(dict(train=texts), tokenizer) == ids(texts, tokenizer)
    said = r"data is a dict with 'train', 'test'; pass one of these, such as data\['train'"
    with pytest.raises(TypeError, match=said):
        ids(dict(train=texts, test=texts), tokenizer)
    with pytest.raises(TypeError, match="data is a dict with"): ids({}, tokenizer)


def test_the_name_of_a_file_is_no_text(tmp_path, tokenizer):
    (tmp_path/"mine").write_text("x")
    for name in ("texts.jsonl", "no/such.txt", "a.parquet", str(tmp_path/"mine")):
        for data in (name, [name], ["a text", name], [dict(text=name)]):
            with pytest.raises(ValueError, match="the name of a file and no text; pass the texts themselves"):
                ids(data, tokenizer)
    assert ids(["see texts.jsonl", "a.b"], tokenizer)


def test_a_batch_without_rows_is_refused_and_the_model_is_as_it_was():
    model = make_model("llama_gqa")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"a batch without values, a tensor of shape \(0, 8\)"):
        calibrate(model, [torch.zeros(0, 8, dtype=torch.long)], QuantizationModifier(scheme="FP8"), progress=False)
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2", "bert"])
def test_ids_that_are_none_of_the_models_are_refused_and_the_model_is_as_it_was(name):
    model = make_model(name)
    known = model.get_input_embeddings().num_embeddings
    before = fingerprint(model)
    for bad, why in ((torch.tensor([[1, known]]), f"input_ids go from 1 to {known}, but this"),
                     (torch.tensor([[-1, 2]]), "input_ids go from -1 to 2"),
                     (torch.tensor([[0.5, 1.0]]), "input_ids are torch.float32, token ids must be whole numbers")):
        for run, recipe in ((record, None), (calibrate, QuantizationModifier(scheme="FP8"))):
            with pytest.raises(ValueError, match=why) as error:
                run(model, [dict(input_ids=bad)], recipe, progress=False) if recipe else run(
                    model, [dict(input_ids=bad)], progress=False)
            assert "while feeding batch 0" in "".join(error.value.__notes__)
            if phase_of(model) != "original": reset_quantization(model)  # which the error of calibrate says
    assert differences(before, fingerprint(model)) == []


def test_ids_that_a_model_replaces_by_itself_are_its_own_business():
    "Models that see put the image where a token stands that has no embedding."
    model = make_model("llama_gqa")
    def replace(module, args, kwargs): return args, kwargs | dict(input_ids=kwargs["input_ids"].clamp(max=127))
    model.register_forward_pre_hook(replace, with_kwargs=True)
    made = record(model, [torch.tensor([[1, 999]])], progress=False)
    assert made.batches == 1 and made.tokens == 2


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_line_of_jsonl_ends_at_its_line_feed(tmp_path, sign):
    from qcal_nb.cli.inputs import read_texts
    texts = [f"one{sign}more", "two"]
    path = tmp_path/"texts.jsonl"
    for mark in ("", "\ufeff"):
        for end in ("\n", "\r\n"):
            lines = end.join(json.dumps(dict(text=text), ensure_ascii=sign < " ") for text in texts)
            path.write_bytes((mark + lines + end).encode())
            assert read_texts(path) == texts


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_a_byte_order_mark_is_no_text(tmp_path, kind):
    from qcal_nb.cli.inputs import read_texts
    path = tmp_path/f"texts.{kind}"
    path.write_bytes(("\ufeff" + ("one\n\ntwo" if kind == "txt" else '["one", "two"]')).encode())
    assert read_texts(path) == ["one", "two"]
