"""Files of records: everything comes back, and a crash while writing harms nobody."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace

import pytest
import torch
from helpers import make_batches, make_model
from safetensors import safe_open
from torch.nn import Linear, Sequential

import qcal_nb.recipes.files
from qcal_nb.recipes import write_whole
from qcal_nb.records.calibration_record import from_tree, to_tree
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.observers import Registry
from qcal_nb.records.files import read_tree, squeeze, unsqueeze, write_tree
from qcal_nb.records import CalibrationRecord, record, record_equal, unequal_parts
from tests.records.samples import QUIET

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float16,
    torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2
]


def bits(t):
    return t if t is None else (t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def everything(c):
    tensors = [
        c.low, c.high, c.scale, c.zero_point, c.global_scale, *(c.statistics[name] for name in sorted(c.statistics))
    ]
    last = replace(c.counts, last_batch=None)
    return [
        c.observer, c.base_name, c.args.model_dump(), dict(c.kwargs), sorted(c.statistics), c.reason, repr(last),
        *map(bits, tensors)
    ]


@pytest.fixture(scope="module")
def run():
    "A record with everything in it: NaN, text, experts, all observers, three dtypes."
    model, (_, tokenizer) = make_model("mixtral", torch.bfloat16), load_tiny_llama()
    data = make_batches(2, shape=(1, 9))
    with torch.no_grad(): model.model.embed_tokens.weight[int(data[1]["input_ids"][0, 3]), 5] = float("nan")
    observers = [n for n in Registry.registered_names() if "nvfp4" not in n and "four" not in n and "mse" not in n]
    return record(
        model, data, scheme="FP8", observers=[*observers, ("percentile", {"percentile": 99.5}), "mse"],
        tokenizer=tokenizer, base_names=["input", "output", "lm_head_output"], **QUIET
    )


def test_everything_comes_back(run, tmp_path):
    again = CalibrationRecord.load(run.save(tmp_path/"run.record"))
    assert unequal_parts(again, run) == [] and record_equal(run, again)
    assert again.results.keys() == run.results.keys() and list(again.tensors) == list(run.tensors)
    for key, c in run.results.items(): assert everything(again.results[key]) == everything(c), key
    for key, s in run.tensors.items():
        assert (again[key].sum, again[key].sum_squares) == (s.sum, s.sum_squares)
        assert repr(again[key].first_nonfinite) == repr(s.first_nonfinite)
    assert any(s.nan for s in run.tensors.values()) and run.has_text and again.has_text
    assert any(run.expert_tokens.values())
    for name in ("about", "types", "spans", "level_tokens", "expert_tokens", "seconds"):
        assert getattr(again, name) == getattr(run, name), name
    def shared(r):
        return [[k for k in r.tensors if r.tensors[k] is s] for s in {id(s): s for s in r.tensors.values()}.values()]
    assert shared(again) == shared(run)  # what was one object is one again
    again.save(tmp_path/"again.record")
    headers = [safe_open(tmp_path/n, "pt").metadata() for n in ("run.record", "again.record")]
    assert headers[0] == headers[1]  # the digest among them: it is the same file


def test_what_came_back_merges_on(tmp_path):
    model, data = make_model("llama_gqa"), make_batches(4)
    options = dict(observers=["percentile", "minmax"], **QUIET)
    a, b = record(model, data[:3], **options), record(model, data[3:], batch_indices=[3], **options)
    a2, b2 = (CalibrationRecord.load(r.save(tmp_path/n)) for r, n in ((a, "a"), (b, "b")))
    assert record_equal(b2 | a2, record(model, data, **options)) and record_equal(a2 | b, b | a2)
    key = ("model.layers.0.self_attn.q_proj", "input", "percentile")
    assert everything((a2 | b2).results[key]) == everything((a | b).results[key])


def test_empty_records_and_strange_names(tmp_path):
    empty = CalibrationRecord()
    assert record_equal(CalibrationRecord.load(empty.save(tmp_path/"empty")), empty)
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tensor = Linear(4, 4)
        def forward(self, x): return self.tensor(x)
    named = record(Named(), [torch.ones(2, 4)], **QUIET)
    assert named.types == {"tensor": "Linear"}
    assert record_equal(CalibrationRecord.load(named.save(tmp_path/"ein Name, länger 名.record")), named)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_and_shape(dtype, tmp_path):
    gen = torch.Generator().manual_seed(0)
    for shape in ((), (0,), (1,), (3, 0, 2), (7, 3)):
        raw = torch.randint(
            0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=gen, dtype=torch.uint8
        )
        x = raw.reshape(-1).view(dtype).reshape(shape)
        assert bits(unsqueeze(squeeze(x), dtype, x.numel()).reshape(shape)) == bits(x)
        path = write_tree(
            tmp_path/"t",
            dict(x=x, deep=[[{"tensor": x, "n": 1}], {"tensor": x}, {"tensor": {"tensor": [x]}}]),
            "t",
            1,
            {},
        )
        back = read_tree(path, "t", 1)
        assert bits(back["x"]) == bits(back["deep"][0][0]["tensor"]) == bits(back["deep"][1]["tensor"]) == bits(x)
        assert bits(back["deep"][2]["tensor"]["tensor"][0]) == bits(x)
    with pytest.raises(TypeError, match="a tensor of torch.complex64 cannot be saved"):
        write_tree(tmp_path/"c", dict(x=torch.zeros(1, dtype=torch.complex64)), "t", 1, {})
    with pytest.raises(ValueError): write_tree(tmp_path/"n", dict(x=float("nan")), "t", 1, {})
    assert sorted(os.listdir(tmp_path)) == ["t"]


def test_what_is_unpacked_is_bounded():
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(50_000_000))), dtype=torch.uint8)
    with pytest.raises(ValueError, match="does not hold 10 elements"): unsqueeze(bomb, torch.uint8, 10)
    for count in (-1, 7):
        with pytest.raises(ValueError): unsqueeze(squeeze(torch.zeros(6)), torch.float32, count)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unsqueeze(torch.zeros(9, dtype=torch.uint8), torch.uint8, 9)


def unpacked(path):
    "All that is in a file, uncompressed."
    with safe_open(path, "pt") as file:
        return b"".join(
            zlib.decompress(file.get_tensor(name).numpy().tobytes()) for name in file.keys()
        ) + json.dumps(file.metadata()).encode()


def test_without_text_there_is_no_text(tmp_path):
    model, tokenizer = load_tiny_llama()
    secret = "zebrafinch quokka"
    texts = [f"{secret} {t[:60]} {secret}" for t in calibration_texts()[:3]]
    options = dict(tokenizer=tokenizer, max_length=32, base_names="input", **QUIET)
    told, untold = record(model, texts, **options), record(model, texts, keep_text=False, **options)
    contents = [unpacked(r.save(tmp_path/n)) for r, n in ((told, "told"), (untold, "untold"))]
    about = [json.loads(safe_open(tmp_path/n, "pt").metadata()["about"]) for n in ("told", "untold")]
    words = {w.encode() for text in texts for w in text.replace('"', " ").split() if w.isalpha() and len(w) > 5}
    assert any(w in contents[0] for w in words)
    assert [a["has_text"] for a in about] == [True, False] == [told.has_text, untold.has_text]
    # what a record says without any text
    said = unpacked(record(model, [torch.arange(20)], base_names="input", **QUIET).save(tmp_path/"ids"))
    assert not [w for w in words if w in contents[1] and w not in said]


WRITER = """
import os, sys, signal
from pathlib import Path
import qcal_nb.recipes.files as files
from qcal_nb.records import CalibrationRecord
def dying(name, when):
    real = getattr(os, name)
    def die(*args):
        if when == "after": real(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, name, die)
