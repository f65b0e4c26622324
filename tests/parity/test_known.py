"""Places where we differ from the reference because it is wrong. Each is shown to be wrong; should it be mended, these tests say so."""
import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from harness import CONFIGURATIONS, FP8, INT8, MASK_LOST, SIZE, batches, linears, make, one_thread, ours, reference, unequal
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, LlamaConfig, OPTConfig

from qcal_nb.observers.base import NonFiniteError

pytestmark = pytest.mark.parity
pytest.importorskip("llmcompressor", reason="no reference: pip install -e '.[dev]'")
STATIC = CONFIGURATIONS["INT8_STATIC"] | dict(ignore=["lm_head"])
LLAMA = LlamaConfig(**SIZE, intermediate_size=256, num_key_value_heads=2)


@pytest.fixture(autouse=True)
def single():
    with one_thread(): yield


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLAMA).to(dtype).eval()


def data(n=3): return batches("Llama, grouped queries", n)


@pytest.mark.parametrize("architecture", sorted(MASK_LOST))
def test_its_sequential_pipeline_loses_the_causal_mask(architecture):
    "Its two pipelines disagree by far on what comes out of attention; ours agree with each other and with its basic one."
    feed = batches(architecture)
    basic, sequential = (reference(make(architecture), feed, pipeline=p, **STATIC) for p in ("basic", "sequential"))
    mine = ours(make(architecture), feed, "sequential", **STATIC)
    name = "model.layers.0.self_attn.o_proj.input_scale"
    assert basic[name] > 1.5 * sequential[name] and unequal(basic, mine) == []


def test_its_sequential_pipeline_computes_no_scale_of_an_encoder():
    def bart():
        torch.manual_seed(0)
        return AutoModelForSeq2SeqLM.from_config(BartConfig(vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                                                            decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128)).eval()
    feed = [dict(b, decoder_input_ids=b["input_ids"]) for b in data()]
    basic, sequential = (reference(bart(), feed, pipeline=p, **STATIC) for p in ("basic", "sequential"))
    assert unequal(basic, ours(bart(), feed, "sequential", **STATIC)) == []
    assert any("encoder" in name for name in unequal(basic, sequential))


def test_a_nan_becomes_its_scale_in_silence():
    def broken():
        model = llama()
        with torch.no_grad(): model.model.embed_tokens.weight[5, 3] = torch.nan
        return model
    feed = [dict(input_ids=torch.full((1, 8), 5), attention_mask=torch.ones(1, 8, dtype=torch.long))]
    assert any(v.isnan().any() for v in reference(broken(), feed, **STATIC).values() if v.is_floating_point())
    with pytest.raises(NonFiniteError, match="model.layers.0.self_attn.q_proj, input: .* of batch 0"): ours(broken(), feed, **STATIC)


def test_a_nan_in_an_nvfp4_weight_is_a_global_scale_of_one():
    def broken():
        model = llama()
        with torch.no_grad(): model.model.layers[0].self_attn.o_proj.weight[0, 0] = torch.nan
        return model
    recipe = dict(scheme="NVFP4A16", ignore=["lm_head"])
    assert reference(broken(), data(), **recipe)["model.layers.0.self_attn.o_proj.weight_global_scale"] == 1
    with pytest.raises(NonFiniteError, match="model.layers.0.self_attn.o_proj, weight"): ours(broken(), data(), **recipe)


def test_its_output_scales_depend_on_memory():
    "Values pass through scales that were never set; ours are those of a plain loop over the outputs."
    scheme = QuantizationScheme(targets=["Linear"], output_activations=INT8 | dict(strategy="tensor", observer="static_minmax"))
    recipe, model, seen = dict(config_groups={"group_0": scheme}, ignore=["lm_head"]), llama(), {}
    model.set_attn_implementation("eager")
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.Linear) and name != "lm_head":
            m.register_forward_hook(lambda m, args, out, name=name: seen.update({name: max(seen.get(name, 0), out.abs().max().item())}))
    with torch.no_grad():
        for batch in data(): model(**batch)
    mine = ours(llama(), data(), **recipe)
    assert all(abs(mine[f"{name}.output_scale"].item() - largest / 127.5) < 1e-6 for name, largest in seen.items())
    theirs = reference(llama(), data(), **recipe)
    assert [n for n in unequal(theirs, mine) if n.endswith("output_scale")]


def test_its_query_scales_are_never_computed():
    recipe = dict(config_groups={"attention": QuantizationScheme(targets=["re:.*self_attn$"], input_activations=FP8 | dict(strategy="tensor"))})
    theirs, mine = reference(llama(), data(), **recipe), ours(llama(), data(), **recipe)
    assert unequal(theirs, mine) == [f"model.layers.{i}.self_attn.q_scale" for i in range(2)]
    assert all(mine[f"model.layers.{i}.self_attn.q_scale"].isfinite().all() for i in range(2))


def test_its_half_precision_search_overflows():
    "A sum in float16 ends at 65,504; then no candidate is better than min and max, which is what it takes."
    recipe = linears(INT8 | dict(num_bits=2, strategy="tensor", observer="memoryless_mse", observer_kwargs=dict(norm=2.0)))
    def wide():
        model = llama(torch.float16)
        with torch.no_grad(): model.model.layers[0].mlp.down_proj.weight.mul_(1000)
        return model
    name = "model.layers.0.mlp.down_proj.weight_scale"
    weight = wide().model.layers[0].mlp.down_proj.weight
    recipe["ignore"] = ["lm_head"]
    theirs, mine = reference(wide(), data(1), **recipe)[name], ours(wide(), data(1), **recipe)[name]
    assert torch.equal(theirs, (weight.abs().max() / 1.5).reshape(1)) and mine < theirs


def test_two_dimensional_activations_lose_their_groups():
    "OPT feeds its fc1 and fc2 (tokens, hidden): the reference takes all of it as one group, and searches one range instead of one a group."
    recipe = dict(scheme="NVFP4", input_observer="mse", ignore=["lm_head"])
    def opt():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(OPTConfig(**SIZE, ffn_dim=256, word_embed_proj_dim=128)).eval()
    found = unequal(reference(opt(), data(), **recipe), ours(opt(), data(), **recipe))
    assert found and all(".fc" in name and name.endswith("input_global_scale") for name in found)


def test_it_writes_to_the_callers_scheme():
    from llmcompressor.modifiers.quantization import QuantizationModifier as Reference

    from qcal_nb.lifecycle import QuantizationModifier
    def scheme(): return QuantizationScheme(targets=["Linear"], input_activations=INT8 | dict(strategy="tensor"))
    theirs, mine = scheme(), scheme()
    Reference(config_groups={"group_0": theirs}).resolved_config  # noqa: B018
    QuantizationModifier(config_groups={"group_0": mine}).resolved_config  # noqa: B018
    assert theirs != scheme() and mine == scheme()
