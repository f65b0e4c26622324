"""What several tests of records need: small models, data, statistics as something to compare."""
import math

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
)

from qcal_nb.stats import TensorStats

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
QUIET = dict(progress=False)
NARROW = dict(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64
)


def bits(value):
    "A tensor as something to compare bit for bit."
    return value if value is None else (
        value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    )


def concluded_bits(c):
    tensors = [
        c.low, c.high, c.scale, c.zero_point, c.global_scale, *(c.statistics[name] for name in sorted(c.statistics))
    ]
    return [c.observer, c.reason, sorted(c.statistics), *map(bits, tensors)]


def exact(s: TensorStats):
    "All of a tensor's statistics, sums as the fractions that they are."
    return (
        s.sum, s.sum_squares, dict(s.levels), repr(s.first_nonfinite), s.dtypes, s.shapes, s.channels.tobytes(),
        s.channels.dtype, s.top, s.timeline, s.calls, s.batches, s.skipped, repr(s.mean), repr(s.std), s.numel
    )


def merged(parts, rng):
    "Parts put together in a random order and grouping."
    parts = list(parts)
    while len(parts) > 1:
        a, b = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        parts.append(a | b)
    return parts[0]


SPECIAL = [
    math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 6e-8, 3.0, -3.0, 1 + 2**-40, 1e300, -1e-60, 65504.0, 3.4e38
]


def tensor_of(rng, channels):
    "A small tensor of a random dtype and shape, with everything that is awkward."
    dtype, leading = rng.choice(DTYPES), rng.choice([(), (1,), (2, 3), (1, 5), (3, 1, 2)])
    kind, count = rng.choice(["normal", "normal", "constant", "few", "zeros", "special"]), math.prod(leading) * channels
    if kind == "normal": values = [rng.gauss(0, 1) * rng.choice([1, 1, 1e3]) for _ in range(count)]
    elif kind == "constant": values = [rng.choice([0.1, -7.0, 1e-3])] * count
    elif kind == "few": values = [rng.choice([-2.0, 2.0, 1.0]) for _ in range(count)]
    elif kind == "zeros": values = [rng.choice([0.0, -0.0]) for _ in range(count)]
    else: values = [rng.choice(SPECIAL) if rng.random() < 0.4 else rng.gauss(0, 1) for _ in range(count)]
    return torch.tensor(values, dtype=torch.float64).to(dtype).reshape(*leading, channels)


def mixture(seed=0):
    torch.manual_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(**NARROW, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    ).eval()


OPTIONS = dict(observers=["static_minmax", "minmax", "mse", "percentile", "imatrix_mse"], scheme="FP8", **QUIET)
