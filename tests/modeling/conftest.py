"""Fixtures that several files of this wing use."""
import pytest
import torch


@pytest.fixture
def one_thread():
    "Bits of sums depend on the number of threads."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
