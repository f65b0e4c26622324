"""What several tests of the steps need."""
import torch

from qcal_nb.lifecycle import State

FP8 = dict(scheme="FP8", ignore=["lm_head"])
STATIC = dict(scheme="INT8_STATIC", ignore=["lm_head"])


def run_until(model, modifier, phase, data):
    "Take a model to a phase by hand."
    state = State(model)
    if phase == "original": return
    modifier.on_initialize(state)
    if phase == "initialized": return
    modifier.on_start(state)
    if phase == "started": return
    with torch.no_grad():
        for batch in data: model(**batch)
    if phase == "fed": return
    modifier.on_end(state)
