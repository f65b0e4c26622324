"""Fixtures that several files of this wing use."""
import pytest
import torch
from helpers import make_batches
from torch.nn import Linear, Sequential

from qcal_nb.models import load_tiny_llama
from qcal_nb.records import record
from tests.records.samples import QUIET, mixture


@pytest.fixture(scope="session")
def tiny(): return load_tiny_llama()


@pytest.fixture(scope="session")
def batches_and_whole():
    "Batches of unequal shape with their record; every way to split them has to lead here."
    model = mixture()
    data = [*make_batches(2), *make_batches(3, shape=(1, 5), seed=2), *make_batches(1, shape=(3, 9), seed=3)]
    options = dict(
        observers=["static_minmax", "percentile", "mse", "minmax", "imatrix_mse"],
        base_names=["input", "weight", "output"], **QUIET
    )
    return model, data, options, record(model, data, **options)


@pytest.fixture(scope="session")
def small():
    torch.manual_seed(0)
    return record(Sequential(Linear(8, 8)), [torch.randn(3, 8)], observers=["minmax", "percentile"], **QUIET)


@pytest.fixture
def saved(small, tmp_path): return small.save(tmp_path/"small.record")
