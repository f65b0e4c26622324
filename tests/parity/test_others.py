"""Models beside the matrix: our two pipelines give the reference's basic scales, its sequential one does not."""
import pytest
import torch
from harness import one_thread, ours, reference, unequal
from others import CACHE, SEQUENTIAL, both_pipelines, made, recurrent, text

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_its_sequential_pipeline_gives_other_scales(name):
    with one_thread():
        basic, sequential = both_pipelines(reference, name)
        mine = both_pipelines(ours, name)
    assert [unequal(basic, m) for m in mine] == [[], []]
    assert unequal(basic, sequential) != []


def test_keys_and_values_of_recurrent_gemma_are_unset_memory_there():
    "Two runs of the reference, fresh memory full of NaN in the second; ours are equal in all."
    def run(who, pipeline): return who(made(recurrent), [text(1), text(2)], pipeline=pipeline, **CACHE)
    with one_thread():
        mine = [run(ours, p) for p in ("basic", "sequential")]
        torch.use_deterministic_algorithms(True)
        try: theirs, again = run(reference, "basic"), run(ours, "basic")
        finally: torch.use_deterministic_algorithms(False)
    assert unequal(mine[0], mine[1]) == unequal(mine[0], again) == [] and len(mine[0]) == 2
    assert all(v.isfinite().all() and (v > 0).all() for v in mine[0].values())
    assert all(v.isnan().all() for v in theirs.values())
