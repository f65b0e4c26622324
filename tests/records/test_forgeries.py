"""Whatever stands in a file: it is a record that every table can read, or a ValueError that names the file.

Property tests: bytes are damaged at random, and trees are forged at random places under a digest that is right.
"""
import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qcal_nb import analysis
from qcal_nb.records import CalibrationRecord, record_equal
from qcal_nb.records.calibration_record import FORMAT, VERSION, to_tree
from qcal_nb.records.files import write_tree

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

NUMBERS = st.one_of(
    st.integers(-3, 3), st.integers(-(1 << 70), 1 << 70), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1 << 31, 1 << 63, -(1 << 63), 1e308, -1e308, 5e-324, 0.5, -0.0])
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(
    ["1/3", "-1/2", "1e999", "nan", "0x10", "layers.0", "int8", "float32", "static_minmax", "input", "\x85", "\0"]))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner,
                                                                                         max_size=3), max_leaves=6)
ODD = st.sampled_from([0, -1, 1, 7, 1 << 40, math.nan, math.inf, -math.inf, 1e30, -1e-30])


def places_of(tree, place=()):
    yield place
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items: yield from places_of(value, (*place, key))


def as_lists(value):
    if isinstance(value, dict): return {k: as_lists(v) for k, v in value.items()}
    return [as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def at(tree, place):
    for key in place: tree = tree[key]
    return tree


def with_value(tree, place, value):
    if not place: return value
    tree = copy.deepcopy(tree)
    at(tree, place[:-1])[place[-1]] = value
    return tree


def read_or_refused(path: Path) -> None:
    "A ValueError that names the file, or a record of which everything can be asked."
    try: found = CalibrationRecord.load(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert record_equal(CalibrationRecord.load(found.save(path.with_suffix(".again"))), found)
        for table in (analysis.ranges, analysis.coverage, analysis.extremes): table(found)
        try: analysis.compare_observers(found)
        except ValueError as error: assert str(error).startswith("observer=")     # one that this process does not have
        assert all(map(str, analysis.findings(found)))


@pytest.fixture(scope="session")
def tree(small): return as_lists(to_tree(small))


@FEW
@given(data=st.data())
def test_any_value_at_any_place(tree, tmp_path_factory, data):
    places = sorted(places_of(tree), key=str)
    place = data.draw(st.sampled_from(places))
    forged = with_value(tree, place, data.draw(VALUES))
    path = tmp_path_factory.mktemp("forged")/"it.record"
    try: write_tree(path, forged, FORMAT, VERSION, {})
    except (ValueError, TypeError, AttributeError): assume(False)     # no file can hold it
    read_or_refused(path)


@FEW
@given(data=st.data())
def test_any_number_in_any_tensor(tree, tmp_path_factory, data):
    places = [p for p in places_of(tree) if isinstance(at(tree, p), torch.Tensor) and at(tree, p).numel()]
    place = data.draw(st.sampled_from(sorted(places, key=str)))
    old = at(tree, place)
    value = data.draw(ODD)
    assume(old.is_floating_point() or (isinstance(value, int) and abs(value) <= torch.iinfo(
        old.dtype if old.dtype != torch.bool else torch.uint8).max))
    new = old.clone().reshape(-1)
    new[data.draw(st.integers(0, new.numel() - 1))] = value
    path = write_tree(tmp_path_factory.mktemp("forged")/"it.record", with_value(tree, place, new.view(old.shape)),
                      FORMAT, VERSION, {})
    read_or_refused(path)


@FEW
@given(data=st.data())
def test_any_tensor_of_another_shape(tree, tmp_path_factory, data):
    places = [p for p in places_of(tree) if isinstance(at(tree, p), torch.Tensor)]
    place = data.draw(st.sampled_from(sorted(places, key=str)))
    old = at(tree, place)
    shape = data.draw(st.sampled_from([(0,), (1,), (2, 2), (old.numel() + 1,), (), (1, *old.shape)]))
    dtype = data.draw(st.sampled_from([old.dtype, torch.float64, torch.int64, torch.bool]))
    path = write_tree(tmp_path_factory.mktemp("forged")/"it.record",
                      with_value(tree, place, torch.ones(shape, dtype=dtype)), FORMAT, VERSION, {})
    read_or_refused(path)


@FEW
@given(data=st.data())
def test_any_bytes_cut_out_put_in_or_repeated(small, tmp_path_factory, data):
    path = small.save(tmp_path_factory.mktemp("damaged")/"it.record")
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 64)))
    put_in = data.draw(st.binary(max_size=64))
    damaged = content[:start] + put_in + content[end:]
    assume(damaged != content)
    path.write_bytes(damaged)
    with pytest.raises(ValueError) as error: CalibrationRecord.load(path)
    assert str(path) in str(error.value)
