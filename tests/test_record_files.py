"""Files of records: everything comes back, nothing that is damaged does, nothing is executed, and a crash while writing harms nobody."""
import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import make_batches, make_model
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch.nn import Linear, Sequential

import qcal_nb.record_files
from qcal_nb.calibration_record import FORMAT, VERSION, from_tree, to_tree
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.observers.base import Registry
from qcal_nb.record_files import read_tree, squeeze, unsqueeze, write_tree, write_whole
from qcal_nb.records import CalibrationRecord, record, record_equal, unequal_parts

QUIET = dict(progress=False)
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.float64,
          torch.float8_e4m3fn, torch.float8_e5m2]


def bits(t): return t if t is None else (t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def everything(c):
    tensors = [c.low, c.high, c.scale, c.zero_point, c.global_scale, *(c.statistics[name] for name in sorted(c.statistics))]
    last = replace(c.counts, last_batch=None)
    return [c.observer, c.base_name, c.args.model_dump(), dict(c.kwargs), sorted(c.statistics), c.reason, repr(last), *map(bits, tensors)]


@pytest.fixture(scope="module")
def run():
    "A record with everything in it: NaN, text, experts, all observers, three dtypes."
    model, (_, tokenizer) = make_model("mixtral", torch.bfloat16), load_tiny_llama()
    data = make_batches(2, shape=(1, 9))
    with torch.no_grad(): model.model.embed_tokens.weight[int(data[1]["input_ids"][0, 3]), 5] = float("nan")
    observers = [n for n in Registry.registered_names() if "nvfp4" not in n and "four" not in n and "mse" not in n]
    return record(model, data, scheme="FP8", observers=[*observers, ("percentile", {"percentile": 99.5}), "mse"], tokenizer=tokenizer,
                  base_names=["input", "output", "lm_head_output"], **QUIET)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return record(Sequential(Linear(8, 8)), [torch.randn(3, 8)], observers=["minmax", "percentile"], **QUIET)


@pytest.fixture
def saved(small, tmp_path): return small.save(tmp_path/"small.record")


# --- there and back ---

def test_everything_comes_back(run, tmp_path):
    again = CalibrationRecord.load(run.save(tmp_path/"run.record"))
    assert unequal_parts(again, run) == [] and record_equal(run, again)
    assert again.conclusions.keys() == run.conclusions.keys() and list(again.tensors) == list(run.tensors)
    for key, c in run.conclusions.items(): assert everything(again.conclusions[key]) == everything(c), key
    for key, s in run.tensors.items():
        assert (again[key].sum, again[key].sum_squares) == (s.sum, s.sum_squares)
        assert repr(again[key].first_nonfinite) == repr(s.first_nonfinite)
    assert any(s.nan for s in run.tensors.values()) and run.has_text and again.has_text and any(run.expert_tokens.values())
    for name in ("about", "types", "spans", "level_tokens", "expert_tokens", "seconds"): assert getattr(again, name) == getattr(run, name), name
    def shared(r): return [[k for k in r.tensors if r.tensors[k] is s] for s in {id(s): s for s in r.tensors.values()}.values()]
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
    assert everything((a2 | b2).conclusions[key]) == everything((a | b).conclusions[key])


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
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=gen, dtype=torch.uint8)
        x = raw.reshape(-1).view(dtype).reshape(shape)
        assert bits(unsqueeze(squeeze(x), dtype, x.numel()).reshape(shape)) == bits(x)
        path = write_tree(tmp_path/"t", dict(x=x, deep=[[{"tensor": x, "n": 1}], {"tensor": x}, {"tensor": {"tensor": [x]}}]), "t", 1, {})
        back = read_tree(path, "t", 1)
        assert bits(back["x"]) == bits(back["deep"][0][0]["tensor"]) == bits(back["deep"][1]["tensor"]) == bits(x)
        assert bits(back["deep"][2]["tensor"]["tensor"][0]) == bits(x)
    with pytest.raises(TypeError, match="a tensor of torch.complex64 cannot be saved"):
        write_tree(tmp_path/"c", dict(x=torch.zeros(1, dtype=torch.complex64)), "t", 1, {})
    with pytest.raises(ValueError): write_tree(tmp_path/"n", dict(x=float("nan")), "t", 1, {})
    assert sorted(os.listdir(tmp_path)) == ["t"]


