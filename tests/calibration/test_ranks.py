"""Ranks are real torchrun processes with unequal data. What they do is in ranks/cases.py; what must come of it is here.

One launch runs many cases, also those that fail: after an error that all ranks heard of, they must still be in step.
"""
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from qcal_nb.calibration import observer_of
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.observers import Observer, fuse
from qcal_nb.pipelines import calibrate
from qcal_nb.calibration import RankError, differing_qparams, observe_weights, rank_and_size, sync_statistics, together
from qcal_nb.calibration.ranks import agree, split_weights
from qcal_nb.schemes import preset
from tests.ranks.launching import CASES, good, launch

EXACT = [
    "static", "w4a16", "nvfp4a16", "nvfp4", "every_layer_by_itself", "sequential", "sequential_quantized", "searched",
    "counted", "cache", "experts"
]
MODEL = [*EXACT, "minmax", "averages", "importance"]
SMALL = [
    "branches", "branches_minmax", "refused_end", "bad_batch", "no_data", "bad_weight", "another_scheme",
    "another_model", "another_shape", "another_weight", "another_step", "nested", "local_observers", "consumed",
    "weights_by_hand"
]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What two ranks return; the first has three of the embedded model's texts, the second has one."
    return good(tmp_path_factory.mktemp("two"), 2, MODEL + SMALL)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "What one process returns that has all of the data."
    return good(tmp_path_factory.mktemp("one"), 1, [*EXACT, "importance", "branches", "only_the_second"])[0]


def same(a: dict, b: dict) -> bool:
    "Bit for bit, NaN (a scale that was never computed) included."
    def bits(t): return t.contiguous().reshape(-1).view(torch.uint8)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(bits(a[k]), bits(b[k])) for k in a)


# --- the embedded model ---

@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT)
def test_two_ranks_find_what_one_process_finds(one, two, case):
    assert len(one[case]["scales"]) >= 28
    for rank in two:
        assert same(rank[case]["scales"], one[case]["scales"])
        assert rank[case]["differing"] == []


@pytest.mark.slow
def test_importance_is_added_up(one, two):
    """Sums in float32 round differently in another order, so that a range may end one candidate further; both ranks
    agree to the bit."""
    found, right = two[0]["importance"]["scales"], one["importance"]["scales"]
    assert same(found, two[1]["importance"]["scales"]) and found.keys() == right.keys()
    equal = torch.cat([(found[n] == right[n]).flatten() for n in right if n.endswith("weight_scale")])
    assert equal.float().mean() > 0.99


@pytest.mark.slow
def test_an_expert_that_one_rank_saw_has_its_scale_on_both(one, two):
    first, second = (rank["experts"]["seen"] for rank in two)
    assert first - second and first | second == one["experts"]["seen"]


