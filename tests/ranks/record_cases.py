"""What ranks do that record: each saves its part of a record beside its results. Run by cases.py."""
import sys
from pathlib import Path

import torch

from qcal_nb.models import load_tiny_llama
from qcal_nb.calibration.ranks import agree
from qcal_nb.calibration import rank_and_size
from qcal_nb.records import all_ranks, record

from common import mixture, said, texts


def recorded(name, model, data, **options):
    "This rank's part of a record, saved beside the results."
    rank, _ = rank_and_size()
    before = {n: len(m._forward_pre_hooks) for n, m in model.named_modules()}
    run = record(model, data, progress=False, **options)
    run.save(Path(sys.argv[1])/f"{name}.{rank}.record")
    return dict(
        batches=run.spans,
        tokens=run.tokens,
        clean=before == {n: len(m._forward_pre_hooks) for n, m in model.named_modules()},
    )


def record_texts():
    model, tokenizer = load_tiny_llama()
    return recorded(
        "texts", model, texts(), tokenizer=tokenizer, max_length=64, observers=["static_minmax", "percentile", "minmax"]
    )


def record_gradients():
    model, tokenizer = load_tiny_llama()
    return recorded("gradients", model, texts(), tokenizer=tokenizer, max_length=64, gradients=True)


def record_experts():
    return recorded("experts", *mixture(), scheme="NVFP4", observers=["static_minmax"])


def record_by_hand():
    "Global indices given: rank 0 has the even ones. No rank asks another."
    rank, size = rank_and_size()
    data = [torch.full((2, 8), float(i + 1)) for i in range(5)]
    mine = range(5) if size == 1 else range(rank, 5, 2)
    return recorded("by_hand", torch.nn.Sequential(torch.nn.Linear(8, 8)), [data[i] for i in mine], batch_indices=mine)


def record_one_without_data():
    rank, size = rank_and_size()
    data = [torch.ones(2, 8), torch.ones(3, 8)]
    return recorded("no_data", torch.nn.Sequential(torch.nn.Linear(8, 8)), data if rank == 0 or size == 1 else [])


def record_together():
    "All parts on every rank; and parts of two models, which no rank may take for one."
    model, tokenizer = load_tiny_llama()
    rank, _ = rank_and_size()
    part = record(model, texts(), tokenizer=tokenizer, max_length=64, observers=["percentile"], progress=False)
    whole = all_ranks(part)
    whole.save(Path(sys.argv[1])/f"together.{rank}.record")
    other = record(torch.nn.Sequential(torch.nn.Linear(8, 8 + rank)), [torch.ones(2, 8)], progress=False)
    return dict(batches=whole.spans, own=part.spans, error=said(all_ranks, other))


def record_bad_data():
    "The second rank's data cannot be read: all hear of it, and can go on."
    rank, _ = rank_and_size()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    error = said(record, model, [torch.ones(2, 8)] if rank == 0 else [object()], progress=False)
    return dict(error=error, again=record(model, [torch.ones(2, 8)], progress=False).spans)


def record_bad_argument():
    "One rank's arguments are wrong: found before the ranks speak to each other, and yet told to all."
    rank, _ = rank_and_size()
    return said(
        record, torch.nn.Sequential(torch.nn.Linear(8, 8)), [torch.ones(2, 8)],
        observers="mse" if rank == 0 else "msee", progress=False
    )


def record_bad_forward():
    "A forward pass fails on the second rank alone; the first one's part is not lost."
    rank, _ = rank_and_size()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    error = said(record, model, [torch.ones(2, 8 + rank)], progress=False)
    agree("still in step")
    return error
