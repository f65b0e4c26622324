"""A damaged or forged file of a record is refused in words, and nothing of it is executed."""
import json
import os
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

import qcal_nb.records.files
from qcal_nb.records.calibration_record import FORMAT, VERSION, to_tree
from qcal_nb.records.files import squeeze, write_tree
from qcal_nb.records import CalibrationRecord, record_equal


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
    version = data.index(f'"version":"{VERSION}"'.encode()) + len(b'"version":"')
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
    for data in (
        b"", b"\0" * 8, b"\xff" * 100, b"PK\x03\x04", pickle.dumps(Evil()), b"#!/bin/sh\ntouch executed\n",
        os.urandom(4000)
    ):
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
        with pytest.raises(FileNotFoundError, match="there is no file .*(missing|below)"):
            CalibrationRecord.load(missing)


@pytest.mark.parametrize("version, words", [
    (str(VERSION + 1), "written by a newer qcal_nb.*upgrade"), ("999", "version 999"), ("0", "damaged"),
    ("-1", "damaged"),
    ("", "damaged"), ("one", "damaged"), ("1.5", "damaged"), ("\u00b2", "damaged")
])
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
    wrong = [
        None, -1, 3, 10**40, 1.5, "x", "1/0", [], [1, 2], {}, {"a": []}, True, torch.zeros(2),
        torch.zeros(0, dtype=torch.int64), [[1, [2]]], {"tensor": 3}
    ]
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
    arrays = {
        n: squeeze(t) for n, t in dict(pools or {}, tree=torch.tensor(list(tree_text), dtype=torch.uint8)).items()
    }
    facts = json.dumps(dict(
        counts=(
            dict({n: len(t) for n, t in (pools or {}).items()}, tree=len(tree_text), **{}) if counts is None else counts
        )
    ))
    header = dict(
        format=FORMAT, version=str(VERSION), about=facts, digest=qcal_nb.records.files._content_digest(arrays, facts)
    )
    path.write_bytes(save(arrays, header))
    return path


@pytest.mark.parametrize("text", [
    b"", b"{", b"nul", b"5", b"[]", b"NaN", b"[" * 100_000, b"\xff\xfe", b'{"tensor": []}',
    b'{"tensor": ["float32", 0, 1]}',
    b'{"tensor": [[], 0]}', b'{"tensor": ["p", 0, 99]}', b'{"tensor": ["p", "a"]}', b'{"tensor": ["p", 0, -1]}',
    b'{"tensor": [null, 3]}',
    b'{"tensor": ["p", 0, 99999999999999999999, 99999999999999999999]}', b'{"tensor": ["p", null, 1e400]}'])
def test_forged_trees(tmp_path, text):
    refused(forged(tmp_path/"forged", text, pools=dict(p=torch.zeros(4, dtype=torch.uint8))))


@pytest.mark.parametrize("counts", [
    [], {}, 3, None, {"tree": -1}, {"tree": 10**40}, {"tree": 1.5}, {"tree": "2"}, {"tree": None}, {"tree": 10**12}
])
def test_forged_counts(tmp_path, counts):
    refused(forged(tmp_path/"forged", b"{}", counts=counts if counts is not None else [None]))


def test_a_forged_header(tmp_path, saved):
    with safe_open(saved, "pt") as file: arrays, header = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()
    for change in (dict(digest=""), dict(about="{}"), dict(about="nonsense"), dict(digest="0" * 64)):
        save_file(arrays, saved, metadata=header | change)
        assert "is damaged" in refused(saved)
    for name in ("digest", "about", "version"):
        save_file(arrays, saved, metadata={k: v for k, v in header.items() if k != name})
        refused(saved)
    save_file(
        {n: t.view(torch.int8) for n, t in arrays.items()} | {"more": torch.ones(2, dtype=torch.bfloat16)},
        saved,
        metadata=header,
    )
    refused(saved)
    save_file({n: t for n, t in arrays.items() if n != "tree"}, saved, metadata=header)
    refused(saved)


# --- what has the right form and cannot be true ---


def of_tensor(tree, i=0): return tree["stats"][i]


def set_in(container, key, value):
    container[key] = value