def test_what_is_unpacked_is_bounded():
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(50_000_000))), dtype=torch.uint8)
    with pytest.raises(ValueError, match="another number of elements than 10"): unsqueeze(bomb, torch.uint8, 10)
    for count in (-1, 7):
        with pytest.raises(ValueError): unsqueeze(squeeze(torch.zeros(6)), torch.float32, count)
    with pytest.raises(ValueError, match="cannot be unpacked"): unsqueeze(torch.zeros(9, dtype=torch.uint8), torch.uint8, 9)


# --- text ---

def unpacked(path):
    "All that is in a file, uncompressed."
    with safe_open(path, "pt") as file:
        return b"".join(zlib.decompress(file.get_tensor(name).numpy().tobytes()) for name in file.keys()) + json.dumps(file.metadata()).encode()


def test_without_text_there_is_no_text(tmp_path):
    model, tokenizer = load_tiny_llama()
    secret = "zebrafinch quokka"
    texts = [f"{secret} {t[:60]} {secret}" for t in calibration_texts()[:3]]
    options = dict(tokenizer=tokenizer, max_length=32, base_names="input", **QUIET)
    told, untold = record(model, texts, **options), record(model, texts, keep_text=False, **options)
    contents = [unpacked(r.save(tmp_path/n)) for r, n in ((told, "told"), (untold, "untold"))]
    about = [json.loads(safe_open(tmp_path/n, "pt").metadata()["about"]) for n in ("told", "untold")]
    words = {w.encode() for text in texts for w in text.replace('"', " ").split() if w.isalpha() and len(w) > 5}
    assert any(w in contents[0] for w in words) and [a["has_text"] for a in about] == [True, False] == [told.has_text, untold.has_text]
    said = unpacked(record(model, [torch.arange(20)], base_names="input", **QUIET).save(tmp_path/"ids"))  # what a record says without any text
    assert not [w for w in words if w in contents[1] and w not in said]


# --- damage ---

def refused(path):
    "Loading ends with a ValueError that names the file; returns what it says."
    with pytest.raises(ValueError) as error: CalibrationRecord.load(path)
    assert str(path) in str(error.value) and len(str(error.value)) > len(str(path)) + 10
    return str(error.value)


def test_truncated_anywhere(saved):
    data = saved.read_bytes()
    for end in [*range(0, len(data), 64), len(data) - 1]:
        saved.write_bytes(data[:end])
        refused(saved)
    saved.write_bytes(data + b"\0")
    refused(saved)


def test_any_flipped_bit(saved):
    data, rng = saved.read_bytes(), random.Random(0)
    header = int.from_bytes(data[:8], "little") + 8
    places = [*rng.sample(range(header * 8), 150), *rng.sample(range(header * 8, len(data) * 8), 150)]
    version = data.index(b'"version":"1"') + len(b'"version":"')
    for place in [*places, *range(version * 8, version * 8 + 8)]:
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        saved.write_bytes(broken)
        refused(saved)


class Evil:
    def __reduce__(self): return Path.touch, (Path("executed"),)


