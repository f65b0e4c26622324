"""Observers that search: against brute force, their arguments, what they hear, and what they forget."""
import warnings
from copy import deepcopy

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, initialize_module_for_quantization
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from helpers import differences, fingerprint, make_batches, make_model, qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from qcal_nb.calibration import initialize_observer, observe, observer_of, update_qparams
from qcal_nb.lifecycle import LifecycleError, QuantizationModifier, State, phase_of, reset_quantization
from qcal_nb.stats import NonFiniteError
from qcal_nb.observers import Observer, find_observer, flatten_for_calibration
from qcal_nb.observers.imatrix import importance_range
from qcal_nb.observers.search.definition import mse_range
from qcal_nb.pipelines import calibrate
from qcal_nb.schemes import preset

INT4 = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="tensor")
CHANNEL = INT4.model_copy(update=dict(strategy="channel"))
SEARCHING = ["memoryless_mse", "mse", "nvfp4_expanded_mse", "imatrix_mse", "nvfp4_expanded_imatrix"]


# --- the search against its definition, written down a second time ---

def every_error(x, low, high, args, norm, importance=None):
    "Σ importance·|QDQ(x) − x|^norm per row of a (rows, columns) matrix, row by row; rounded as the definition says."
    errors = []
    for row in range(len(x)):
        scale, zero_point = calculate_qparams(low[row:row + 1], high[row:row + 1], args)
        token = args.model_copy(update=dict(strategy="token"))
        q = fake_quantize(x[row], scale, zero_point, token)
        if importance is not None: errors.append(((q.float() - x[row].float()).abs().pow(norm) * importance).sum())
        else:
            total = (q.to(x.dtype) - x[row]).abs().pow(norm).sum(dtype=torch.float32)
            errors.append(total if x.dtype == torch.float16 else total.to(x.dtype))
    return torch.stack(errors)


def brute_force(x, args, steps, grid, norm, patience, expand, importance=None):
    "All candidates first; then walk through them with the rules in plain Python numbers."
    low, high = x.amin(1) * expand, x.amax(1) * expand
    shrinks = [1 - i / grid for i in range(steps)]
    errors = [every_error(x, low * p, high * p, args, norm, importance).tolist() for p in shrinks]
    best, chosen, idle = [float("inf")] * len(x), [None] * len(x), 0
    largest = torch.finfo(torch.float32 if x.dtype == torch.float16 or importance is not None else x.dtype).max
    for i, row in enumerate(errors):
        better = [e < min(b, largest) for e, b in zip(row, best)]
        best = [e if ok else b for e, b, ok in zip(row, best, better)]
        chosen = [i if ok else c for c, ok in zip(chosen, better)]
        idle = 0 if any(better) else idle + 1
        if idle and idle >= patience: break
    p = [1.0 if c is None else shrinks[c] for c in chosen]
    return torch.stack([low[r] * p[r] for r in range(len(x))]), torch.stack([high[r] * p[r] for r in range(len(x))])


searches = st.fixed_dictionaries(dict(
    maxshrink=st.sampled_from([0.0, 0.2, 0.5, 0.95, 1.0]), grid=st.sampled_from([10.0, 20, 33.0]),
    norm=st.sampled_from([1.0, 2.0, 2.4, 3.0]),
    patience=st.sampled_from([0, 1, 3, 5, 1000]), expand=st.sampled_from([1.0, 1.8])))
matrices = dict(rows=st.integers(1, 4), columns=st.integers(1, 40), seed=st.integers(0, 2**16),
                dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), heavy=st.booleans())


def matrix(rows, columns, seed, dtype, heavy):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (x ** 3 if heavy else x).to(dtype)


@settings(max_examples=150, deadline=None)
@given(search=searches, bits=st.sampled_from([2, 4, 8]), symmetric=st.booleans(), **matrices)
def test_mse_finds_what_brute_force_finds(search, bits, symmetric, **shape):
    x, args = matrix(**shape), CHANNEL.model_copy(update=dict(num_bits=bits, symmetric=symmetric))
    steps = int(search["maxshrink"] * search["grid"])
    found = mse_range(flatten_for_calibration(x, "weight", args), args, **search)
    right = brute_force(x, args, steps, search["grid"], search["norm"], search["patience"], search["expand"])
    for a, b in zip(found, right): assert torch.equal(a.flatten(), b)


