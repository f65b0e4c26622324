"""What needs the model: figures against direct computation, and a model that is afterwards what it was, whatever happened."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from helpers import differences, fingerprint, make_batches, make_model
from safetensors import safe_open
from torch.nn.functional import cross_entropy, log_softmax

from qcal_nb import divergence, scheme_comparison
from qcal_nb.analysis import OBSERVER_COLUMNS
from qcal_nb.divergence import Switchboard, borrowed, divergence_of, eval_batches, logits_of, name_of
from qcal_nb.evaluate import compare_observers, compare_schemes, evaluate, sensitivity
from qcal_nb.ledger import LifecycleError, phase_of, reset_quantization, unfuse_experts
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts, evaluating, heldout_texts, load_tiny_llama, perplexity
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import save_quantized
from qcal_nb.scheme_comparison import SCHEME_COLUMNS, evaluated, stored_bytes
from qcal_nb.sensitivities import SENSITIVITY_COLUMNS

ROOT = Path(__file__).resolve().parents[1]
QUIET = dict(progress=False)
W4 = {"weights": dict(num_bits=4, strategy="channel")}
W4A4 = W4 | {"input_activations": dict(num_bits=4, strategy="tensor", observer="static_minmax")}
NVFP4A16 = "NVFP4A16"


@pytest.fixture
def llama(): return make_model("llama_gqa")


@pytest.fixture
def data(): return make_batches(2)


@pytest.fixture
def evals(): return make_batches(3, seed=5)


class Counting:
    "Counts the forward passes of a model; from `stop_at` on each raises `error`."

    def __init__(self, model, stop_at=math.inf, error=KeyboardInterrupt):
        self.n, self.stop_at, self.error = 0, stop_at, error
        self.handle = model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.n += 1
        if self.n >= self.stop_at: raise self.error("stopped by a test")


# --- what is counted ---

def direct(logits, original, batch):
    "Loss, KL and top-1 by float64 formulas, position by position."
    loss = kl = same = n = 0
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            if not (mask[row, t] and mask[row, t + 1]): continue
            q, p = (log_softmax(x[row, t].double(), -1) for x in (logits, original))
            n, loss, kl = n + 1, loss - q[ids[row, t + 1]].item(), kl + (p.exp() * (p - q)).sum().item()
            same += int(logits[row, t].argmax() == original[row, t].argmax())
    return n, loss / n, kl / n, same / n


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
    board = Switchboard(model)
    with evaluating(model):
        with board.only(): assert all(torch.equal(logits_of(model, b), x) for b, x in zip(evals, before))
        assert not torch.equal(logits_of(model, evals[0]), before[0])


def test_keys_and_values_are_switched_off_too(llama, evals):
    with evaluating(llama): before = logits_of(llama, evals[0])
    cache = dict(num_bits=8, type="float", strategy="tensor", symmetric=True)
    modifier = QuantizationModifier(kv_cache_scheme=cache, targets=[], scheme=None, config_groups=None)
    calibrate(llama, make_batches(2), modifier, **QUIET)
    board = Switchboard(llama)
    assert len(board.modules) == 2
    with evaluating(llama), board.only(): assert torch.equal(logits_of(llama, evals[0]), before)
    _, after, damage = evaluated(llama, evals)
    assert after.kl > 0 and set(damage.powers) == {f"model.layers.{i}.self_attn.{s}" for i in (0, 1) for s in "kv"}


def test_what_was_left_out_for_lack_of_a_scale_stays_off():
    model = make_model("mixtral")
    modifier = QuantizationModifier(scheme=W4A4, ignore=["lm_head"], on_uncalibrated="skip")
    calibrate(model, make_batches(1, shape=(1, 2)), modifier, all_experts=False, **QUIET)
    skipped = [n for n, m in model.named_modules() if getattr(m, "input_scale", None) is not None and m.input_scale.isnan().any()]
    board = Switchboard(model)
    assert skipped and not set(skipped) & set(board.modules)
    with board.only(): pass
    with evaluating(model): assert logits_of(model, make_batches(1)[0]).isfinite().all()


# --- compare_schemes ---

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
    assert math.isclose(table.loss[1], loss, rel_tol=1e-4) and math.isclose(table.kl[1], kl, rel_tol=0.02) and abs(table.top1[1] - same) < 2.5 / n


def current_logits(model, batch):
    with evaluating(model): return logits_of(model, batch)


def test_padded_batches_give_the_figures_of_single_texts():
    model, tokenizer = load_tiny_llama()
    held = [t[:200 + 150 * i] for i, t in enumerate(heldout_texts()[:3])]
    one, three = (compare_schemes(model, None, W4, eval_data=held, tokenizer=tokenizer, batch_size=n, **QUIET) for n in (1, 3))
    for column in ("loss", "kl"): assert (one[column] - three[column]).abs().max() < 1e-4
    assert one.worst[1] == three.worst[1] and math.isclose(one.worst_sqnr_db[1], three.worst_sqnr_db[1], abs_tol=1e-6)


def test_worst_is_the_worst_of_explicit_qdq(llama, data, evals):
    table = compare_schemes(llama, data, QuantizationModifier(scheme=W4A4, ignore=["lm_head"]), eval_data=evals, **QUIET)
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
@pytest.mark.parametrize("name, scheme", [("llama_tied", "W8A8"), ("llama_gqa", "FP8"), ("llama_tied", "NVFP4A16"), ("mixtral", "FP8_DYNAMIC"),
                                          ("llama_gqa", W4)])
def test_weight_bytes_are_those_of_the_file(name, scheme, data, tmp_path):
    model = make_model(name)
    modifier = QuantizationModifier(scheme=scheme, ignore=["lm_head", "re:.*gate$"])
    size = compare_schemes(model, data, {"it": modifier}, eval_data=data, **QUIET).weight_bytes
    calibrate(model, data, modifier, **QUIET)
    save_quantized(model, tmp_path/"quantized")
    reset_quantization(model).save_pretrained(tmp_path/"original")
    assert size.tolist() == [written(tmp_path/"original"), written(tmp_path/"quantized")]


def written(folder):
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as found: total += sum(t.numel() * t.element_size() for t in (found.get_tensor(k) for k in found.keys()))
    return total


def test_what_no_format_can_store_has_no_size(llama, data):
    odd = {"weights": dict(num_bits=4, type="float", strategy="group", group_size=8)}
    calibrate(llama, data, QuantizationModifier(scheme=odd, ignore=["lm_head"]), **QUIET)
    assert stored_bytes(llama) is None
    reset_quantization(llama)
    table = compare_schemes(llama, data, {"odd": QuantizationModifier(scheme=odd, ignore=["lm_head"])}, eval_data=data, **QUIET)
    assert table.weight_bytes.isna().tolist() == [False, True] and math.isfinite(table.loss[1])


def test_labels_of_iterables_are_told_apart(llama, data):
    schemes = (s for s in ["W8A8", QuantizationModifier(scheme="W8A8", ignore=["lm_head", "re:.*mlp.*"]), W4])
    table = compare_schemes(llama, None, schemes, eval_data=data, **QUIET)
    assert table.scheme.tolist() == ["original", "W8A8", "W8A8 (2)", name_of(W4)] and table.kl[2] != table.kl[1]


def test_data_that_can_be_read_once_is_enough_for_all(llama, data, evals):
    once = compare_schemes(llama, iter(data), ["FP8", "INT8_STATIC"], eval_data=iter(evals), **QUIET)
    assert once.equals(compare_schemes(llama, data, ["FP8", "INT8_STATIC"], eval_data=evals, **QUIET))


# --- the model is what it was ---

@pytest.mark.parametrize("name, scheme", [("llama_gqa", "FP8"), ("mixtral", W4), ("mixtral", NVFP4A16), ("opt", "INT8_STATIC")])
def test_the_model_is_as_before(name, scheme, data, evals):
    model = make_model(name).train()
    before = fingerprint(model)
    compare_schemes(model, data, [scheme], eval_data=evals, **QUIET)
    sensitivity(model, data, scheme, eval_data=evals[:1], **QUIET)
    compare_observers(model, data, ["static_minmax"], scheme=QuantizationModifier(scheme=scheme, ignore=["lm_head"]), **QUIET)
    assert differences(before, fingerprint(model)) == []


CALLS = {"compare_schemes": lambda m, d, e: compare_schemes(m, d, ["FP8", "INT8_STATIC"], eval_data=e, **QUIET),
         "sensitivity": lambda m, d, e: sensitivity(m, d, "FP8", eval_data=e, **QUIET),
         "compare_observers": lambda m, d, e: compare_observers(m, d, ["static_minmax", "minmax"], **QUIET)}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_as_before_after_errors_and_interrupts(llama, data, evals, call, stop_at, error):
    if call == "compare_observers": stop_at = min(stop_at, 4)  # two batches, twice
    counter = Counting(llama, stop_at, error)
    before = fingerprint(llama)
    if error is KeyboardInterrupt: assert isinstance(CALLS[call](llama, data, evals), pd.DataFrame)
    else:
        with pytest.raises(RuntimeError, match="stopped by a test"): CALLS[call](llama, data, evals)
    assert differences(before, fingerprint(llama)) == [] and counter.n >= stop_at


def test_an_interrupt_gives_the_rows_so_far(llama, data, evals):
    whole = CALLS["compare_schemes"](llama, data, evals)
    counter = Counting(llama, 3 + 2 + 6 + 2 + 1)  # original; calibrate and evaluate FP8; calibrate INT8 and one more
    assert CALLS["compare_schemes"](llama, data, evals).equals(whole.iloc[:2])
    counter.handle.remove()
    table = sensitivity(llama, data, "FP8", eval_data=evals, **QUIET)
    counter = Counting(llama, 2 + 3 + 3 + 3 + 2 * 3 + 2)  # calibrate, the original's logits, nothing, everything, one row, and a bit
    assert sensitivity(llama, data, "FP8", eval_data=evals, **QUIET).equals(table.iloc[:1])


def test_what_prepared_the_model_stays(data, evals):
    model = unfuse_experts(make_model("mixtral"))
    before = fingerprint(model)
    compare_schemes(model, data, ["FP8"], eval_data=evals, **QUIET)
    left = [d for d in differences(before, fingerprint(model)) if "experts.tokens" not in d]  # experts count their tokens in every pass
    assert left == []


# --- sensitivity ---

def test_rows_are_those_of_models_quantized_so(llama, data, evals):
    table = sensitivity(llama, data, W4, eval_data=evals, **QUIET)
    assert list(table.columns) == SENSITIVITY_COLUMNS and len(table) == 14
    row, names = table.iloc[9], [n for (n,) in table.modules]
    for only in (True, False):
        chosen = [row.module] if only else [n for n in names if n != row.module]
        direct = compare_schemes(llama, None, {"x": QuantizationModifier(scheme=W4, targets=chosen)}, eval_data=evals, **QUIET)
        kind = "only" if only else "without"
        assert (direct.loss[1], direct.kl[1]) == (row[f"loss_{kind}"], row[f"kl_{kind}"])
    all_of_them = compare_schemes(llama, None, W4, eval_data=evals, **QUIET)
    assert table.attrs == dict(loss_original=all_of_them.loss[0], loss_quantized=all_of_them.loss[1], kl_quantized=all_of_them.kl[1])
    assert names == [n for n, m in llama.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


def test_fused_groups_are_switched_together(llama, evals):
    table = sensitivity(llama, None, NVFP4A16, eval_data=evals, **QUIET)
    assert table.modules.map(len).tolist() == [3, 1, 2, 1] * 2 and table.layer.tolist() == [0] * 4 + [1] * 4
    assert table.module[0] == "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    modifier = QuantizationModifier(scheme=NVFP4A16, targets=list(table.modules[0]))
    direct = compare_schemes(llama, None, {"qkv": modifier}, eval_data=evals, **QUIET)
    assert direct.kl[1] == table.kl_only[0] > 0


def test_logits_that_are_not_kept_give_the_same(llama, evals, monkeypatch):
    kept = sensitivity(llama, None, W4, eval_data=evals, **QUIET)
    monkeypatch.setattr("qcal_nb.sensitivities.KEPT_BYTES", 0)
    counter = Counting(llama)
    assert sensitivity(llama, None, W4, eval_data=evals, **QUIET).equals(kept) and counter.n == 2 * 3 * (2 + 2 * 14)


def test_experts_have_rows(data, evals):
    table = sensitivity(make_model("mixtral"), data, W4, eval_data=evals[:1], **QUIET)
    experts = table[table.module.str.contains("experts")]
    assert len(experts) == 2 * 4 * 3 and (experts.kl_only >= 0).all() and experts.kl_only.max() > 0 and (table.type == "Linear").all()


# --- resuming ---

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
    while child.poll() is None and time.monotonic() < until and (not path.exists() or path.read_bytes().count(b"\n") < 5): time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = path.read_bytes().count(b"\n") - 2
    assert 3 <= done < 14
    whole = sensitivity(llama, data, "FP8", eval_data=evals, **QUIET)
    counter = Counting(llama)
    resumed = sensitivity(llama, data, "FP8", eval_data=evals, path=path, **QUIET)
    assert resumed.attrs == whole.attrs
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert counter.n == 2 + 3 + 2 * 3 * (14 - done)  # calibration, the original's logits, and what was missing
    before = counter.n
    pd.testing.assert_frame_equal(sensitivity(llama, data, "FP8", eval_data=evals, path=path, **QUIET), whole, check_exact=True)
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
    with pytest.raises(ValueError, match=r"another run: .*model, weights differ \(LlamaForCausalLM, not Qwen3ForCausalLM\)"):
        sensitivity(make_model("qwen3"), None, W4, eval_data=evals, path=path, **QUIET)


DAMAGE = {
    "text": (lambda lines: ["dear diary,\n", "today\n"], "holds no table of sensitivity"),
    "no newline": (lambda lines: ["dear diary"], "holds no table of sensitivity"),
    "bytes": (lambda lines: [b"\xff\xfe\x00\n"], "holds no table of sensitivity"),
    "json": (lambda lines: ['{"a": 1}\n'], "holds no table of sensitivity"),
    "list": (lambda lines: ["[1]\n"], "holds no table of sensitivity"),
    "newer": (lambda lines: [lines[0].replace('"version": 1', '"version": 2', 1)], "has version 2"),
    "torn line": (lambda lines: [*lines[:3], lines[3][:20] + "\n", *lines[4:]], "line 4 is no JSON object"),
    "row of other modules": (lambda lines: [*lines[:3], lines[3].replace("layers.0", "layers.7")], "line 4 holds"),
    "row without a number": (lambda lines: [*lines[:3], json.dumps(json.loads(lines[3]) | {"kl_only": "x"}) + "\n"], "line 4 holds"),
    "other units": (lambda lines: [lines[0], json.dumps(json.loads(lines[1]) | {"units": [["lm_head"]]}) + "\n"], "second line lists other modules"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_foreign_and_damaged_files_are_refused_and_left_alone(llama, evals, finished, kind):
    path, _ = finished
    change, words = DAMAGE[kind]
    bad = b"".join(x if isinstance(x, bytes) else x.encode() for x in change(path.read_text().splitlines(keepends=True)))
    path.write_bytes(bad)
    before = fingerprint(llama)
    with pytest.raises(ValueError, match=words) as error: sensitivity(llama, None, W4, eval_data=evals, path=path, **QUIET)
    assert str(path) in str(error.value) and path.read_bytes() == bad and differences(before, fingerprint(llama)) == []


# --- compare_observers ---

STATIC = {"W8A8": {}, "FP8_BLOCK": {}, "W4A16": {}, "NVFP4A16": {}, "MXFP4A16": {}, "FP8": {}, "W4A16_ASYM": {}, "INT8_STATIC": {}}


@pytest.mark.parametrize("scheme", STATIC)
def test_noise_is_what_the_module_itself_makes(scheme):
    "Each granularity: signal and noise of weights and inputs, against the quantized model's own quantization of the same tensors."
    model, tokenizer = load_tiny_llama()
    texts = [t[:200] for t in calibration_texts()[:2]]
    modifier = QuantizationModifier(scheme=scheme, ignore=["lm_head"], weight_observer="memoryless_minmax")
    asked = "static_minmax" if scheme in ("FP8", "INT8_STATIC") else "memoryless_minmax"
    table = compare_observers(model, texts, [asked], scheme=modifier, tokenizer=tokenizer, **QUIET)
    table = table[(table.base_name == "weight") | (asked == "static_minmax")]
    fixed = dict(input_observer="static_minmax") if asked == "static_minmax" else {}
    calibrate(model, texts, modifier.model_copy(update=fixed), tokenizer=tokenizer, **QUIET)
    damage = evaluated(model, eval_batches(texts, tokenizer))[2]
    for row in table.itertuples():
        signal, noise = damage.powers[f"{row.module}.{row.base_name}"]
        assert row.reason == "" and row.bound_db == 0, row.module
        assert math.isclose(row.sqnr_db, scheme_comparison.sqnr_db(signal, noise), abs_tol=1e-3), row.module


def test_local_scales_are_found_while_running(data):
    model = make_model("llama_gqa")
    table = compare_observers(model, data, ["static_minmax"], scheme="NVFP4", base_names=["input"], **QUIET)
    calibrate(model, data, QuantizationModifier(scheme="NVFP4", ignore=["lm_head"], input_observer="static_minmax"), **QUIET)
    damage = evaluated(model, data)[2]
    for row in table.itertuples():
        assert math.isnan(row.scale) and math.isclose(row.sqnr_db, scheme_comparison.sqnr_db(*damage.powers[f"{row.module}.input"]), abs_tol=1e-3)


def test_rows_and_columns(llama, data):
    names = ["static_minmax", ("percentile", {"percentile": 99.0}), "mse"]
    table = compare_observers(llama, data, names, base_names=["input", "weight", "output"], **QUIET)
    assert list(table.columns) == OBSERVER_COLUMNS and len(table) == 14 * 3 * 3 and table.attrs["batches"] == 2
    best = table[table.best]
    where = ["module", "base_name"]
    assert len(best) == 14 * 3 and best.set_index(where).sqnr_db.sort_index().equals(table.groupby(where).sqnr_db.max().sort_index())
    clipping = table[table.observer.str.startswith("percentile") & (table.base_name == "input")]
    assert clipping.clipped.between(0.001, 0.03).all() and (table[table.observer == "static_minmax"].clipped == 0).all()


def test_every_module_has_its_own_weight_measured(llama, data):
    "q, k and v are fed the same tensor: what listens to it still concludes about three weights."
    modifier = QuantizationModifier(scheme=W4, ignore=["lm_head"])
    table = compare_observers(llama, data, ["imatrix_mse"], scheme=modifier, base_names=["weight"], **QUIET)
    assert (table.reason == "").all() and table.scale.nunique() == 14


def test_masked_tokens_do_not_count():
    model, tokenizer = load_tiny_llama()
    texts = [t[:n] for t, n in zip(calibration_texts()[:2], (120, 300))]
    options = dict(tokenizer=tokenizer, base_names=["input"], **QUIET)
    padded = compare_observers(model, texts, batch_size=2, mask=lambda b: b["attention_mask"].bool(), **options)
    single = compare_observers(model, texts, **options)
    assert (padded.sqnr_db - single.sqnr_db).abs().max() < 1e-3 and (padded.clipped == single.clipped).all()


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_attention_states(llama, data, strategy):
    scheme = QuantizationModifier(config_groups={"a": dict(targets=["LlamaAttention"], input_activations=dict(num_bits=8, strategy=strategy))})
    before = fingerprint(llama)
    table = compare_observers(llama, data, ["static_minmax"], scheme=scheme, base_names=["q", "k", "v"], **QUIET)
    assert len(table) == 6 and (table.reason == "").all() and table.sqnr_db.between(20, 70).all() and differences(before, fingerprint(llama)) == []
    assert (table.scale_min < table.scale_max).all() == (strategy == "attn_head")


def test_nonfinite_values_are_left_out(llama, data):
    llama.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    table = compare_observers(llama, None, ["static_minmax"], base_names=["weight"], **QUIET)
    row = table[table.module == "model.layers.0.mlp.up_proj"].iloc[0]
    assert row.reason == "" and 20 < row.sqnr_db < 60


# --- what is refused ---

def test_models_that_predict_no_next_token(data):
    for model in (make_model("bert"), make_model("llama_gqa").model, torch.nn.Linear(2, 2)):
        before = fingerprint(model)
        for call in (lambda m: compare_schemes(m, data, ["FP8"], eval_data=data), lambda m: sensitivity(m, data, "FP8", eval_data=data)):
            with pytest.raises(TypeError, match="must be a causal language model"): call(model)
        assert differences(before, fingerprint(model)) == []
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"): compare_schemes("x", data, ["FP8"], eval_data=data)


@pytest.mark.parametrize("change, error, words", [
    (dict(schemes=["FP9"]), ValueError, "'FP9' is not a preset"), (dict(schemes=[8]), TypeError, "a scheme must be a preset's name"),
    (dict(schemes=8), TypeError, "schemes must be an iterable"), (dict(schemes={1: "FP8"}), TypeError, "labels are strings"),
    (dict(schemes=["W4A16"]), ValueError, "W4A16: the scheme does not fit"),
    (dict(data=None), ValueError, "data=None: FP8 cannot be calibrated"),
    (dict(data=[]), ValueError, "data=empty"), (dict(eval_data=[]), ValueError, "eval_data must hold at least one token"),
    (dict(eval_data=["text"]), ValueError, "pass the model's tokenizer"),
    (dict(eval_data=[torch.rand(1, 3, 4)]), ValueError, "eval_data: batch 0 holds"),
    (dict(batch_size=0), ValueError, "batch_size=0 must be"),
])
def test_bad_arguments_are_named_before_anything_runs(llama, data, change, error, words):
    counter, before = Counting(llama), fingerprint(llama)
    with pytest.raises(error, match=words):
        asked = dict(data=data, schemes=["FP8"], eval_data=data) | change
        compare_schemes(llama, asked.pop("data"), asked.pop("schemes"), **asked, **QUIET)
    assert counter.n == 0 and differences(before, fingerprint(llama)) == []


def test_a_scheme_that_does_not_fit_spoils_nothing(llama, data):
    before = fingerprint(llama)
    table = compare_schemes(llama, data, ["W4A16", "FP8"], eval_data=data[:1], **QUIET)
    assert table.scheme.tolist() == ["original", "W4A16", "FP8"] and table.why.str.contains("group_size is 128").tolist() == [False, True, False]
    assert table.perplexity.isna().tolist() == [False, True, False] and differences(before, fingerprint(llama)) == []
    alone = compare_schemes(llama, data, ["FP8"], eval_data=data[:1], **QUIET)
    assert alone.iloc[1].drop("scheme").equals(table.iloc[2].drop("scheme"))


def test_a_calibrated_model_is_not_touched(llama, data):
    calibrate(llama, data, QuantizationModifier(scheme="FP8", ignore=["lm_head"]), **QUIET)
    before = fingerprint(llama)
    for call in CALLS.values():
        with pytest.raises(LifecycleError, match="needs the unquantized model, but this one is calibrated"): call(llama, data, data)
    assert differences(before, fingerprint(llama)) == []
    with pytest.raises(LifecycleError), borrowed(llama, "a test"): pass


FIGURES = [c for c in SCHEME_COLUMNS if c not in ("scheme", "why")]


def test_a_calibrated_model_gives_its_row_and_stays_as_it_is(llama, data, evals):
    for scheme in (W4A4, "FP8"):
        row = compare_schemes(llama, data, {"one": scheme}, eval_data=evals, **QUIET).iloc[1]
        calibrate(llama, data, QuantizationModifier(scheme=scheme, ignore=["lm_head"]), **QUIET)
        llama.train()
        before = fingerprint(llama)
        found = evaluate(llama, evals, **QUIET)
        assert list(found.index) == FIGURES and all(found[c] == row[c] for c in FIGURES) and found.kl > 0
        assert differences(before, fingerprint(llama)) == [] and llama.training
        llama.eval()
        reset_quantization(llama)


def test_of_a_calibrated_model_what_is_off_stays_off_and_an_error_leaves_it_as_it_is(llama, data, evals):
    calibrate(llama, data, QuantizationModifier(scheme=W4A4, ignore=["lm_head"]), **QUIET)
    whole, off = evaluate(llama, evals, **QUIET), llama.model.layers[0].mlp.down_proj
    off.quantization_enabled = False
    before, part = fingerprint(llama), evaluate(llama, evals, **QUIET)
    assert part.loss_before == whole.loss_before and 0 < part.kl != whole.kl
    counting = Counting(llama, stop_at=4, error=RuntimeError)
    with pytest.raises(RuntimeError, match="stopped by a test"): evaluate(llama, evals, **QUIET)
    counting.handle.remove()
    assert differences(before, fingerprint(llama)) == [] and off.quantization_enabled is False


def test_only_a_calibrated_model_is_evaluated(llama, data, evals):
    modifier = QuantizationModifier(scheme="FP8", ignore=["lm_head"])
    for phase, step in dict(original=lambda _: None, initialized=modifier.initialize_quantization, calibrating=modifier.start_calibration).items():
        step(llama)
        with pytest.raises(LifecycleError, match=f"needs a calibrated model, but this one is {phase}"): evaluate(llama, evals, **QUIET)


def test_evaluation_texts_may_be_cut_at_another_length(llama, data, evals):
    def cut(batches, length): return [{k: v[:, :length] for k, v in batch.items()} for batch in batches]
    for call in (compare_schemes, sensitivity):
        said = call(llama, data, "FP8", eval_data=evals, max_length=5, eval_max_length=7, **QUIET)
        pd.testing.assert_frame_equal(said, call(llama, cut(data, 5), "FP8", eval_data=cut(evals, 7), **QUIET))
        with pytest.raises(ValueError, match="eval_max_length=0 must be None or an int of at least 1"):
            call(llama, data, "FP8", eval_data=evals, eval_max_length=0, **QUIET)


def test_an_error_names_the_scheme(llama, data):
    Counting(llama, 3, RuntimeError)
    with pytest.raises(RuntimeError) as error: compare_schemes(llama, data, {"mine": "FP8"}, eval_data=data[:1], **QUIET)
    assert "at 'mine'" in error.value.__notes__[-1]


def test_the_loss_of_one_batch_is_cross_entropy(llama, data):
    table = compare_schemes(llama, None, W4, eval_data=data, **QUIET)
    def summed(batch):
        logits = current_logits(llama, batch)[:, :-1].flatten(0, 1)
        return cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum").item()
    total = sum(map(summed, data))
    assert math.isclose(table.loss[0], total / (2 * 2 * 15), rel_tol=1e-6)


def test_an_encoder_with_a_head_predicts_no_next_token():
    from transformers import BertConfig, BertForMaskedLM
    model = BertForMaskedLM(BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)).eval()
    with pytest.raises(TypeError, match="must be a causal language model .* got BertForMaskedLM"):
        compare_schemes(model, make_batches(1, 64), ["FP8"], eval_data=make_batches(1, 64))


# --- a line of text, and a way to stop ---

def test_a_line_of_text_is_what_greedy_generation_of_the_quantized_model_gives():
    model, tokenizer = load_tiny_llama()
    prompt, texts, evals = "The function returns", calibration_texts()[:2], [text[:300] for text in heldout_texts()[:2]]
    table = compare_schemes(model, texts, ["FP8", "W4A16"], eval_data=evals, tokenizer=tokenizer, prompt=prompt, **QUIET)
    assert list(table.columns) == [*SCHEME_COLUMNS, "text"]
    ids = tokenizer(prompt, return_tensors="pt")
    for label, text in zip(table.scheme, table.text):
        if label != "original": calibrate(model, texts, QuantizationModifier(scheme=label, ignore=["lm_head"]), tokenizer=tokenizer, **QUIET)
        greedy = dict(max_new_tokens=24, do_sample=False, use_cache=False)  # with a cache last bits differ, and with them a rounding now and then
        out = model.generate(**ids, **greedy, pad_token_id=tokenizer.eos_token_id)[0, ids.input_ids.shape[1]:]
        assert text == tokenizer.decode(out, skip_special_tokens=True)
        reset_quantization(model)


def test_text_needs_a_tokenizer_and_a_token_and_leaves_the_model_as_it_was(data, evals):
    model, tokenizer = load_tiny_llama()
    model.train()
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    before, settings = fingerprint(model), model.generation_config.to_dict()
    compare_schemes(model, None, "W8A16", eval_data=evals, tokenizer=tokenizer, prompt="x" * 4000, **QUIET)  # longer than the model can read
    assert model.training and model.generation_config.to_dict() == settings and differences(before, fingerprint(model)) == []

    def silent(text): return dict(input_ids=[])  # a tokenizer that adds no token of its own
    options = dict(eval_data=evals, **QUIET)
    with pytest.raises(ValueError, match="pass the model's tokenizer"): compare_schemes(model, None, "W8A16", prompt="a", **options)
    with pytest.raises(ValueError, match="holds no token"): compare_schemes(model, None, "W8A16", tokenizer=silent, prompt="", **options)
    with pytest.raises(TypeError, match="prompt must be a str"): compare_schemes(model, None, "W8A16", tokenizer=tokenizer, prompt=3, **options)


def test_tick_comes_after_each_batch_and_can_end_the_comparison(llama, data, evals, capsys):
    beats, before = [], fingerprint(llama)
    whole = compare_schemes(llama, data, ["FP8", "W8A8"], eval_data=evals, tick=lambda: beats.append(1), **QUIET)
    assert len(beats) == 3 * len(evals) and "text" not in whole

    def tick():
        beats.append(1)
        if len(beats) == 2 * len(evals) + 1: raise KeyboardInterrupt
    beats.clear()
    table = compare_schemes(llama, data, ["FP8", "W8A8"], eval_data=evals, tick=tick, **QUIET)
    assert table.equals(whole.iloc[:2]) and differences(before, fingerprint(llama)) == [] and capsys.readouterr().out == ""