NONSENSE = {
    "a negative count of calls": lambda t: set_in(of_tensor(t), "counts", [-1, 1, 0]),
    "a negative count of NaN": lambda t: set_in(of_tensor(t)["levels"][0], 5, -3),
    "the smallest above the largest": lambda t: of_tensor(t)["levels"][0].__setitem__(slice(1, 3), [2.0, -2.0]),
    "ends without values": lambda t: of_tensor(t)["levels"][0].__setitem__(
        slice(3, 5), [torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)]),
    "a level twice": lambda t: of_tensor(t)["levels"].append(of_tensor(t)["levels"][0]),
    "a level that no batch has": lambda t: set_in(of_tensor(t)["levels"][0], 0, -1),
    "a sum with an exponent": lambda t: set_in(of_tensor(t), "sums", ["1e999999999", "1"]),
    "a sum with too many digits": lambda t: set_in(of_tensor(t), "sums", ["1", "9" * 5000]),
    "a negative sum of squares": lambda t: set_in(of_tensor(t), "sums", ["1", "-1"]),
    "a negative shape": lambda t: set_in(of_tensor(t), "shapes", [[-1, 2]]),
    "a channel that is no number": lambda t: set_in(of_tensor(t), "channels", torch.tensor([torch.nan])),
    "a negative channel": lambda t: set_in(of_tensor(t), "channels", torch.tensor([-1.0])),
    "an infinite largest value": lambda t: set_in(of_tensor(t)["top"][0], 0, 1e400),
    "a negative position": lambda t: set_in(of_tensor(t)["top"][0], 2, [-1]),
    "a stride of zero": lambda t: set_in(of_tensor(t)["timeline"], 0, 0),
    "a tensor that is none": lambda t: set_in(t["tensors"][0], 2, -1),
    "a tensor twice": lambda t: t["tensors"].append(t["tensors"][0]),
    "a result twice": lambda t: t["conclusions"].append(t["conclusions"][0]),
    "a result that is none": lambda t: set_in(t["conclusions"][0], 3, 999),
    "arguments that are none": lambda t: set_in(t["found"][0], 2, -1),
    "a scale that is no number": lambda t: set_in(t["found"][0], 7, torch.tensor([torch.nan])),
    "a negative scale": lambda t: set_in(t["found"][0], 7, torch.tensor([-1.0])),
    "a range that begins above its end": lambda t: set_in(t["found"][0], 5, torch.tensor([1e30])),
    "a negative count of an observer": lambda t: set_in(t["found"][0][10], 0, -1),
    "spans out of order": lambda t: set_in(t, "spans", [[5, 6], [0, 1]]),
    "a negative span": lambda t: set_in(t, "spans", [[-2, 1]]),
    "seconds that are no number": lambda t: set_in(t, "seconds", -1.0),
    "negative tokens": lambda t: set_in(t, "level_tokens", [[0, -5]]),
    "a level of tokens twice": lambda t: set_in(t, "level_tokens", [[0, 5], [0, 5]]),
    "negative tokens of an expert": lambda t: set_in(t, "expert_tokens", {"e": -1}),
}


def as_lists(tree):
    "The tree with lists that can be changed."
    if isinstance(tree, dict): return {k: as_lists(v) for k, v in tree.items()}
    return [as_lists(v) for v in tree] if isinstance(tree, (list, tuple)) else tree


@pytest.mark.parametrize("forge", NONSENSE.values(), ids=NONSENSE)
def test_numbers_that_cannot_be_are_refused(small, tmp_path, forge):
    tree = as_lists(to_tree(small))
    assert record_equal(CalibrationRecord.load(rewritten(tmp_path/"right", tree)), small)
    forge(tree)
    try: path = rewritten(tmp_path/"wrong", tree)
    except ValueError: return  # JSON has no such number, so a file cannot either
    assert re.search("which cannot be|is damaged", refused(path))


def test_bombs_are_refused_before_they_are_unpacked(tmp_path):
    zeros = torch.zeros(1 << 30, dtype=torch.uint8)  # a gigabyte that packs into a megabyte
    path = forged(tmp_path/"zeros", b"{}", pools=dict(uint8=zeros))
    del zeros
    assert path.stat().st_size < 2_000_000 and "unpack to 1,073," in refused(path)
    pool = dict(float32=torch.zeros(1000))
    again = json.dumps([{"tensor": ["float32", 0, 1000]}] * 500).encode()
    assert "use more than the 1,000 values of float32" in refused(forged(tmp_path/"again", again, pools=pool))
    beyond = json.dumps([{"tensor": ["float32", 500, 501]}]).encode()
    assert "use more than the 1,000 values" in refused(forged(tmp_path/"beyond", beyond, pools=pool))
    assert "seconds appears twice" in refused(forged(tmp_path/"twice", b'{"seconds": 1, "seconds": 2}'))
    os.mkfifo(tmp_path/"pipe")
    assert "not a regular file" in refused(tmp_path/"pipe")
