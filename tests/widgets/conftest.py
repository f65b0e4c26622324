"""Fixtures that tests of this wing share."""
import pytest
from helpers import make_batches, make_model

from qcal_nb.session import Session


@pytest.fixture
def session(): return Session(make_model("llama_gqa"), make_batches(4), scheme="FP8")