@pytest.mark.slow
def test_every_layer_by_itself_is_the_whole_model_at_once(two):
    assert same(two[0]["every_layer_by_itself"]["scales"], two[0]["nvfp4"]["scales"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["static", "w4a16", "nvfp4a16"])
def test_each_weight_was_searched_on_one_rank(one, two, case):
    first, second = (set(rank[case]["looked"]) for rank in two)
    assert first | second == set(one[case]["looked"]) and not first & second
    assert len(first) > 5 and len(second) > 5


@pytest.mark.slow
def test_fused_layers_were_searched_on_one_rank(two):
    first = set(two[0]["nvfp4a16"]["looked"])
    for i in range(4):
        attention = {f"model.layers.{i}.self_attn.{n}_proj" for n in "qkv"}
        mlp = {f"model.layers.{i}.mlp.{n}_proj" for n in ("gate", "up")}
        assert all(group <= first or not group & first for group in (attention, mlp))


@pytest.mark.slow
def test_moving_averages_become_their_plain_mean(two):
    ranges = [rank["averages"] for rank in two]
    args, scales = preset("INT8_STATIC").input_activations, two[0]["minmax"]["scales"]
    assert len(ranges[0]) == 28 and same(scales, two[1]["minmax"]["scales"])
    for name in ranges[0]:
        low, high = ((ranges[0][name] + ranges[1][name]) / 2).split(1)
        expected, _ = calculate_qparams(low, high, args)
        assert torch.equal(scales[f"{name}.input_scale"], expected), name
    assert any(not torch.equal(ranges[0][n], ranges[1][n]) for n in ranges[0])


# --- branches ---

@pytest.mark.slow
def test_a_branch_that_ran_on_one_rank_has_its_scale_on_both(one, two):
    assert same(two[0]["branches"]["scales"], one["branches"]["scales"])
    assert same(two[1]["branches"]["scales"], one["branches"]["scales"])
    assert two[0]["branches"]["differing"] == two[1]["branches"]["differing"] == []
    for rank in two:
        mean, seen = rank["branches_minmax"]["scales"], one["only_the_second"]
        assert torch.equal(mean["second.input_scale"], seen["second.input_scale"])         # not drawn towards zero
        # nor paired with another tensor
        assert not torch.equal(mean["last.input_scale"], seen["last.input_scale"])


@pytest.mark.slow
def test_what_no_rank_saw_is_refused_on_all_and_left_out_on_all(two):
    for rank in two:
        for found in (rank["branches"], rank["branches_minmax"]):
            assert found["refused"].startswith("ValueError: 1 scale is not computed: never.input.")
            assert found["phase"] == "calibrating"
            assert found["uncovered"] == ["never.input"] and found["scales"]["never.input_scale"].isnan().all()
            assert found["enabled"] == dict(both=True, second=True, never=False, last=True)


@pytest.mark.slow
def test_a_refused_end_leaves_each_rank_its_own_statistics(two):
    for rank in two:
        found = rank["refused_end"]
        assert "second.input" in found["refused"] and found["kept"] and found["weights"] == [False] * 3
        assert not any(s.isnan().any() for s in found["scales"].values()) and found["differing"] == []
    assert same(two[0]["refused_end"]["scales"], two[1]["refused_end"]["scales"])


# --- failures ---

@pytest.mark.slow
def test_a_bad_batch_on_one_rank_stops_both_and_both_can_go_on(two):
    assert two[1]["bad_batch"]["error"].startswith("ValueError: data: input_ids go from 99999")
    assert two[0]["bad_batch"]["error"] == f"RankError: rank 1 failed: {two[1]['bad_batch']['error']}"
    for rank in two:
        found = rank["bad_batch"]
        assert found["seconds"] < 20 and found["phase"] == "calibrating" and found["again"] == "calibrated"
        assert found["differing"] == []


@pytest.mark.slow
def test_a_rank_without_data_stops_both(two):
    assert two[0]["no_data"].startswith("RankError: rank 1 failed: ValueError: data is empty")
    assert two[1]["no_data"].startswith("ValueError: data is empty")


@pytest.mark.slow
def test_a_weight_that_its_owner_refuses_stops_both_and_nothing_is_written(two):
    assert two[1]["bad_weight"]["error"].startswith("NonFiniteError: 1, weight: 1 non-finite value")
    assert two[0]["bad_weight"]["error"].startswith("RankError: rank 1 failed: NonFiniteError: 1, weight")
    for rank in two:
        found = rank["bad_weight"]
        assert found["own"] == [False, False] and found["unset"] == [True, True] and found["phase"] == "calibrating"


@pytest.mark.slow
@pytest.mark.parametrize("case, words", [
    (
        "another_scheme",
        (
            "where rank 0 has '0.input: StaticMinMaxObserver, float8 tensor' rank 1 has '0.input: MinMaxObserver, "
            "int8 tensor"
        ),
    ),
    (
        "another_model",
        "where rank 0 has '2.input: StaticMinMaxObserver, float8 tensor' rank 1 has 'nothing' (in all 6 and 4)",
    ),
    ("another_shape", "where rank 0 has '0.weight: MemorylessMinMaxObserver, int8 channel, (8, 8), bits "),
    ("another_step", "rank 0 is about to combine the statistics of observers, rank 1 to go home"),
])
def test_ranks_that_do_not_match_are_refused_with_words(two, case, words):
    for rank in two: assert rank[case].startswith("RankError: ") and words in rank[case]


@pytest.mark.slow
def test_ranks_whose_weights_differ_are_refused_and_no_scale_is_written(two):
    for rank in two:
        found = rank["another_weight"]
        assert found["unset"] == [True, True] and found["error"].startswith("RankError: the ranks are about to search")
        assert "where rank 0 has '0.weight: MemorylessMinMaxObserver, int8 channel, (16, 8), bits " in found["error"]


@pytest.mark.slow
def test_an_error_is_told_once_whatever_the_others_were_doing(two):
    assert two[0]["nested"] == ["RankError: rank 1 failed: KeyError: 'lost'"] * 2
    assert two[1]["nested"] == ["KeyError: 'lost'"] * 2


@pytest.mark.slow
def test_memoryless_activations_are_announced(two):
    for rank in two:
        assert sum("keeps nothing that ranks could combine" in w for w in rank["local_observers"]["warnings"]) == 1
        assert rank["local_observers"]["differing"] == ["0.input_scale"]


# --- statistics ---

@pytest.mark.slow
def test_statistics_of_any_kind_follow_plain_arithmetic(tmp_path, monkeypatch):
    "Three ranks, sixty observers, each known to some of them: compared with Python's own min, max and sum."
    results = [r["statistics"] for r in good(tmp_path, 3, ["statistics"])]
    monkeypatch.syspath_prepend(CASES.parent)
    import statistics_cases as cases
    games, counts = [cases.drawn(r) for r in range(3)], set()
    for i in range(60):
        known = [game[i][1] for game in games if game[i][1] is not None]
        counts.add(len(known))
        for place, op in enumerate(cases.OPS[games[0][i][0]]):
            values = [pair[place] for pair in known]
            for rank in results:
                found = rank["after"][i][place]
                assert (found is None) == (not values)
                if values: check(found, values, op)
            if values: assert all(torch.equal(results[0]["after"][i][place], r["after"][i][place]) for r in results)
    assert counts == {0, 1, 2, 3}
    assert all(r["untouched"] and r["twice_is_once"] and r["own_storage"] for r in results)


def check(found: torch.Tensor, values: list[torch.Tensor], op) -> None:
    "One statistic over ranks is what plain arithmetic says; what is exact, to the bit."
    stack = torch.stack(values)
    assert found.dtype == values[0].dtype and found.shape == values[0].shape
    if op == dist.ReduceOp.MIN: assert torch.equal(found, stack.amin(0))
    elif op == dist.ReduceOp.MAX: assert torch.equal(found, stack.amax(0))
    elif not found.is_floating_point(): assert torch.equal(found, stack.sum(0))
    else:
        wanted = stack.double().sum(0) / (len(values) if op == dist.ReduceOp.AVG else 1)
        # in at least fp32, and rounded once
        added = 1e-15 if found.dtype == torch.float64 else 3e-7
        allowed = torch.finfo(found.dtype).eps / 2 * wanted.abs() + added * stack.double().abs().sum(0)
        assert ((found.double() - wanted).abs() <= allowed).all()


@pytest.mark.slow
def test_consumed_statistics_count_as_nothing(two):
    for rank in two: assert rank["consumed"] == dict(kept=True, range=(-2.0, 3.0), fresh=True)


@pytest.mark.slow
def test_weights_by_hand(two):
    looks = [rank["weights_by_hand"]["looks"] for rank in two]
    assert [sum(pair) for pair in zip(*looks)] == [1] * 4 and looks[0] != looks[1]
    assert all(rank["weights_by_hand"]["same"] and rank["weights_by_hand"]["right"] for rank in two)


# --- hangs and deaths ---

@pytest.mark.slow
def test_a_rank_that_falls_silent_is_named_when_the_limit_is_over(tmp_path):
    results, _, _ = launch(tmp_path, 2, ["falls_silent"], limit=60, patience=3)
    assert results[0]["falls_silent"].startswith(
        "RankError: waited to combine the statistics of observers, but lost the other ranks"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, words", [("dies", "exitcode"), ("uncaught", "NonFiniteError: 0, input: 8 non-finite values")]
)
def test_a_rank_that_ends_takes_the_others_with_it(tmp_path, case, words):
    # who waited for the other would fail by the limit
    _, printed, status = launch(tmp_path, 2, [case], limit=60, patience=600)
    assert status != 0 and words in printed


@pytest.mark.slow
def test_the_harness_turns_a_hang_into_a_failure(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="2 ranks were not done with \\['hang'\\] after 3 seconds"):
        launch(tmp_path, 2, ["hang"], limit=3)
    pids = [int(p.read_text()) for p in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    for pid in pids: assert gone(pid)


def gone(pid: int, seconds: float = 30) -> bool:
    "Whether a process ends (or is dead and not yet collected) within a few seconds."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try: state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError: return True
        if state in "ZX": return True
        time.sleep(0.1)
    return False


# --- one process ---

COLLECTIVES = ("all_reduce", "all_gather_object", "all_gather", "broadcast", "barrier")


@pytest.fixture(params=["not initialized", "world of one"])
def alone(request, monkeypatch):
    "No process group, or one of a single rank; and nobody may speak."
    if request.param == "world of one": dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    def refuse(*args, **kwargs): raise AssertionError("a collective in a single process")
    for name in COLLECTIVES: monkeypatch.setattr(dist, name, refuse)
    yield
    monkeypatch.undo()
    if request.param == "world of one": dist.destroy_process_group()


def test_alone_nobody_is_spoken_to(alone):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    assert rank_and_size() == (0, 1)
    calibrate(
        model,
        [torch.ones(2, 8)],
        QuantizationModifier(scheme="INT8_STATIC", input_observer="memoryless_minmax"),
        progress=False,
    )
    assert differing_qparams(model) == [] and not model[0].input_scale.isnan().any()


def test_alone_errors_are_ones_own_and_statistics_stay(alone):
    observer = Observer.load_from_registry(
        "static_minmax", base_name="input", args=preset("INT8_STATIC").input_activations
    )
    before = observer(torch.ones(2, 4)).min_vals
    sync_statistics([observer])
    assert observer.min_vals is before
    error = ValueError("mine")
    with pytest.raises(ValueError) as caught: agree("go on", error)
    assert caught.value is error
    with pytest.raises(ValueError) as caught, together("go on"): raise error
    assert caught.value is error and not isinstance(error, RankError)


def test_alone_weights_are_observed_in_module_order(alone):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(8, 8))
    modifier = QuantizationModifier(scheme=dict(weights=dict(num_bits=8, strategy="channel")))
    modifier.initialize_quantization(model)
    modifier.start_calibration(model)
    with torch.no_grad():
        for m in model: m.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="^0, weight"): observe_weights(model.modules())


