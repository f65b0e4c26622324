"""`qcal-nb plan`: the recipe for so many bytes, as a program gives it, and a checkpoint of that size."""
import json

import pandas as pd
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qcal_nb import CalibrationRecord, load_tiny_llama
from qcal_nb.cli import main
from qcal_nb.models import calibration_texts
from qcal_nb.recipes import from_yaml
from tests.cli.test_cli import run


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    tokenizer = load_tiny_llama()[1]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256
    )
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder/"model")
    tokenizer.save_pretrained(folder/"model")
    (folder/"texts.jsonl").write_text("".join(json.dumps(dict(text=t[:300])) + "\n" for t in calibration_texts()[:6]))
    return folder


def test_a_plan_becomes_a_checkpoint_of_that_size(own, tmp_path):
    words = [own/"model", "--data", own/"texts.jsonl", "--max-length", 64]
    done = run("plan", *words, "--budget", "0.8MB", "--keep", "re:.*layers.0.*o_proj", "--out", "plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path/"plan"
    assert sorted(p.name for p in folder.iterdir()) == ["frontier.png", "plan.csv", "recipe.yaml", "record.safetensors"]
    table, recipe = pd.read_csv(folder/"plan.csv"), from_yaml(folder/"recipe.yaml")
    groups = {m for names in table[table.scheme != "unquantized"].modules for m in names.split()}
    targets = {t for group in recipe.resolved_config.config_groups.values() for t in group.targets}
    assert len(targets) == len(groups) and not any("layers\\.0\\.self_attn\\.o_proj" in t for t in targets)
    record = CalibrationRecord.load(folder/"record.safetensors")
    assert record.gradients and not record.has_text
    size = int(done.stdout.split(" bytes")[0].replace(",", ""))
    assert size <= 800_000 and "calibrate with it: qcal-nb calibrate MODEL --recipe plan/recipe.yaml" in done.stdout
    made = run("calibrate", *words, "--recipe", folder/"recipe.yaml", "--out", "run", "--checkpoint", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    stored = (tmp_path/"run"/"checkpoint"/"model.safetensors").stat().st_size
    assert size <= stored < size + 30_000      # the header of the file


@pytest.mark.parametrize("more, said", [
    (["--budget", "1MB"], "the smallest mixture of"),
    (["--budget", "3MB", "--keep", "nonsense"], "keep: 'nonsense' matches none of the 28 recorded modules"),
])
def test_what_was_recorded_is_kept_if_nothing_follows_from_it(more, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "tiny", *more, "--out", "x", "--max-length", "16", "--quiet"]) == 1
    words = capsys.readouterr().err
    assert said in words and "What was recorded is in x/record.safetensors" in words
    assert [path.name for path in (tmp_path/"x").iterdir()] == ["record.safetensors"]
    assert CalibrationRecord.load(tmp_path/"x"/"record.safetensors").gradients


@pytest.mark.parametrize("words, code, said", [
    (["tiny", "--budget", "lots", "--out", "x"], 2, "'lots' must be a size such as 120MB"),
    (["tiny", "--budget", "1MB", "--out", "x", "--limit", "3"], 1, "a forecast needs at least 5 texts"),
    (["no/such/model", "--data", __file__, "--budget", "1MB", "--out", "x"], 1, "no/such/model"),
])
def test_what_is_wrong_is_said_and_leaves_nothing(words, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try: found = main(["plan", *words])
    except SystemExit as end: found = end.code
    assert found == code and said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
