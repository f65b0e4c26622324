"""Values that are not numbers are counted and never enter, wherever they stand."""
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcal_nb.observers import Observer
from qcal_nb.stats import measure
from qcal_nb.schemes import preset

INPUT = preset("INT8_STATIC").input_activations


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(width=32)).map(torch.from_numpy))
def test_nonfinite_values_are_counted_and_never_enter(x):
    stats, fine = measure(x), x[torch.isfinite(x)]
    assert (stats.nan, stats.inf, stats.count) == (int(x.isnan().sum()), int(x.isinf().sum()), fine.numel())
    observer = Observer.load_from_registry("static_minmax", base_name="input", args=INPUT)
    observer.nonfinite = "record"
    if fine.numel():
        observer(x)
        assert (observer.min_vals.item(), observer.max_vals.item()) == (fine.min().item(), fine.max().item())
