"""Weights that are read without calling their module: no scheme reaches them, and that is said before any data runs."""
import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model
from torch.nn import Embedding, Linear, Module
from torch.nn.functional import linear
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qcal_nb.evaluate import compare_schemes
from qcal_nb.lifecycle import QuantizationModifier, match_report
from qcal_nb.modeling import read_without_call
from qcal_nb.pipelines import calibrate
from qcal_nb.records import record

STATE = dict(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)
DT = [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
IGNORE = ["lm_head", r"re:.*[.]dt_proj$"]


def mamba() -> torch.nn.Module:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**STATE)).eval()


def read_in(model: Module) -> dict[str, str]:
    matrices = {n: m for n, m in model.named_modules() if isinstance(m, (Linear, Embedding))}
    return read_without_call(model, matrices).found


def test_mamba_is_refused_by_name_and_not_touched():
    model = mamba()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.dt_proj and 1 more: MambaMixer reads the weight") as told:
        calibrate(model, make_batches(2, 64), QuantizationModifier(scheme="FP8", ignore=["lm_head"]), progress=False)
    assert "'re:.*[.]dt_proj$' to `ignore`" in str(told.value) and differences(before, fingerprint(model)) == []
    rows = {row.module: row for row in match_report(model, QuantizationModifier(scheme="FP8", ignore=["lm_head"]))}
    assert not rows[DT[0]].matched and "MambaMixer reads its weight without calling it" in rows[DT[0]].reason


def test_what_the_error_advises_works():
    model = calibrate(mamba(), make_batches(2, 64), QuantizationModifier(scheme="FP8", ignore=IGNORE), progress=False)
    assert not any(hasattr(model.get_submodule(name), "quantization_scheme") for name in DT)
    assert hasattr(model.backbone.layers[0].mixer.x_proj, "quantization_scheme")    # read by another kernel alone


def test_a_comparison_has_no_figure_for_it():
    data = make_batches(2, 64)
    table = compare_schemes(mamba(), data, ["FP8"], eval_data=data[:1], progress=False)
    assert table.kl.isna().tolist() == [False, True] and "dt_proj" in table.why[1]


def test_it_can_be_recorded_with_a_warning():
    with pytest.warns(UserWarning, match="dt_proj.*read without a call"):
        seen = record(mamba(), make_batches(1, 64), scheme="INT8_STATIC", progress=False)
    assert not seen.tensors[DT[0], "input"].count and seen.tensors[DT[0], "weight"].count


@pytest.mark.parametrize("make, parts", [
    (lambda: FalconMambaForCausalLM(FalconMambaConfig(**STATE)), {"dt_proj"}),
    (lambda: Mamba2ForCausalLM(Mamba2Config(**STATE, num_heads=8, head_dim=8, n_groups=1)), set()),
    (lambda: MobileBertForMaskedLM(MobileBertConfig(
        vocab_size=64, hidden_size=32, embedding_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, intra_bottleneck_size=32)), {"dense", "decoder"}),
    (lambda: T5ForConditionalGeneration(T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)), set()),
    (lambda: make_model("llama_tied"), set()), (lambda: make_model("mixtral"), set()),
    (lambda: make_model("opt"), set()), (lambda: make_model("bert"), set()), (lambda: make_model("gemma2"), set()),
])
def test_architectures(make, parts):
    assert {name.rpartition(".")[2] for name in read_in(make().eval())} == parts


class Routed(Module):
    "A router that multiplies by itself, an embedding that is a head, a layer that is called and only asked its dtype."

    def __init__(self) -> None:
        super().__init__()
        self.embed = Embedding(8, 4)
        self.inner = Module()
        self.inner.gate = Linear(4, 2)
        self.plain = Linear(4, 4)

    def forward(self, input_ids):
        x = self.plain(self.embed(input_ids).to(self.plain.weight.dtype))
        chosen = linear(x, self.inner.gate.weight).softmax(-1)
        return torch.stack([x @ self.embed.weight.T] * 2, -1) * chosen[..., None, :]


def test_routers_and_heads():
    assert read_in(Routed()) == {"embed": "Routed", "inner.gate": "Routed"}


def test_a_model_that_does_not_run_on_two_tokens_is_judged_by_its_code():
    class Sounds(Routed):
        def forward(self, waves): return linear(waves, self.inner.gate.weight)
    assert set(read_in(Sounds())) == {"embed", "inner.gate"}     # what the classes mention
    with pytest.warns(UserWarning, match="inner.gate: the code of Sounds can read the weight"):
        QuantizationModifier(scheme="FP8", targets=["Linear"]).initialize_quantization(Sounds())


def test_the_look_leaves_nothing():
    model = mamba().train()
    before = fingerprint(model)
    read_in(model)
    assert differences(before, fingerprint(model)) == []


class OtherName(Module):
    "`self` under another name."

    def __init__(s) -> None:
        super().__init__()
        s.embed = Embedding(8, 4)
        s.gate = Linear(4, 2)

    def forward(s, input_ids): return s.embed(input_ids) @ s.gate.weight.T


class InALoop(Module):
    "Weights of layers that have another name in a loop; one of them is called as well."

    def __init__(self) -> None:
        super().__init__()
        self.embed = Embedding(8, 4)
        self.layers = torch.nn.ModuleList(Linear(4, 4) for _ in range(2))
        self.out = Linear(4, 8)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers: x = linear(x, layer.weight, layer.bias) + x
        return self.out(x)


def test_other_names_and_loops():
    assert read_in(OtherName()) == {"gate": "OtherName"}
    assert read_in(InALoop()) == {"layers.0": "InALoop", "layers.1": "InALoop"}


def test_a_recipe_that_leaves_matrices_alone_is_not_refused():
    "Keys and values of Jamba: no Linear is quantized, so how its weight is read does not matter."
    from transformers import JambaConfig, JambaForCausalLM
    torch.manual_seed(0)
    model = JambaForCausalLM(JambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_key_value_heads=2, num_experts=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)).eval()
    cache = dict(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)
    calibrate(model, make_batches(1, 64, (1, 8)), QuantizationModifier(kv_cache_scheme=cache), progress=False)
    assert model.model.layers[1].self_attn.k_scale.isfinite().all()
