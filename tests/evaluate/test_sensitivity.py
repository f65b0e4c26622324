"""Sensitivities: rows are those of models quantized so, and a run that was killed goes on where it stopped."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import differences, fingerprint, make_model

from qcal_nb.evaluate import compare_schemes, sensitivity
from qcal_nb.lifecycle import phase_of
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.evaluate.sensitivities import SENSITIVITY_COLUMNS
from tests.evaluate.samples import NVFP4A16, QUIET, W4, Counting

# of two blocks with seven modules each: kinds, blocks, modules (with and without), and rests
STATES = 7 + 2 + 2 * 14 + 2
ROOT = Path(__file__).resolve().parents[2]


def test_rows_are_those_of_models_quantized_so(llama, data, evals):
    table = sensitivity(llama, data, W4, eval_data=evals, **QUIET)
    assert list(table.columns) == SENSITIVITY_COLUMNS and len(table) == 14
    row, names = table.iloc[9], [n for (n,) in table.modules]
    for only in (True, False):
        chosen = [row.module] if only else [n for n in names if n != row.module]
        direct = compare_schemes(
            llama, None, {"x": QuantizationModifier(scheme=W4, targets=chosen)}, eval_data=evals, **QUIET
        )
        kind = "only" if only else "without"
        assert (direct.loss[1], direct.kl[1]) == (row[f"loss_{kind}"], row[f"kl_{kind}"])
    all_of_them = compare_schemes(llama, None, W4, eval_data=evals, **QUIET)
    told = dict(loss_original=all_of_them.loss[0], loss_quantized=all_of_them.loss[1], kl_quantized=all_of_them.kl[1])
    assert {name: table.attrs[name] for name in told} == told
    assert names == [n for n, m in llama.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


def test_fused_groups_are_switched_together(llama, evals):
    table = sensitivity(llama, None, NVFP4A16, eval_data=evals, **QUIET)
    assert table.modules.map(len).tolist() == [3, 1, 2, 1] * 2 and table.layer.tolist() == [0] * 4 + [1] * 4
    kinds = [row["name"] for row in table.attrs["groups"] if row["level"] == "kind"]
    assert kinds == ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]
    assert table.module[0] == "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    modifier = QuantizationModifier(scheme=NVFP4A16, targets=list(table.modules[0]))
    direct = compare_schemes(llama, None, {"qkv": modifier}, eval_data=evals, **QUIET)
    assert direct.kl[1] == table.kl_only[0] > 0


def test_logits_that_are_not_kept_give_the_same(llama, evals, monkeypatch):
    kept = sensitivity(llama, None, W4, eval_data=evals, **QUIET)
    monkeypatch.setattr("qcal_nb.evaluate.sensitivities.KEPT_BYTES", 0)
    counter = Counting(llama)
    assert sensitivity(llama, None, W4, eval_data=evals, **QUIET).equals(kept) and counter.n == 2 * 3 * (2 + STATES)


def test_experts_have_rows(data, evals):
    table = sensitivity(make_model("mixtral"), data, W4, eval_data=evals[:1], **QUIET)
    experts = table[table.module.str.contains("experts")]
    assert len(experts) == 2 * 4 * 3 and (experts.kl_only >= 0).all() and experts.kl_only.max() > 0
    assert (table.type == "Linear").all()


SCRIPT = """
import sys, time
sys.path[:0] = [{tests!r}]
import torch
from helpers import make_batches, make_model
from qcal_nb.evaluate import sensitivity
torch.set_num_threads(1)
model = make_model("llama_gqa")
model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
print("ready", flush=True)
sensitivity(model, make_batches(2), "FP8", eval_data=make_batches(3, seed=5), path={path!r}, progress=False)
"""


def test_killed_and_gone_on(llama, data, evals, tmp_path):
    path = tmp_path/"rows.jsonl"
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    child = subprocess.Popen([sys.executable, "-c", SCRIPT.format(tests=str(ROOT/"tests"), path=str(path))], env=env)
    until = time.monotonic() + 120
    def written(): return path.exists() and path.read_bytes().count(b"\n") >= 5
    while child.poll() is None and time.monotonic() < until and not written(): time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = path.read_bytes().count(b"\n") - 2
    assert 3 <= done < 7
    whole = sensitivity(llama, data, "FP8", eval_data=evals, **QUIET)
    counter = Counting(llama)
    resumed = sensitivity(llama, data, "FP8", eval_data=evals, path=path, **QUIET)
    assert resumed.attrs == whole.attrs
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert counter.n == 2 + 3 + 3 * (STATES - done)  # calibration, the original's logits, and what was missing
    before = counter.n
    pd.testing.assert_frame_equal(
        sensitivity(llama, data, "FP8", eval_data=evals, path=path, **QUIET), whole, check_exact=True
    )
    assert counter.n == before  # all of it is in the file


@pytest.fixture
def finished(llama, evals, tmp_path):
    path = tmp_path/"rows.jsonl"
    return path, sensitivity(llama, None, W4, eval_data=evals, path=path, **QUIET)


def test_cut_off_anywhere(llama, evals, finished):
    path, table = finished
    content = path.read_bytes()
    ends = [i + 1 for i, c in enumerate(content) if c == 10]
    for cut in (0, 1, ends[0] - 1, ends[0], ends[0] + 5, ends[1] - 1, ends[4] - 1, ends[4] + 20, len(content) - 1):
        path.write_bytes(content[:cut])
        assert sensitivity(llama, None, W4, eval_data=evals, path=path, **QUIET).equals(table), cut
        assert path.read_bytes() == content


OTHER = {"eval_data": lambda model, evals: dict(eval_data=evals[:2]),
         "scheme": lambda model, evals: dict(scheme={"weights": dict(num_bits=8, strategy="channel")}),
         "weights": lambda model, evals: {} if model.lm_head.weight.data.add_(1) is not None else None}


@pytest.mark.parametrize("name", OTHER)
def test_another_run_is_refused(llama, evals, finished, name):
    path, _ = finished
    content = path.read_bytes()
    asked = dict(scheme=W4, eval_data=evals) | OTHER[name](llama, evals)
    with pytest.raises(ValueError, match=f"is of another run: {name} differs; choose another path"):
        sensitivity(llama, None, **asked, path=path, **QUIET)
    assert path.read_bytes() == content and phase_of(llama) == "original"


def test_another_model_is_refused(evals, finished):
    path, _ = finished
    with pytest.raises(
        ValueError, match=r"another run: .*model, weights differ \(LlamaForCausalLM, not Qwen3ForCausalLM\)"
    ):
        sensitivity(make_model("qwen3"), None, W4, eval_data=evals, path=path, **QUIET)


DAMAGE = {
    "text": (lambda lines: ["dear diary,\n", "today\n"], "holds no table of sensitivity"),
    "no newline": (lambda lines: ["dear diary"], "holds no table of sensitivity"),
    "bytes": (lambda lines: [b"\xff\xfe\x00\n"], "holds no table of sensitivity"),
    "json": (lambda lines: ['{"a": 1}\n'], "holds no table of sensitivity"),
    "list": (lambda lines: ["[1]\n"], "holds no table of sensitivity"),
    "newer": (lambda lines: [lines[0].replace('"version": 2', '"version": 3', 1)], "has version 3"),
    "torn line": (lambda lines: [*lines[:3], lines[3][:20] + "\n", *lines[4:]], "line 4 is no JSON object"),
    "row of other modules": (lambda lines: [*lines[:12], lines[12].replace("layers.0", "layers.7")], "line 13 holds"),
    "group of other modules": (lambda lines: [*lines[:3], lines[3].replace("layers.0", "layers.7")], "line 4 holds"),
    "group of another sort": (lambda lines: [*lines[:3], lines[3].replace('"kind"', '"mind"')], "line 4 holds"),
    "row without a number": (
        lambda lines: [*lines[:3], json.dumps(json.loads(lines[3]) | {"kl_only": "x"}) + "\n"], "line 4 holds"
    ),
    "other units": (
        lambda lines: [lines[0], json.dumps(json.loads(lines[1]) | {"units": [["lm_head"]]}) + "\n"],
        "second line lists other modules",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_foreign_and_damaged_files_are_refused_and_left_alone(llama, evals, finished, kind):
    path, _ = finished
    change, words = DAMAGE[kind]
    bad = b"".join(
        x if isinstance(x, bytes) else x.encode() for x in change(path.read_text().splitlines(keepends=True))
    )
    path.write_bytes(bad)
    before = fingerprint(llama)
    with pytest.raises(ValueError, match=words) as error:
        sensitivity(llama, None, W4, eval_data=evals, path=path, **QUIET)
    assert str(path) in str(error.value) and path.read_bytes() == bad and differences(before, fingerprint(llama)) == []