# --- dealing out ---

def layers(sizes: list[int], fused: list[int]) -> list[torch.nn.Module]:
    "Layers of so many weights; neighbours in runs of the lengths `fused` share a global scale."
    made = [torch.nn.Linear(n, 1, bias=False, device="meta") for n in sizes]
    for m in made:
        m.weight_observer = Observer.load_from_registry(
            "memoryless_minmax", base_name="weight", args=preset("NVFP4A16").weights
        )
        m.weight_observer.attach(m)
    start = 0
    for n in fused:
        fuse([observer_of(m, "weight") for m in made[start:start + n]])
        start += n
    return made


@given(st.lists(st.integers(1, 5000), max_size=25), st.lists(st.integers(1, 4), max_size=8), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_every_weight_goes_to_one_rank_evenly_and_groups_stay_whole(sizes, fused, ranks):
    modules = layers(sizes, fused)
    parts = split_weights(modules, ranks)
    assert len(parts) == ranks and sorted(map(modules.index, sum(parts, []))) == list(range(len(modules)))
    owner = {m: r for r, part in enumerate(parts) for m in part}
    groups = [[m, *(o._module() for o in observer_of(m, "weight").partners())] for m in modules]
    assert all(len({owner[m] for m in group}) == 1 for group in groups)
    loads = [sum(m.weight.numel() for m in part) for part in parts]
    largest = max((sum(m.weight.numel() for m in group) for group in groups), default=0)
    assert max(loads) - min(loads) <= largest
    assert all(part == sorted(part, key=modules.index) for part in parts)
    assert split_weights(modules, ranks) == parts == split_weights(iter(modules + modules), ranks)


def test_modules_without_a_weight_or_an_observer_are_dealt_out_too():
    modules = [torch.nn.ReLU(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(2, 2)]
    assert [[modules.index(m) for m in part] for part in split_weights(modules, 2)] == [[1, 3], [0, 2]]


@pytest.mark.parametrize("ranks", [0, -1, 2.0, True, "2"])
def test_a_number_of_ranks_that_is_none(ranks):
    with pytest.raises(ValueError, match="ranks="): split_weights([], ranks)