@settings(max_examples=100, deadline=None)
@given(search=searches, seed=st.integers(0, 2**16), **{k: v for k, v in matrices.items() if k != "seed"})
def test_imatrix_finds_what_brute_force_finds(search, seed, **shape):
    x = matrix(seed=seed, **shape)
    importance = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(seed + 1)) + 0.01
    steps = max(1, int(search["maxshrink"] * search["grid"])) + 1
    flat = flatten_for_calibration(importance.expand(len(x), -1), "weight", CHANNEL)
    found = importance_range(flatten_for_calibration(x, "weight", CHANNEL), CHANNEL, flat, **search)
    patience = search["patience"] or float("inf")  # 0 never gives up
    right = brute_force(x, CHANNEL, steps, search["grid"], search["norm"], patience, search["expand"], importance)
    for a, b in zip(found, right): assert torch.equal(a.flatten(), b)


def test_a_search_that_stops_too_early_is_noticed():
    "The comparison above can fail."
    x = matrix(4, 400, 0, torch.float32, False)
    found = mse_range(flatten_for_calibration(x, "weight", CHANNEL), CHANNEL, maxshrink=0.95, grid=20, patience=1000)[1]
    assert not torch.equal(found.flatten(), brute_force(x, CHANNEL, 3, 20, 2.4, 1000, 1.0)[1])


@settings(max_examples=60, deadline=None)
@given(constant=st.sampled_from([0.01, 0.3, 1.0]), seeds=st.lists(st.integers(0, 99), min_size=1, max_size=6))
def test_mse_is_the_moving_average_of_its_ranges(constant, seeds):
    observer = Observer.load_from_registry("mse", base_name="input", args=INT4, averaging_constant=constant)
    low = None
    high = None
    for seed in seeds:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        observer(x)
        one = mse_range(flatten_for_calibration(x, "input", INT4), INT4)
        low, high = (
            one
            if low is None or constant == 1
            else [a * (1 - constant) + b * constant for a, b in zip((low, high), one)]
        )
    assert torch.equal(observer.min_vals, low) and torch.equal(observer.max_vals, high)


# --- arguments ---

BAD = [
    ("grid", 0), ("grid", -1), ("grid", "20"), ("norm", 0), ("norm", float("inf")), ("norm", float("nan")),
    ("maxshrink", -0.1), ("maxshrink", 1.1), ("expand", 0.9), ("patience", -1), ("patience", True), ("patience", None)
]


@pytest.mark.parametrize("name", SEARCHING)
@pytest.mark.parametrize(("argument", "value"), BAD)
def test_numbers_that_make_no_sense(name, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}={value!r} must be a finite number "):
        find_observer(name)(base_name="weight", args=INT4, **{argument: value})
    args = INT4.model_copy(update=dict(observer=name, observer_kwargs={argument: value}))
    with pytest.raises(ValueError, match=f"{argument}={value!r} must be"):
        QuantizationModifier(config_groups={"g": dict(targets=["Linear"], weights=args)})


@pytest.mark.parametrize("name", SEARCHING)
def test_unknown_arguments_name_the_valid_ones(name):
    with pytest.raises(
        ValueError,
        match="observer argument shrink=1 is unknown to .*; valid arguments: maxshrink, patience, grid, norm, expand",
    ):
        find_observer(name)(base_name="weight", args=INT4, shrink=1)
    find_observer(name)(base_name="weight", args=INT4, triton_error_buffer=0.3)


def test_strict_is_a_bool():
    with pytest.raises(ValueError, match="strict='yes' must be True or False"):
        find_observer("imatrix_mse")(base_name="weight", args=INT4, strict="yes")


