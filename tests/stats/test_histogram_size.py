"""A histogram is small whatever it counts, and so is what counting takes."""
import pytest
import torch

from qcal_nb.stats import N_BUCKETS, Histogram, bucket_counts, is_bfloat16


def test_a_histogram_of_a_million_values_is_small():
    h = Histogram.of(torch.randn(2**20) * torch.rand(2**20))
    assert sum(a.nbytes for a in h.arrays().values()) < 100_000


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    "The largest tensor that operations return inside the block, in bytes of storage of its own."

    def __init__(self, *known):
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in [result] if isinstance(result, torch.Tensor) else []:
            if t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_temporaries_are_small_whatever_the_tensor(dtype):
    base = torch.randn(2048, 2048).to(dtype)
    for value in (base, base.T, base[:, ::2], base[::2].T):
        with Allocations(base) as seen: bucket_counts(value), is_bfloat16(value)
        assert 0 < seen.largest <= 2 * 2**20
    with Allocations() as seen: base * 2
    assert seen.largest == base.numel() * base.element_size()  # the measure sees what it should


def test_there_are_65536_buckets(): assert bucket_counts(torch.ones(0)).shape == (N_BUCKETS,) == (65536,)
