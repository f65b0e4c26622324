"""What can be pickled, and in whose words it is refused."""
import copy
import io
import pickle

import pytest
import torch
from helpers import make_batches, make_model

from qcal_nb.lifecycle import QuantizationModifier, State, reset_quantization, unfuse_experts
from qcal_nb.recipes import to_yaml
from qcal_nb.session import Session

CACHE = dict(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)
RECIPES = [dict(scheme="INT8_STATIC"), dict(kv_cache_scheme=CACHE), dict(scheme="NVFP4")]
WORDS = "a model that is being calibrated, or was, cannot be pickled .torch.save.*model.state_dict"


def at(phase: str, recipe: dict) -> torch.nn.Module:
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(**recipe, ignore=["lm_head"])
    modifier.initialize_quantization(model)
    if phase == "initialized": return model
    modifier.start_calibration(model)
    with torch.no_grad(): model(**make_batches(1)[0])
    if phase == "calibrated": modifier.on_end(State(model))
    return model


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("phase", ["initialized", "calibrating", "calibrated"])
def test_a_model_is_refused_in_words_and_can_be_copied(phase, recipe):
    model = at(phase, recipe)
    with pytest.raises(TypeError, match=WORDS): pickle.dumps(model)
    with pytest.raises(TypeError, match=WORDS): torch.save(model, io.BytesIO())
    assert type(copy.deepcopy(model)) is type(model)
    pickle.dumps(reset_quantization(model))


def test_unfused_experts_are_refused_in_words():
    with pytest.raises(TypeError, match=WORDS): pickle.dumps(unfuse_experts(make_model("mixtral")))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_pickled_without_the_model_that_it_was_used_on(recipe):
    modifier = QuantizationModifier(**recipe, ignore=["lm_head"])
    modifier.initialize_quantization(model := make_model("llama_gqa"))
    again = pickle.loads(pickle.dumps(modifier))
    assert to_yaml(again) == to_yaml(modifier) and again.coverage == []
    again.start_calibration(model)      # it is the same recipe


@pytest.mark.parametrize("copying", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_session_is_not_copied(copying):
    session = Session(make_model("llama_gqa"), make_batches(1))
    for _ in range(2):
        with pytest.raises(TypeError, match="a session cannot be pickled or copied.*record.save"): copying(session)
        if session.phase == "original": session.initialize()
