"""Parity is claimed at one thread, see `one_thread` of the harness; the reference wants a tokenizer."""
import pytest
from harness import one_thread as at_one_thread

from qcal_nb.models import load_tiny_llama


@pytest.fixture(autouse=True)
def one_thread():
    with at_one_thread(): yield


@pytest.fixture(scope="session")
def tokenizer(): return load_tiny_llama()[1]