def test_what_is_no_record(tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    def with_bytes(data):
        path = tmp_path/"other"
        path.write_bytes(data)
        return refused(path)
    for data in (b"", b"\0" * 8, b"\xff" * 100, b"PK\x03\x04", pickle.dumps(Evil()), b"#!/bin/sh\ntouch executed\n", os.urandom(4000)):
        assert "cannot be read: it is damaged or truncated, or was never a qcal_nb.record file" in with_bytes(data)
    torch.save(Evil(), tmp_path/"pickled")
    refused(tmp_path/"pickled")
    assert not (tmp_path/"executed").exists()
    save_file({"weight": torch.ones(3)}, tmp_path/"foreign")
    assert "is not a qcal_nb.record file; its format is 'not named'" in refused(tmp_path/"foreign")
    save_file({"weight": torch.ones(3)}, tmp_path/"pt", metadata={"format": "pt"})
    assert "its format is 'pt'" in refused(tmp_path/"pt")
    assert "is a folder" in refused(tmp_path)
    for missing in (tmp_path/"missing", saved/"below", str(tmp_path/"missing")):
        with pytest.raises(FileNotFoundError, match="there is no file .*(missing|below)"): CalibrationRecord.load(missing)


@pytest.mark.parametrize("version, words", [("2", "written by a newer qcal_nb.*upgrade"), ("999", "version 999"), ("0", "damaged"), ("-1", "damaged"),
                                            ("", "damaged"), ("one", "damaged"), ("1.5", "damaged"), ("\u00b2", "damaged")])
def test_another_version(saved, version, words):
    with safe_open(saved, "pt") as file: arrays, header = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()
    save_file(arrays, saved, metadata=header | dict(version=version))
    assert re.search(words, refused(saved))


def rewritten(path, tree):
    "A file whose digest is right, with another tree in it."
    return write_tree(path, tree, FORMAT, VERSION, {})


def nodes(tree, place=()):
    "Every place in a tree."
    yield place
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items: yield from nodes(value, (*place, key))


def changed(tree, place, new):
    "The tree with something else at a place."
    if not place: return new
    key, *rest = place
    if isinstance(tree, dict): return {k: changed(v, rest, new) if k == key else v for k, v in tree.items()}
    return [changed(v, rest, new) if i == key else v for i, v in enumerate(tree)]


def test_a_valid_digest_with_a_wrong_structure(small, tmp_path):
    "Anything at any place: a record, or a ValueError that names the file. Never another error."
    tree, rng, outcomes = to_tree(small), random.Random(0), []
    wrong = [None, -1, 3, 10**40, 1.5, "x", "1/0", [], [1, 2], {}, {"a": []}, True, torch.zeros(2), torch.zeros(0, dtype=torch.int64),
             [[1, [2]]], {"tensor": 3}]
    places = list(nodes(tree))
    for place in [(), *((k,) for k in tree), *rng.sample(places, 150)]:
        for new in rng.sample(wrong, 4):
            path = rewritten(tmp_path/"wrong", changed(tree, place, new))
            try: outcomes.append(isinstance(CalibrationRecord.load(path), CalibrationRecord))
            except ValueError as error:
                assert str(path) in str(error) and "is damaged" in str(error)
                outcomes.append(False)
    assert outcomes.count(False) > 0.75 * len(outcomes)
    assert record_equal(CalibrationRecord.load(rewritten(tmp_path/"right", tree)), small)


def forged(path, tree_text, counts=None, pools=None):
    "A file with any text as its tree and any counts, its digest right."
    arrays = {n: squeeze(t) for n, t in dict(pools or {}, tree=torch.tensor(list(tree_text), dtype=torch.uint8)).items()}
    facts = json.dumps(dict(counts=dict({n: len(t) for n, t in (pools or {}).items()}, tree=len(tree_text), **{}) if counts is None else counts))
    header = dict(format=FORMAT, version=str(VERSION), about=facts, digest=qcal_nb.record_files._digest(arrays, facts))
    path.write_bytes(save(arrays, header))
    return path


@pytest.mark.parametrize("text", [
    b"", b"{", b"nul", b"5", b"[]", b"NaN", b"[" * 100_000, b"\xff\xfe", b'{"tensor": []}', b'{"tensor": ["float32", 0, 1]}',
    b'{"tensor": [[], 0]}', b'{"tensor": ["p", 0, 99]}', b'{"tensor": ["p", "a"]}', b'{"tensor": ["p", 0, -1]}', b'{"tensor": [null, 3]}',
    b'{"tensor": ["p", 0, 99999999999999999999, 99999999999999999999]}', b'{"tensor": ["p", null, 1e400]}'])
def test_forged_trees(tmp_path, text): refused(forged(tmp_path/"forged", text, pools=dict(p=torch.zeros(4, dtype=torch.uint8))))


@pytest.mark.parametrize("counts", [[], {}, 3, None, {"tree": -1}, {"tree": 10**40}, {"tree": 1.5}, {"tree": "2"}, {"tree": None}, {"tree": 10**12}])
def test_forged_counts(tmp_path, counts): refused(forged(tmp_path/"forged", b"{}", counts=counts if counts is not None else [None]))


def test_a_forged_header(tmp_path, saved):
    with safe_open(saved, "pt") as file: arrays, header = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()
    for change in (dict(digest=""), dict(about="{}"), dict(about="nonsense"), dict(digest="0" * 64)):
        save_file(arrays, saved, metadata=header | change)
        assert "is damaged" in refused(saved)
    for name in ("digest", "about", "version"):
        save_file(arrays, saved, metadata={k: v for k, v in header.items() if k != name})
        refused(saved)
    save_file({n: t.view(torch.int8) for n, t in arrays.items()} | {"more": torch.ones(2, dtype=torch.bfloat16)}, saved, metadata=header)
    refused(saved)
    save_file({n: t for n, t in arrays.items() if n != "tree"}, saved, metadata=header)
    refused(saved)


# --- writing ---

WRITER = """
import os, sys, signal
from pathlib import Path
import qcal_nb.record_files as files
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
    done = subprocess.run([sys.executable, "-c", WRITER, *asked], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 4, done.stderr
    for (_, when), path in zip(cases, paths):
        found = CalibrationRecord.load(path)
        if when == "after": assert found.seconds == 7.0 and len(found) == 0
        else: assert record_equal(found, small)
        stray = [n for n in os.listdir(path.parent) if n != "run.record"]
        assert len(stray) <= 1 and all(n.startswith(".") and n.endswith(".part") for n in stray)
        assert record_equal(CalibrationRecord.load(small.save(path)), small)


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
        monkeypatch.setattr(qcal_nb.record_files, "open", lambda *a: Full(real(*a)), raising=False)
    else: monkeypatch.setattr(os, "replace" if step == "replace" else "fsync", full)
    with pytest.raises((OSError, KeyboardInterrupt)): CalibrationRecord().save(saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_nowhere_to_write(small, tmp_path):
    with pytest.raises(FileNotFoundError): small.save(tmp_path/"no folder"/"run.record")
    with pytest.raises(IsADirectoryError): small.save(tmp_path)
    assert list(tmp_path.parent.glob(f".{tmp_path.name}*.part")) == list(tmp_path.glob("*.part")) == []
    write_whole(tmp_path/"a", b"1")
    os.link(tmp_path/"a", tmp_path/"b")  # another name of the old file keeps the old file
    write_whole(tmp_path/"a", b"2")
    assert (tmp_path/"b").read_bytes() == b"1" and (tmp_path/"a").read_bytes() == b"2"
    shutil.rmtree(tmp_path)


# --- size ---

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
    for n in (500, 2000): sizes.append(record(model, list(data[:n]), base_names="input", **QUIET).save(tmp_path/f"{n}").stat().st_size)
    assert sizes[1] < 2 * sizes[0]
    start = time.perf_counter()
    CalibrationRecord.load(tmp_path/"2000")
    assert time.perf_counter() - start < 5


def test_from_tree_is_the_way_back_of_to_tree(small):
    import numpy as np
    def tensors(tree):
        if isinstance(tree, np.ndarray): return torch.from_numpy(np.array(tree))
        if isinstance(tree, dict): return {k: tensors(v) for k, v in tree.items()}
        return [tensors(v) for v in tree] if isinstance(tree, (list, tuple)) else tree
    assert record_equal(from_tree(tensors(to_tree(small))), small)
