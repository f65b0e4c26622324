"""What flattening leaves has the shape of the parameter, for every strategy and shape."""
from collections import Counter

import torch
from compressed_tensors.quantization import QuantizationArgs, initialize_module_for_quantization
from hypothesis import given
from hypothesis import strategies as st

from qcal_nb.observers import Observer, flatten_for_calibration

WEIGHTS = {"tensor": {}, "channel": {}, "group": dict(group_size=4), "block": dict(block_structure=[3, 5]),
           "tensor_group": dict(group_size=4, num_bits=4, type="float", scale_dtype="torch.float8_e4m3fn")}


@given(st.sampled_from(sorted(WEIGHTS)), st.integers(1, 9), st.integers(1, 4))
def test_what_flatten_leaves_is_the_shape_of_the_parameter(strategy, rows, groups):
    layer = torch.nn.Linear(4 * groups, rows, bias=False)
    args = QuantizationArgs(**(dict(num_bits=8, strategy=strategy) | WEIGHTS[strategy]))
    from compressed_tensors.quantization import QuantizationScheme
    initialize_module_for_quantization(layer, QuantizationScheme(targets=["Linear"], weights=args))
    flat = flatten_for_calibration(layer.weight, "weight", args)
    scale = Observer.load_from_registry(
        "memoryless_minmax", base_name="weight", args=args
    )(layer.weight).get_qparams()["scale"]
    assert flat.shape[1:-1] == scale.shape == layer.weight_scale.shape
    if strategy != "block": assert Counter(flat.flatten().tolist()) == Counter(layer.weight.flatten().tolist())
    assert flat.shape[0] == 1
