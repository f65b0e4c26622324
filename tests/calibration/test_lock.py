"""Nobody else runs or is heard by a model that a calibration holds."""
import threading

import pytest
import torch
from helpers import make_batches, make_model, qparams

from qcal_nb.calibration import ModelBusyError
from qcal_nb.lifecycle import QuantizationModifier, steps
from qcal_nb.pipelines import calibrate

STATIC = dict(scheme="INT8_STATIC", ignore=["lm_head"])


@pytest.mark.parametrize("when", ["weights are searched", "the calibration starts"])
def test_nobody_else_is_heard_while_calibrate_is_at_work(when, monkeypatch):
    "Another thread's forward, in the moments before the first batch and after the last."
    model, plain, refused = make_model("llama_gqa"), make_model("llama_gqa"), []
    loud = {"input_ids": torch.full((1, 8), 3)}
    def elsewhere():
        def run():
            try: model(**loud)
            except ModelBusyError as error: refused.append(str(error))
        thread = threading.Thread(target=run)
        thread.start(); thread.join()
    owner, name = (QuantizationModifier, "on_start") if when == "the calibration starts" else (steps, "sync_observers")
    original = getattr(owner, name)
    def interfered(*args, **kwargs):
        result = original(*args, **kwargs)
        if getattr(interfered, "armed", False): elsewhere()
        return result
    monkeypatch.setattr(owner, name, interfered)
    calibrate(plain, make_batches(), QuantizationModifier(**STATIC), progress=False)
    interfered.armed = True
    modifier = QuantizationModifier(**STATIC)
    calibrate(model, make_batches(), modifier, progress=False)
    assert bool(refused) == (when == "weights are searched")  # before the first batch: let through, but not heard
    assert all(torch.equal(v, qparams(model)[k]) for k, v in qparams(plain).items())
    assert {r.observations for r in modifier.coverage if r.base_name == "input"} == {3}


def test_the_sequential_pipeline_is_closed_below_the_model():
    model, errors = make_model("llama_gqa"), []
    def elsewhere(*_):
        def run():
            for part in (model.model, model.model.layers[0]):
                try: part(torch.zeros(1, 4, 64) if part is not model.model else torch.ones(1, 4, dtype=torch.long))
                except BaseException as error: errors.append(type(error))
        thread = threading.Thread(target=run)
        thread.start(); thread.join()
    handle = model.model.layers[1].register_forward_pre_hook(elsewhere)
    calibrate(model, make_batches(), QuantizationModifier(**STATIC), pipeline="sequential", progress=False)
    handle.remove()
    assert errors and set(errors) == {ModelBusyError}
