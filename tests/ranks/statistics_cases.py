"""What ranks do with the statistics of observers of all kinds, against plain arithmetic. Run by cases.py."""
import torch
import torch.distributed as dist

from qcal_nb.calibration import observe, observer_of, update_qparams
from qcal_nb.lifecycle import QuantizationModifier, State
from qcal_nb.observers import Counts, Observer
from qcal_nb.calibration import observe_weights, rank_and_size, sync_statistics
from qcal_nb.schemes import preset

from common import WEIGHTS

AVG, SUM, MIN, MAX = (getattr(dist.ReduceOp, name) for name in ("AVG", "SUM", "MIN", "MAX"))


class Kept(Observer):
    "An observer whose statistics are put there by hand."

    statistics = ("a", "b")
    def update_statistics_from_observed(self, observed): raise AssertionError("nobody observes")


OPS = [(MIN, MAX), (AVG, AVG), (SUM, SUM), (MAX, SUM), (SUM, AVG)]
KINDS = [type(f"Kept{i}", (Kept,), {"sync_ops": dict(zip("ab", ops))}) for i, ops in enumerate(OPS)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(rank):
    """What a rank knows in the game of statistics: for each observer (kind, values of a and b, or None). Everyone can
    draw everyone's."""
    world, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + rank)
    found = []
    for i in range(60):
        kind, shape = i % len(KINDS), [(), (1,), (3,), (2, 5), (2, 1, 3)][int(torch.randint(5, (), generator=world))]
        pair = []
        for op in OPS[kind]:
            dtype = DTYPES[int(torch.randint(4, (), generator=world))]
            value = (torch.randn(shape, generator=own) * 100).to(dtype)
            pair.append(value.to(torch.int64) if op == SUM and i % 2 else value)
        present = torch.rand((), generator=own).item() < (0, 0.3, 0.6, 1)[i % 4]
        found.append((kind, pair if present else None))
    return found


def statistics():
    "All observers of the game, synchronised twice, and what they hold."
    rank, _ = rank_and_size()
    observers, originals = [], []
    for kind, pair in drawn(rank):
        observer = KINDS[kind](base_name="input", args=preset("INT8_STATIC").input_activations)
        if pair: observer.a, observer.b = pair
        observers.append(observer)
        originals.append(pair and [p.clone() for p in pair])
    before = [(o.__dict__.get("a"), o.__dict__.get("b")) for o in observers]
    sync_statistics(observers)
    after = [(o.__dict__.get("a"), o.__dict__.get("b")) for o in observers]
    untouched = all(torch.equal(x, y) for pair, old in zip(before, originals) if old for x, y in zip(pair, old))
    sync_statistics(observers)
    same = all(
        x is y for o, pair in zip(observers, after) for x, y in zip((o.__dict__.get("a"), o.__dict__.get("b")), pair)
    )
    own_storage = all(
        t.untyped_storage().nbytes() == t.numel() * t.itemsize for pair in after for t in pair if t is not None
    )
    return dict(
        after=after, untouched=untouched, twice_is_once=same, own_storage=own_storage,
        counts=[o.counts == Counts() for o in observers]
    )


def consumed():
    "Statistics that were written into a scale count as nothing: on one rank only, and on all."
    rank, _ = rank_and_size()
    layer = torch.nn.Linear(4, 4)
    QuantizationModifier(scheme="INT8_STATIC", input_observer="static_minmax").on_initialize(State(layer))
    observer = Observer.load_from_registry(
        "static_minmax", base_name="input", args=preset("INT8_STATIC").input_activations
    )
    layer.input_observer = observer
    observer(torch.tensor([[-9.0 - rank, 9.0]]))
    update_qparams(layer, "input")
    old = observer.min_vals
    sync_statistics([observer])
    kept = observer.min_vals is old and observer.consumed
    if rank == 1: observer(torch.tensor([[-2.0, 3.0]]))
    sync_statistics([observer])
    return dict(kept=kept, range=(observer.min_vals.item(), observer.max_vals.item()), fresh=not observer.consumed)


def weights_by_hand():
    "A second look at weights that nobody changed is no look; one rank's share is the other's gap."
    model = torch.nn.Sequential(*(torch.nn.Linear(4, n) for n in (4, 5, 6, 7)))
    modifier = QuantizationModifier(scheme=WEIGHTS)
    modifier.on_initialize(State(model))
    modifier.on_start(State(model))
    observe_weights(model.children())
    observers = [observer_of(m, "weight") for m in model]
    first, looks = [o.min_vals for o in observers], [o.counts.observations for o in observers]
    observe_weights(model.children())
    same = all(torch.equal(o.min_vals, f) for o, f in zip(observers, first))
    observe(model.children(), "weight")
    right = all(torch.equal(o.min_vals, m.weight.amin(-1, keepdim=True)) for o, m in zip(observers, model))
    return dict(looks=looks, same=same, right=right, again=[o.counts.observations for o in observers])
