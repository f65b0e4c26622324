"""Fixtures that tests of this wing share."""
import pytest
from helpers import make_batches, make_model


@pytest.fixture
def llama(): return make_model("llama_gqa")


@pytest.fixture
def data(): return make_batches(2)


@pytest.fixture
def evals(): return make_batches(3, seed=5)
