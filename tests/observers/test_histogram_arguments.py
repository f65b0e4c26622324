"""What the observers with a histogram refuse, and values that are not numbers."""
import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from qcal_nb.stats import Histogram
from qcal_nb.observers import HistogramObserver, Observer
from qcal_nb.stats import NonFiniteError, current_batch
from tests.observers.histograms import ARGS, INT8, NAMES, heavy, observed

BAD_KWARGS = [
    ("percentile", dict(percentile=50), "percentile=50 must be a number in (50, 100]"),
    ("percentile", dict(percentile=100.1), "percentile=100.1"),
    ("percentile", dict(percentile=0.9999), "percentile=0.9999 must be a number in (50, 100]"),
    ("percentile", dict(percentile="99"), "percentile='99'"),
    ("percentile", dict(percentile=True), "percentile=True"),
    ("percentile", dict(percentile=math.nan), "percentile=nan"),
    ("percentile", dict(percentil=99), "percentil=99 is unknown to PercentileObserver; valid arguments: percentile"),
    (
        "entropy",
        dict(num_bins=128),
        "num_bins=128 must be an int of at least 129, more than the 128 levels of int8 symmetric",
    ),
    ("entropy", dict(num_bins=2048.0), "num_bins=2048.0 must be an int"),
    ("entropy", dict(num_bins=True), "num_bins=True"),
    ("entropy", dict(num_bins=None), "num_bins=None"),
    ("entropy", dict(bins=2048), "bins=2048 is unknown to EntropyObserver; valid arguments: num_bins"),
    ("histogram_mse", dict(grid=0), "grid=0 must be a finite number greater than 0"),
    ("histogram_mse", dict(grid=-1.0), "grid=-1.0"),
    ("histogram_mse", dict(norm=0), "norm=0 must be a finite number greater than 0"),
    ("histogram_mse", dict(norm=math.inf), "norm=inf"),
    ("histogram_mse", dict(norm=math.nan), "norm=nan"),
    ("histogram_mse", dict(maxshrink=1.1), "maxshrink=1.1 must be a finite number in [0, 1]"),
    ("histogram_mse", dict(maxshrink=-0.1), "maxshrink=-0.1"),
    ("histogram_mse", dict(expand=0.9), "expand=0.9 must be a finite number at least 1"),
    ("histogram_mse", dict(patience=-1), "patience=-1 must be a finite number at least 0"),
    ("histogram_mse", dict(patience="5"), "patience='5'"),
    ("histogram_mse", dict(averaging_constant=0.1), "valid arguments: maxshrink, patience, grid, norm, expand"),
]


@pytest.mark.parametrize("name, kwargs, words", BAD_KWARGS, ids=[f"{n} {k}" for n, k, _ in BAD_KWARGS])
def test_bad_arguments_are_refused_when_the_observer_is_made(name, kwargs, words):
    for make in (
        lambda: Observer.load_from_registry(name, base_name="input", args=INT8, **kwargs),
        lambda: Observer.load_from_registry(
            name, base_name="input", args=INT8.model_copy(update={"observer_kwargs": kwargs})
        ),
    ):
        with pytest.raises(ValueError) as error: make()
        assert words in str(error.value)


def test_good_arguments_at_the_ends_of_their_ranges():
    for name, kwargs in (
        ("percentile", dict(percentile=50.001)), ("percentile", dict(percentile=100)), ("entropy", dict(num_bins=129)),
        ("histogram_mse", dict(maxshrink=1, patience=0, grid=0.5, norm=0.1)),
        ("histogram_mse", dict(maxshrink=0, expand=1))
    ):
        assert observed(name, [heavy(100)], triton_error_buffer=0.3, **kwargs).get_qparams()["scale"].isfinite().all()


def test_bins_must_outnumber_the_levels_of_the_format():
    for args, least in (("int4", 9), ("int8 asymmetric", 257), ("fp8", 128)):
        observed("entropy", [], ARGS[args], num_bins=least)
        with pytest.raises(ValueError, match=f"at least {least}"):
            observed("entropy", [], ARGS[args], num_bins=least - 1)


OTHER = dict(
    channel={}, group=dict(group_size=8), token=dict(dynamic=True),
    tensor_group=dict(group_size=16, num_bits=4, type="float"), block=dict(block_structure=[8, 8]), attn_head={}
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", OTHER)
def test_only_per_tensor(name, strategy):
    args = QuantizationArgs(**(dict(num_bits=8, strategy=strategy) | OTHER[strategy]))
    with pytest.raises(ValueError, match=f"strategy='{strategy}'.* one histogram per tensor; use strategy 'tensor'"):
        Observer.load_from_registry(name, base_name="input", args=args)


DIRTY = torch.tensor([[1.0, math.nan, -2.0, math.inf, 0.5]])
CLEAN = torch.tensor([[1.0, -2.0, 0.5]])


@pytest.mark.parametrize("name", NAMES)
def test_nonfinite_values_raise_and_leave_the_statistics(name):
    observer = observed(name, [CLEAN])
    before = observer.get_statistics()
    with pytest.raises(NonFiniteError, match=r"2 non-finite values, the first \(nan\) at position \(0, 1\)"):
        observer(DIRTY)
    assert all(v is before[k] for k, v in observer.get_statistics().items())


@pytest.mark.parametrize("name", NAMES)
def test_nonfinite_elements_alone_leave_under_record(name):
    observer = Observer.load_from_registry(name, base_name="input", args=INT8)
    observer.nonfinite = "record"
    observer(DIRTY)(torch.full((1, 3), -math.inf))
    assert observer.histogram() == Histogram.of(CLEAN) and observer.counts.nonfinite == 5
    assert torch.equal(observer.get_qparams()["scale"], observed(name, [CLEAN]).get_qparams()["scale"])


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_with_nonfinite_values_leaves_under_skip(name):
    observer = Observer.load_from_registry(name, base_name="input", args=INT8)
    observer.nonfinite = "skip"
    for index, batch in enumerate([CLEAN, DIRTY, 2 * CLEAN]):
        token = current_batch.set(index)
        try: observer(batch)
        finally: current_batch.reset(token)
    assert observer.histogram() == Histogram.of(torch.cat([CLEAN, 2 * CLEAN])) and observer.counts.skipped == 1


def test_the_base_class_is_not_registered():
    assert "histogram" not in Observer.registered_names() and set(NAMES) <= set(Observer.registered_names())
    with pytest.raises(TypeError, match="abstract"): HistogramObserver("input", INT8)
