"""`qcal-nb` as a program: what it writes, on one process and on two, its exit codes, and the page that it opens."""
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import free_port
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qcal_nb import CalibrationRecord, load_tiny_llama
from qcal_nb.cli import main
from qcal_nb.cli.commands import parser
from qcal_nb.models import calibration_texts
from qcal_nb.recipes import from_yaml

PROGRAM = Path(sys.executable).with_name("qcal-nb")
TORCHRUN = Path(sys.executable).with_name("torchrun")


def run(*words, program=(PROGRAM,), cwd=None, **kwargs):
    return subprocess.run(
        [*map(str, program), *map(str, words)], capture_output=True, text=True, timeout=240, cwd=cwd, **kwargs
    )


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A folder with a model of one's own, another architecture than the embedded one's, and texts."
    folder = tmp_path_factory.mktemp("own")
    tokenizer = load_tiny_llama()[1]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256
    )
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder/"model")
    tokenizer.save_pretrained(folder/"model")
    (folder/"texts.jsonl").write_text("".join(json.dumps(dict(text=t[:300])) + "\n" for t in calibration_texts()[:6]))
    (folder/"texts.txt").write_text("\n\n".join(t[:300].replace("\n\n", "\n") for t in calibration_texts()[:5]))
    return folder


def test_from_a_fresh_folder_to_a_recipe_and_a_checkpoint(own, tmp_path, monkeypatch, capsys):
    words = [
        "calibrate", own/"model", "--data", own/"texts.jsonl", "--scheme", "W4A16", "--max-length", 64, "--out", "run",
        "--checkpoint"
    ]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path/"run").iterdir()) == ["checkpoint", "recipe.yaml", "record.safetensors"]
    assert "6 batches, 384 tokens" in done.stdout and "qcal-nb lab run/record.safetensors" in done.stdout
    assert "recording" in done.stderr
    record = CalibrationRecord.load(tmp_path/"run"/"record.safetensors")
    assert record.tokens == 384 and record.model.startswith("Qwen2")
    again = AutoModelForCausalLM.from_pretrained(tmp_path/"run"/"checkpoint")
    assert type(again).__name__ == "Qwen2ForCausalLM"
    assert "quantization_config" in (tmp_path/"run"/"checkpoint"/"config.json").read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["report", "run/record.safetensors", "-o", "page.html", "--title", "Mine"]) == 0
    assert capsys.readouterr().out.strip() == "page.html"
    assert "<h1>Mine" in re.sub(r"\s+", " ", (tmp_path/"page.html").read_text())


def test_a_recipe_that_was_written_is_a_recipe_that_is_read(own, tmp_path):
    words = ["calibrate", str(own/"model"), "--data", str(own/"texts.txt"), "--max-length", "32", "--quiet"]
    recipe = ["--scheme", "INT8_STATIC", "--observer", "input=mse", "--ignore", "lm_head", "--ignore", "re:.*gate_proj"]
    assert main([*words, *recipe, "--out", str(tmp_path/"a")]) == 0
    assert main([*words, "--recipe", str(tmp_path/"a"/"recipe.yaml"), "--out", str(tmp_path/"b")]) == 0
    a, b = (CalibrationRecord.load(tmp_path/n/"record.safetensors") for n in "ab")
    assert (tmp_path/"a"/"recipe.yaml").read_text() == (tmp_path/"b"/"recipe.yaml").read_text()
    assert a.results.keys() == b.results.keys() and any(key[2] == "mse" for key in a.results)
    assert all(torch.equal(a.results[k].scale, b.results[k].scale) for k in a.results)
    assert not any("gate_proj" in name for name, _ in a.tensors)