def die_in(name, when, path):
    if name != "write": return dying(name, when)
    real = open
    class Half:
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *_): self.file.close()
        def write(self, data):
            self.file.write(data[:len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    files.open = lambda *a: Half(real(*a))
for case in zip(*[iter(sys.argv[1:])] * 3):
    if not (child := os.fork()):
        die_in(*case)
        CalibrationRecord(seconds=7.0).save(case[2])
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def test_killed_while_writing(small, tmp_path):
    "kill -9 in the middle of the write, before and after it reaches the disk, before and after the name changes."
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    cases = [("write", "x"), ("fsync", "before"), ("replace", "before"), ("replace", "after")]
    paths = [tmp_path/f"{name}-{when}"/"run.record" for name, when in cases]
    for path in paths:
        path.parent.mkdir()
        small.save(path)
    asked = [word for case, path in zip(cases, paths) for word in (*case, str(path))]
    done = subprocess.run([sys.executable, "-c", WRITER, *asked], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 4, done.stderr
    for (_, when), path in zip(cases, paths):
        found = CalibrationRecord.load(path)
        if when == "after": assert found.seconds == 7.0 and len(found) == 0
        else: assert record_equal(found, small)
        stray = [n for n in os.listdir(path.parent) if n != "run.record"]
        assert len(stray) <= 1 and all(n.startswith(".") and n.endswith(".part") for n in stray)
        assert record_equal(CalibrationRecord.load(small.save(path)), small)
        assert os.listdir(path.parent) == ["run.record"]  # the next writer has tidied up


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "interrupt"])
def test_a_full_disk(small, saved, monkeypatch, step):
    before = saved.read_bytes()
    error = KeyboardInterrupt() if step == "interrupt" else OSError(errno.ENOSPC, "No space left on device")
    def full(*_): raise error
    if step == "write":
        real = open
        class Full:
            def __init__(self, file): self.file = file
            def __enter__(self): return self
            def __exit__(self, *_): self.file.close()
            def write(self, data):
                self.file.write(data[:100])
                raise error
        monkeypatch.setattr(qcal_nb.recipes.files, "open", lambda *a: Full(real(*a)), raising=False)
    else: monkeypatch.setattr(os, "replace" if step == "replace" else "fsync", full)
    with pytest.raises((OSError, KeyboardInterrupt)): CalibrationRecord().save(saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_nowhere_to_write(small, tmp_path):
    with pytest.raises(FileNotFoundError): small.save(tmp_path/"no folder"/"run.record")
    with pytest.raises(IsADirectoryError): small.save(tmp_path)
    assert list(tmp_path.parent.glob(".*.part")) == list(tmp_path.glob(".*.part")) == []
    write_whole(tmp_path/"a", b"1")
    os.link(tmp_path/"a", tmp_path/"b")  # another name of the old file keeps the old file
    write_whole(tmp_path/"a", b"2")
    assert (tmp_path/"b").read_bytes() == b"1" and (tmp_path/"a").read_bytes() == b"2"
    shutil.rmtree(tmp_path)


def test_files_are_small_and_do_not_grow(tmp_path):
    model, tokenizer = load_tiny_llama()
    texts = calibration_texts()
    options = dict(tokenizer=tokenizer, max_length=128, observers=["static_minmax", "percentile", "minmax"], **QUIET)
    sizes = []
    for n in (16, 64):
        run = record(model, texts[:n], **options)
        sizes.append(run.save(tmp_path/f"{n}").stat().st_size)
        assert max(len(s.levels) for s in run.tensors.values()) == n.bit_length()
    assert run.batches == 64 and sizes[1] <= 600_000 and sizes[1] < 2 * sizes[0]


def test_a_record_of_thousands_of_batches_stays_small(tmp_path):
    torch.manual_seed(0)
    model, sizes = Sequential(Linear(16, 16)), []
    data = torch.randn(2000, 4, 16)
    for n in (500, 2000):
        sizes.append(record(model, list(data[:n]), base_names="input", **QUIET).save(tmp_path/f"{n}").stat().st_size)
    assert sizes[1] < 2 * sizes[0]
    start = time.process_time()
    CalibrationRecord.load(tmp_path/"2000")
    assert time.process_time() - start < 5


def test_from_tree_is_the_way_back_of_to_tree(small):
    import numpy as np
    def tensors(tree):
        if isinstance(tree, np.ndarray): return torch.from_numpy(np.array(tree))
        if isinstance(tree, dict): return {k: tensors(v) for k, v in tree.items()}
        return [tensors(v) for v in tree] if isinstance(tree, (list, tuple)) else tree
    assert record_equal(from_tree(tensors(to_tree(small))), small)