@pytest.mark.parametrize(("name", "values"), [
    ("mse", dict(maxshrink=0.20, patience=5, grid=100.0, norm=2.4, expand=1.0, averaging_constant=0.01)),
    ("nvfp4-expanded-MSE", dict(maxshrink=1 - 0.8 / 1.8, patience=1000, grid=200.0, norm=2.4, expand=1.8)),
    ("imatrix_mse", dict(maxshrink=0.95, patience=5, grid=20, norm=3.0, expand=1.0, strict=False)),
    (
        "nvfp4_expanded_imatrix",
        dict(maxshrink=1 - 0.8 / 1.8, patience=1000, grid=200, norm=2.4, expand=1.8, strict=False),
    ),
])
def test_defaults(name, values):
    assert find_observer(name)(base_name="weight", args=INT4).kwargs == values


def test_the_old_name_warns_once():
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(scheme="NVFP4A16", weight_observer="FourOverSix", ignore=["lm_head"])
    modifier.initialize_quantization(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        modifier.start_calibration(model)
    words = "observer 'fouroversix' is another name of 'nvfp4_expanded_mse'; it still works, the longer name is current"
    assert [str(w.message) for w in caught] == [words]
    modifier.on_end(State(model))
    found, other = qparams(model), make_model("llama_gqa")
    calibrate(
        other,
        None,
        QuantizationModifier(scheme="NVFP4A16", weight_observer="nvfp4_expanded_mse", ignore=["lm_head"]),
        progress=False,
    )
    assert all(torch.equal(value, qparams(other)[name]) for name, value in found.items())


@pytest.mark.parametrize(("asked", "taken"), [
    ("mse", "MemorylessMSEObserver"), ("Static-MinMax", "MemorylessMinMaxObserver"),
    ("minmax", "MemorylessMinMaxObserver")
])
def test_weight_observers_become_memoryless_with_one_warning(asked, taken):
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(scheme="W8A8", weight_observer=asked, ignore=["lm_head"])
    modifier.initialize_quantization(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        modifier.start_calibration(model)
    assert len(caught) == 1 and f"weight observer {asked!r} is replaced by" in str(caught[0].message)
    assert type(observer_of(model.model.layers[0].mlp.up_proj, "weight")).__name__ == taken


# --- imatrix: what it hears ---

def listening(strict=False, strategy="channel", **kwargs):
    "A Linear whose weight observer listens."
    args = INT4.model_copy(
        update=dict(strategy=strategy, observer="imatrix_mse", observer_kwargs=dict(strict=strict) | kwargs)
    )
    layer = torch.nn.Linear(8, 4, bias=False)
    torch.manual_seed(0)
    with torch.no_grad(): layer.weight.copy_(torch.randn(4, 8))
    scheme = preset("W8A8")
    scheme.weights = args
    initialize_module_for_quantization(layer, scheme)
    initialize_observer(layer, "weight")
    layer.quantization_enabled = False
    return layer, layer.weight_observer


@pytest.mark.parametrize(("prepare", "why"), [
    (lambda layer: None, "no data reached the module"),
    (lambda layer: layer(torch.zeros(3, 8)), "every input was zero"),
])
def test_without_importance_every_channel_counts_the_same(prepare, why):
    layer, observer = listening()
    prepare(layer)
    with pytest.warns(UserWarning, match=f"imatrix: {why}; every channel counts the same"): observe(layer, "weight")
    assert torch.equal(
        observer.max_vals,
        importance_range(flatten_for_calibration(layer.weight.detach(), "weight", CHANNEL), CHANNEL)[1],
    )
    layer, observer = listening(strict=True)
    prepare(layer)
    with pytest.raises(ValueError, match=f"imatrix with strict=True: {why}"): observe(layer, "weight")
    assert not observer.has_statistics


def test_importance_is_for_weights_and_fine_strategies():
    layer, _ = listening(strategy="tensor")
    layer(torch.randn(2, 8))
    with pytest.warns(UserWarning, match="strategy 'tensor' has none; use channel, group or tensor_group"):
        observe(layer, "weight")
    with pytest.warns(UserWarning, match="importance belongs to weights, not to base name 'input'"):
        find_observer("imatrix_mse")(base_name="input", args=INT4)(torch.randn(2, 8))


def test_policies_for_what_it_hears():
    bad = torch.ones(2, 8)
    bad[1, 3] = torch.inf
    layer, observer = listening()
    with pytest.raises(
        NonFiniteError, match=r"input \(for the weight\): 1 non-finite value, the first \(inf\) at position \(1, 3\)"
    ):
        layer(bad)
    assert observer.importance_sum is None
    observer.nonfinite = "skip"
    layer(torch.ones(2, 8)); layer(bad)
    assert observer.importance_sum.tolist() == [2.0] * 8 and observer.importance_count == 2
    assert observer.counts.skipped == 1
    observer.nonfinite = "record"
    layer(bad)
    assert observer.importance_sum.tolist() == [4, 4, 4, 3, 4, 4, 4, 4] and observer.counts.nonfinite == 2


def test_after_consumption_it_listens_anew():
    layer, observer = listening()
    layer(torch.ones(2, 8))
    observe(layer, "weight"); update_qparams(layer, "weight")
    assert observer.consumed and observer.importance_count == 2
    layer(torch.ones(5, 8))
    assert observer.importance_count == 5 and not observer.consumed


def test_it_leaves_no_hook_and_needs_data():
    model = make_model("llama_gqa")
    before = fingerprint(model)
    modifier = QuantizationModifier(scheme=dict(weights=CHANNEL), weight_observer="iMatrix-MSE", ignore=["lm_head"])
    assert modifier.requires_calibration_data
    with pytest.raises(ValueError, match="pipeline='datafree'"):
        calibrate(model, None, modifier, pipeline="datafree", progress=False)
    calibrate(model, make_batches(), modifier, progress=False)
    assert not any(m._forward_pre_hooks for m in model.modules())
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == []


def test_a_strict_observer_without_data_leaves_the_calibration_as_it_was():
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(config_groups={"g": dict(targets=["Linear"], weights=CHANNEL.model_copy(
        update=dict(observer="imatrix_mse", observer_kwargs=dict(strict=True))))}, ignore=["lm_head"])
    modifier.on_initialize(State(model)); modifier.on_start(State(model))
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj: imatrix with strict=True: no data"):
        modifier.on_end(State(model))
    assert phase_of(model) == "calibrating"
    assert all(v.isnan().all() for n, v in qparams(model).items() if n.endswith("scale"))
    with torch.no_grad():
        for batch in make_batches(): model(**batch)
    modifier.on_end(State(model))
    assert phase_of(model) == "calibrated"


def test_a_copied_model_listens_for_itself():
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(scheme=dict(weights=CHANNEL), weight_observer="imatrix_mse", ignore=["lm_head"])
    modifier.on_initialize(State(model)); modifier.on_start(State(model))
    twin = deepcopy(model)
    with torch.no_grad(): twin(**make_batches(1)[0])
    assert model.model.layers[0].mlp.up_proj.weight_observer.importance_sum is None
    assert twin.model.layers[0].mlp.up_proj.weight_observer.importance_count == 32


# --- tensor_group: partners are looked at on demand, and consumed together ---

@pytest.mark.parametrize("name", ["memoryless_mse", "nvfp4_expanded_mse", "imatrix_mse", "nvfp4_expanded_imatrix"])
def test_a_fused_group_shares_the_global_scale_of_its_ranges(name):
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(scheme="NVFP4A16", weight_observer=name, ignore=["lm_head"])
    modifier.on_initialize(State(model)); modifier.on_start(State(model))
    with torch.no_grad(): model(**make_batches(1)[0])
    attention = model.model.layers[0].self_attn
    q, k, v = (observer_of(getattr(attention, f"{n}_proj"), "weight") for n in "qkv")
    observe(attention.q_proj, "weight")
    assert not k.has_statistics
    shared = q.get_qparams()["global_scale"]
    assert k.has_statistics and v.has_statistics and torch.equal(shared, v.get_qparams()["global_scale"])
    absmax = max(max(o.max_vals.max(), -o.min_vals.min()) for o in (q, k, v))
    torch.testing.assert_close(shared, (448 * 6 / absmax).reshape(1))
    update_qparams(attention.q_proj, "weight")
    assert not q.consumed
    update_qparams([attention.k_proj, attention.v_proj], "weight")
    assert q.consumed and k.consumed and v.consumed
    with pytest.raises(LifecycleError): modifier.start_calibration(model)
