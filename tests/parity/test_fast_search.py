"""The fast ways to a range, which large tensors take, on the whole matrix of architectures: tensors of any size are
sent there."""
import pytest
from harness import ARCHITECTURES, applies, measure

from qcal_nb.observers.search import best, kernel as kernels

pytestmark = [pytest.mark.parity, pytest.mark.slow]
SEARCHING = (
    "FP8 mse", "A mse, averaging_constant 0.3, grid 50", "W8 tensor asym mse, A static_minmax asym", "KV cache mse"
)
CELLS = [(a, c) for a in ARCHITECTURES for c in SEARCHING if applies(a, c)]


@pytest.mark.parametrize("architecture, configuration", CELLS, ids=[" | ".join(cell) for cell in CELLS])
def test_scales_are_those_of_the_reference(architecture, configuration, monkeypatch):
    ways = []
    def noted(way): return lambda *args: ways.append(way.__name__) or way(*args)
    for way in (best.counted_range, best.bounded_range): monkeypatch.setattr(best, way.__name__, noted(way))
    for module in (best, kernels): monkeypatch.setattr(module, "MANY", 1)
    cell = measure(architecture, configuration)
    assert cell.differ == [] and cell.scales > 0
    assert ways  # one of the fast ways was taken
