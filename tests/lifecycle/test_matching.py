"""Which targets match is compressed-tensors' answer, asked about the few that can; schemes are attached as by its
`apply_quantization_config`."""
import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, apply_quantization_config, disable_quantization
from compressed_tensors.utils import match
from helpers import make_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from qcal_nb.lifecycle import QuantizationModifier, match_report, reset_quantization
from qcal_nb.modeling import Targets
from qcal_nb.recipes import override

MODULES = {
    **dict(make_model("llama_gqa").named_modules()), "Linear": torch.nn.Embedding(2, 2),
    "LayerNorm": torch.nn.Linear(2, 2)
}
OTHERS = [
    "Linear", "Module", "Embedding", "LlamaAttention", "re:.*proj", "re:.*self_attn", "re:model.*mlp", "re:Lin", "none",
    "corre:1"
]
TARGET = st.sampled_from([*MODULES, *OTHERS])


@given(st.lists(TARGET))
def test_what_matches_is_what_compressed_tensors_finds_among_all(targets):
    found = Targets(targets, MODULES)
    for name, module in MODULES.items():
        assert found.matching(name, module) == match.match_targets(name, module, [*dict.fromkeys(targets)])
        assert [t for t in found.near_module(name, module) if match.is_match(name, module, t)] == [
            t for t in dict.fromkeys(targets) if match.is_match(name, module, t)]


W4 = dict(num_bits=4, type="int", strategy="group", group_size=32)
RECIPES = dict(
    fp8=dict(scheme="FP8"), int8=dict(scheme="INT8_STATIC"), nvfp4=dict(scheme="NVFP4"),
    asymmetric=dict(scheme=dict(weights=W4 | dict(symmetric=False))),
    embedding=dict(config_groups=dict(
        a=QuantizationScheme(targets=["Embedding"], weights=W4), b=QuantizationScheme(targets=["Linear"], weights=W4)
    )),
    names=dict(config_groups=dict(
        a=QuantizationScheme(targets=["model.layers.0.mlp.up_proj", "re:.*v_proj"], weights=W4),
        b=QuantizationScheme(targets=["Linear"]),
    )),
)


def attached(model):
    "All that tells one attached scheme from another."
    schemes = [m.quantization_scheme for m in model.modules() if hasattr(m, "quantization_scheme")]
    shared = [[a is b for b in schemes] for a in schemes]
    def facts(m):
        return vars(m).get("quantization_scheme"), vars(m).get("quantization_status"), type(vars(m).get("forward"))
    modules = [(n, vars(m).keys() - {"_qcal_undo_log"}, *facts(m)) for n, m in model.named_modules()]
    return modules, shared, [(n, p.dtype, p.shape, p.requires_grad, p.device) for n, p in model.named_parameters()]


@pytest.mark.parametrize("ignore", [[], ["lm_head"], ["re:.*mlp.*", "model.layers.1.self_attn.o_proj"]], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
def test_schemes_are_attached_as_by_compressed_tensors(name, recipe, ignore):
    if (name, recipe) == ("opt", "embedding"):  # its embeddings of positions cannot be wrapped, and are refused
        ignore = [*ignore, "model.decoder.embed_positions"]
    mine, theirs, modifier = make_model(name), make_model(name), QuantizationModifier(**RECIPES[recipe], ignore=ignore)
    modifier.initialize_quantization(mine)
    apply_quantization_config(theirs, modifier.resolved_config, show_progress=False)
    theirs.apply(disable_quantization)
    assert attached(mine) == attached(theirs)
    zeros = [{n: p for n, p in m.named_parameters() if n.endswith("zero_point")} for m in (mine, theirs)]
    assert all(torch.equal(p, zeros[1][n]) for n, p in zeros[0].items())


def comparisons(layers, monkeypatch):
    """How often a name is compared with a target: in initializing, in the report, in changing the observer of every
    module."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2
    ))
    calls, compare = [], match.match_name
    monkeypatch.setattr(match, "match_name", lambda *args: calls.append(args) or compare(*args))
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    modifier = QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head", "model.layers.0.mlp.up_proj"])
    choices = {
        n: dict(input=("minmax", "static_minmax", "percentile")[i % 3])
        for i, n in enumerate(linears) if n != "model.layers.0.mlp.up_proj"
    }
    best = override(override(modifier, choices, model), choices, model)
    counts = [len(calls)]
    for look in (
        lambda: match_report(model, best), lambda: best.initialize_quantization(model),
        lambda: best.start_calibration(model)
    ):
        look()
        counts.append(len(calls))
    monkeypatch.undo()
    reset_quantization(model)
    return counts


def test_twice_the_layers_are_twice_the_comparisons(monkeypatch):
    "Also where every module has a target of its own."
    small, large = (comparisons(layers, monkeypatch) for layers in (4, 8))
    assert all(b < 2.2 * a for a, b in zip(small, large))