def test_two_processes_write_what_one_does(own, tmp_path, monkeypatch):
    words = ["calibrate", own/"model", "--data", own/"texts.jsonl", "--max-length", 48, "--checkpoint"]
    words += ["--scheme", "INT8_STATIC", "--observer", "input=static_minmax"]
    two = run(*words, "--out", "two", program=(TORCHRUN, "--nproc-per-node", 2, "--no-python", PROGRAM), cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("recipe.yaml   for llm-compressor") == 1  # one of them speaks
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, words), "--out", "one"]) == 0
    a, b = (load_file(tmp_path/n/"checkpoint"/"model.safetensors") for n in ("one", "two"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(k.endswith("input_scale") for k in a)
    first = "model.layers.0.self_attn.q_proj"
    one, both = (CalibrationRecord.load(tmp_path/n/"record.safetensors") for n in ("one", "two"))
    # the record holds the recipe's scales
    assert torch.equal(both.results[first, "input", "static_minmax"].scale, b[f"{first}.input_scale"])
    assert one.batches == both.batches == 6 and all(one[k].histogram == both[k].histogram for k in one.tensors)


WRONG = {
    "no such model": (
        ["calibrate", "no/such/folder", "--data", "t.txt", "--out", "o"], "MODEL 'no/such/folder' is no folder here"
    ),
    "no such path": (
        ["calibrate", "./mine", "--data", "t.txt", "--out", "o"], "MODEL './mine': there is no such file or folder"
    ),
    "lab without a model": (["lab", "./mine", "--no-browser"], "MODEL './mine': there is no such file or folder"),
    "lab without a record": (
        ["lab", "run/record.safetensors", "--no-browser"],
        "MODEL 'run/record.safetensors': there is no such file or folder",
    ),
    "no data": (["calibrate", "some/model", "--out", "o"], "--data is needed"),
    "no such file": (
        ["calibrate", "tiny", "--data", "none.txt", "--out", "o"], "--data none.txt: No such file or directory"
    ),
    "empty file": (["calibrate", "tiny", "--data", "empty.txt", "--out", "o"], "--data empty.txt: holds no text"),
    "not JSON": (["calibrate", "tiny", "--data", "bad.jsonl", "--out", "o"], "bad.jsonl, line 1: not JSON"),
    "scheme": (["calibrate", "tiny", "--scheme", "INT5", "--out", "o"], "scheme='INT5' is not a preset"),
    "observer": (["calibrate", "tiny", "--observer", "input=best", "--out", "o"], "best"),
    "both": (["calibrate", "tiny", "--recipe", "r.yaml", "--scheme", "FP8", "--out", "o"], "--scheme and --recipe"),
    "out": (["calibrate", "tiny", "--out", "full"], "--out='full' exists and is not an empty folder"),
    "record": (["report", "t.txt"], "t.txt"),
    "notebook": (["lab", "tiny", "--notebook", "a.py"], "--notebook a.py: must end with .ipynb"),
}


@pytest.mark.parametrize("words, said", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_and_leaves_nothing(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("One.\n\nTwo.")
    Path("empty.txt").write_text(" \n\n")
    Path("bad.jsonl").write_text("{text: 1}\n")
    Path("full").mkdir()
    Path("full/file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert said in err and err.startswith("qcal-nb: ") and err.count("\n") == 1 and out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", [
    [], ["frob"], ["calibrate", "tiny"], ["calibrate", "tiny", "--out", "o", "--limit", "0"],
    ["calibrate", "tiny", "--out", "o", "--observer", "mse"]
])
def test_a_wrong_command_line_is_2(words, capsys):
    with pytest.raises(SystemExit) as end: parser().parse_args(words)
    assert end.value.code == 2 and "usage: qcal-nb" in capsys.readouterr().err


def test_an_interrupt_is_130_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    def interrupted(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr("qcal_nb.records.record", interrupted)  # where the command line looks it up
    assert main(["calibrate", "tiny", "--limit", "1", "--out", "run", "--quiet"]) == 130
    assert "interrupted" in capsys.readouterr().err and not Path("run").exists()


def test_lab_opens_its_notebook(tmp_path):
    port = free_port()
    process = subprocess.Popen(
        [PROGRAM, "lab", "tiny", "--no-browser", "--port", str(port)], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        address = next(
            found for line in process.stderr if (found := re.search(rf"http://127\.0\.0\.1:{port}/\S*", line))
        )[0]
        assert "workbench.ipynb" in address
        for _ in range(360):
            try:
                with urllib.request.urlopen(address) as page: assert page.status == 200
                break
            except OSError: time.sleep(0.5)
        else: pytest.fail("no page")
        assert "Workbench(model, texts" in (tmp_path/"workbench.ipynb").read_text()
    finally:
        process.terminate()
        process.wait(30)


def lab_notebook(monkeypatch, *words):
    "What `qcal-nb lab` would open, without opening it: the notebook's path."
    started = []
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command))
    assert main(["lab", *words, "--no-browser"]) == 0
    command, = started
    given = dict(word.split("=", 1) for word in command if "=" in word)
    return Path(given["--ServerApp.root_dir"])/given["--LabApp.default_url"].removeprefix("/lab/tree/")


def test_lab_does_not_open_the_notebook_of_another_model(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, again, other = (lab_notebook(monkeypatch, name).name for name in ("tiny", "tiny", str(own/"model")))
    assert (first, again, other) == ("workbench.ipynb", "workbench.ipynb", "workbench-2.ipynb")
    assert lab_notebook(monkeypatch, "tiny", "--scheme", "W4A16").name == "workbench-3.ipynb"
    # asked for by name: as it is
    assert lab_notebook(monkeypatch, "tiny", "--notebook", "workbench-2.ipynb").name == "workbench-2.ipynb"


def test_a_notebook_in_another_folder_finds_model_and_texts(own, tmp_path, monkeypatch):
    monkeypatch.chdir(own)
    notebook = lab_notebook(
        monkeypatch, "./model", "--data", "texts.jsonl", "--notebook", str(tmp_path/"deep"/"look.ipynb")
    )
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    monkeypatch.chdir(notebook.parent)
    space = {}
    exec("".join(cells[0]["source"]), space)
    assert type(space["model"]).__name__ == "Qwen2ForCausalLM" and len(space["texts"]) == 6


def test_a_warning_is_one_line_in_the_words_of_the_command_line(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("word " * 400)
    assert main(
        ["calibrate", str(own/"model"), "--data", "long.txt", "--max-length", "300", "--out", "run", "--quiet"]
    ) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert said, said
    assert all(line.startswith("qcal-nb: a batch of ") and line.endswith("use --max-length 256") for line in said), said


def test_a_name_that_matches_nothing_is_said_once(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "calibrate", str(own/"model"), "--data", str(own/"texts.jsonl"), "--ignore", "lm_haed", "--limit", "2", "--out"
    ]
    for out, more in (("run", ()), ("other", ("--checkpoint",))):
        assert main([*words, out, "--quiet", *more]) == 0
        assert capsys.readouterr().err.splitlines() == ["qcal-nb: ignore 'lm_haed' matches no module"]


def test_a_recipe_that_llm_compressor_cannot_follow_says_so(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["calibrate", str(own/"model"), "--data", str(own/"texts.jsonl"), "--limit", "2", "--observer"]
    assert main([*words, "input=entropy", "--out", "ours"]) == main([*words, "input=mse", "--out", "theirs"]) == 0
    note, said = "llm-compressor has no observer entropy: ", capsys.readouterr().out
    assert said.count(note) == 1 and said.count("the same scales on the same batches") == 1
    assert Path("ours/recipe.yaml").read_text().startswith(f"# {note}")
    assert not Path("theirs/recipe.yaml").read_text().startswith("#")


def test_texts_are_cut_to_what_the_model_was_made_for(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("word " * 400 + "\nshort\n")
    assert main(["calibrate", str(own/"model"), "--data", "long.txt", "--out", "run", "--quiet"]) == 0
    found = CalibrationRecord.load("run/record.safetensors")
    assert found.batches == 2 and 256 < found.tokens < 270 and not capsys.readouterr().err


def test_help_waits_for_no_model_library():
    heavy = "{'torch', 'transformers', 'nbformat'}"
    found = run(
        "-c",
        f"import sys, qcal_nb.cli; qcal_nb.cli.commands.parser(); print({heavy} & set(sys.modules))",
        program=(sys.executable,),
    )
    assert found.stdout.strip() == "set()", found.stdout + found.stderr


def test_the_program_is_installed_and_teaches():
    assert shutil.which(str(PROGRAM))
    shown = run("--help").stdout + run("calibrate", "--help").stdout
    for word in (
        "lab", "calibrate", "report", "torchrun", "recipe.yaml", "qcal-nb calibrate tiny --scheme FP8 --out run"
    ):
        assert word in shown
    assert run("--version").stdout.startswith("qcal-nb ")


def test_what_is_finished_is_kept_when_a_checkpoint_cannot_be_saved(own, tmp_path, monkeypatch, capsys):
    "A generation config that transformers will not save is found out last; record and recipe are there by then."
    from qcal_nb.recipes import checkpoint
    def refuse(*_): raise ValueError("GenerationConfig is invalid: do_sample is False, temperature is set")
    monkeypatch.setattr(checkpoint, "_write_files", refuse)
    run = tmp_path/"run"
    words = ["calibrate", str(own/"model"), "--data", str(own/"texts.jsonl"), "--max-length", "48", "--checkpoint"]
    assert main([*words, "--out", str(run), "--quiet"]) == 1
    err = capsys.readouterr().err
    assert "GenerationConfig is invalid" in err and f"There is no checkpoint; record and recipe are in {run}" in err
    assert sorted(p.name for p in run.iterdir()) == ["recipe.yaml", "record.safetensors"]
    assert CalibrationRecord.load(run/"record.safetensors").batches and from_yaml(run/"recipe.yaml")


HEAVY = """
import sys
from qcal_nb.cli import main
code = main(sys.argv[1:])
print(code, *(name for name in ("torch", "transformers", "pandas", "matplotlib") if name in sys.modules))
"""


@pytest.mark.parametrize("words", [WRONG[name][0] for name in (
    "no such path", "lab without a model", "lab without a record", "no such file", "empty file", "not JSON",
    "no data", "notebook"
)], ids=lambda words: " ".join(words)[:40])
def test_what_is_wrong_with_words_and_files_is_said_before_anything_heavy_is_imported(words, tmp_path):
    (tmp_path/"t.txt").write_text("One.")
    (tmp_path/"empty.txt").write_text("\n")
    (tmp_path/"bad.jsonl").write_text("{text: 1}\n")
    (tmp_path/"full").mkdir()
    (tmp_path/"full"/"file").touch()
    done = run("-c", HEAVY, *words, program=(sys.executable,), cwd=tmp_path)
    assert done.stdout.split() == ["1"], done.stderr


def test_code_of_a_models_folder_is_never_run(tmp_path, monkeypatch):
    from qcal_nb.cli.inputs import load_model
    folder = tmp_path/"model"
    folder.mkdir()
    auto = dict(AutoConfig="mine.Config", AutoModelForCausalLM="mine.Model")
    (folder/"config.json").write_text(json.dumps(dict(model_type="mine", auto_map=auto, architectures=["Model"])))
    (folder/"mine.py").write_text(f"open({str(tmp_path/'executed')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at a prompt"))
    with pytest.raises(ValueError, match="MODEL .* cannot be loaded"): load_model(str(folder))
    assert not (tmp_path/"executed").exists()


@pytest.mark.parametrize("said, words", [
    ("cut them with max_length=64", "cut them with --max-length 64"),
    ("end with on_uncalibrated='skip' to leave", "end with --on-uncalibrated skip to leave"),
    ("add the modules to `ignore` or choose another group_size", "add the modules to --ignore or choose another"),
    ("record with nonfinite='skip' (leave", "record with --nonfinite skip (leave"),
    ("attention='model' uses less", "--attention model uses less"),
])
def test_advice_is_in_options_of_the_command_line(said, words):
    from qcal_nb.cli.commands import in_options, parser
    told = in_options(said)
    assert words in told
    known = {o for a in parser()._subparsers._group_actions[0].choices["calibrate"]._actions for o in a.option_strings}
    assert {word for word in told.split() if word.startswith("--")} <= known


def test_options_for_what_messages_advise(tmp_path):
    from qcal_nb import CalibrationRecord
    words = ["calibrate", "tiny", "--limit", "1", "--max-length", "8", "--scheme", "INT8_STATIC", "--quiet"]
    words += ["--nonfinite", "skip", "--on-uncalibrated", "skip", "--attention", "model", "--out", str(tmp_path/"out")]
    assert main(words) == 0
    recipe = (tmp_path/"out"/"recipe.yaml").read_text()
    found = CalibrationRecord.load(tmp_path/"out"/"record.safetensors")
    assert found.about.attention == "sdpa" and "ignore" in recipe
