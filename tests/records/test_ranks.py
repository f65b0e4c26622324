"""Each rank records its own data and saves its part; the parts together are the record of one process. Real torchrun
processes."""
import pytest

from qcal_nb.records import CalibrationRecord, record_equal, unequal_parts
from tests.ranks.launching import good

WHOLE = ["record_texts", "record_gradients", "record_experts", "record_by_hand", "record_one_without_data"]
NAMES = dict(
    record_texts="texts", record_gradients="gradients", record_experts="experts", record_by_hand="by_hand",
    record_one_without_data="no_data"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory): return {n: tmp_path_factory.mktemp(str(n)) for n in (1, 2)}


@pytest.fixture(scope="module")
def two(folders):
    return good(
        folders[2], 2, [*WHOLE, "record_together", "record_bad_data", "record_bad_argument", "record_bad_forward"]
    )


@pytest.fixture(scope="module")
def one(folders): return good(folders[1], 1, [*WHOLE, "record_together"])[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE)
def test_parts_of_ranks_are_the_record_of_one_process(one, two, folders, case):
    a, b = (CalibrationRecord.load(folders[2]/f"{NAMES[case]}.{rank}.record") for rank in (0, 1))
    whole = CalibrationRecord.load(folders[1]/f"{NAMES[case]}.0.record")
    for merged in (a | b, b | a):
        assert unequal_parts(merged, whole) == [] and record_equal(merged, whole)
        assert (merged.spans, merged.tokens, merged.expert_tokens) == (whole.spans, whole.tokens, whole.expert_tokens)
    assert all(rank[case]["clean"] for rank in two) and one[case]["clean"]
    assert not record_equal(a, whole) or case == "record_one_without_data"
    with pytest.raises(ValueError, match="is in both records"): _ = a | whole


@pytest.mark.slow
def test_batches_are_numbered_rank_by_rank(two):
    assert [rank["record_texts"]["batches"] for rank in two] == [((0, 3),), ((3, 4),)]
    assert [rank["record_by_hand"]["batches"] for rank in two] == [((0, 1), (2, 3), (4, 5)), ((1, 2), (3, 4))]
    assert [rank["record_one_without_data"]["batches"] for rank in two] == [((0, 2),), ()]


@pytest.mark.slow
def test_an_expert_that_one_rank_saw_is_in_the_whole(two, folders):
    a, b = (CalibrationRecord.load(folders[2]/f"experts.{rank}.record") for rank in (0, 1))
    never = [{e for e, tokens in part.expert_tokens.items() if not tokens} for part in (a, b)]
    assert len(a.expert_tokens) == 8 and never[1] - never[0] and sum((a | b).expert_tokens.values()) == 66


@pytest.mark.slow
def test_moving_averages_of_ranks_have_no_scale(two, folders):
    a, b = (CalibrationRecord.load(folders[2]/f"texts.{rank}.record") for rank in (0, 1))
    moving = [c for key, c in (a | b).results.items() if key[1:] == ("input", "minmax")]
    assert len(moving) == 28 and all("depends on the order" in c.reason and c.scale is None for c in moving)


@pytest.mark.slow
def test_bad_data_of_one_rank_is_told_to_all(two):
    assert two[1]["record_bad_data"]["error"].startswith("TypeError: data holds a object")
    assert two[0]["record_bad_data"]["error"].startswith("RankError: rank 1 failed: TypeError: data holds a object")
    assert [rank["record_bad_data"]["again"] for rank in two] == [((0, 1),), ((1, 2),)]


@pytest.mark.slow
def test_a_bad_argument_of_one_rank_is_told_to_all(two):
    assert two[1]["record_bad_argument"].startswith("ValueError: observer='msee' is unknown")
    assert two[0]["record_bad_argument"].startswith("RankError: rank 1 failed: ValueError: observer='msee' is unknown")


@pytest.mark.slow
def test_a_forward_that_fails_on_one_rank_costs_only_its_part(two):
    assert two[0]["record_bad_forward"] == "no error" and two[1]["record_bad_forward"].startswith("RuntimeError: ")


@pytest.mark.slow
def test_all_ranks_have_the_whole(two, one, folders):
    alone = CalibrationRecord.load(folders[1]/"together.0.record")
    for rank in (0, 1): assert unequal_parts(CalibrationRecord.load(folders[2]/f"together.{rank}.record"), alone) == []
    assert [r["record_together"]["own"] for r in two] == [((0, 3),), ((3, 4),)]
    assert all(r["record_together"]["batches"] == ((0, 4),) for r in two)
    assert all("its weight differs in the other record" in r["record_together"]["error"] for r in two)
    assert one["record_together"]["error"] == "no error"
