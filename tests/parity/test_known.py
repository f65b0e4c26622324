"""Places where we differ from the reference because it is wrong. Each is shown to be wrong; should it be mended, these
tests say so."""
from copy import deepcopy

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, disable_quantization
from harness import (
    CONFIGURATIONS,
    FP8,
    INT8,
    MASK_LOST,
    ONE_LATENT,
    PIPELINES,
    SIZE,
    batches,
    linears,
    make,
    ours,
    reference,
    unequal,
)
from helpers import offload
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, GptOssConfig, OPTConfig, T5Config

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import load_tiny_llama
from qcal_nb.stats import NonFiniteError
from qcal_nb.observers import Observer
from qcal_nb.pipelines import calibrate
from tests.parity.known import data, llama, nan_in_fresh_memory

STATIC = CONFIGURATIONS["INT8_STATIC"] | dict(ignore=["lm_head"])

pytestmark = pytest.mark.parity
pytest.importorskip("llmcompressor", reason="no reference: pip install -e '.[dev]'")


def input_scales(model, feed, dtype=torch.float32):
    "What `INPUTS` has to find, by a plain loop."
    seen = {}
    model.set_attn_implementation("eager")
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.Linear) and name != "lm_head":
            m.register_forward_hook(
                lambda m, args, out, key=f"{name}.input_scale": seen.update(
                    {key: max(seen.get(key, 0), args[0].abs().max())}
                )
            )
    with torch.no_grad():
        for batch in feed: model(**batch)
    return {name: (v.reshape(1) / 127.5).to(dtype) for name, v in seen.items()}


INPUTS = linears(inputs=INT8 | dict(strategy="tensor", observer="static_minmax")) | dict(ignore=["lm_head"])
OUTPUTS = QuantizationScheme(
    targets=["Linear"], output_activations=INT8 | dict(strategy="tensor", observer="static_minmax")
)
BART = BartConfig(
    vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128
)
T5 = T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)


def seq2seq(config):
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(deepcopy(config)).eval()


def seq2seq_data(): return [dict(b, decoder_input_ids=b["input_ids"]) for b in data()]


@pytest.mark.parametrize("architecture", sorted(MASK_LOST))
def test_its_sequential_pipeline_loses_the_causal_mask(architecture):
    """Its two pipelines disagree by far on what comes out of attention; ours agree with each other and with its basic
    one."""
    feed = batches(architecture)
    basic, sequential = (reference(make(architecture), feed, pipeline=p, **STATIC) for p in ("basic", "sequential"))
    mine = ours(make(architecture), feed, "sequential", **STATIC)
    name = "model.layers.0.self_attn.o_proj.input_scale"
    assert basic[name] > 1.5 * sequential[name] and unequal(basic, mine) == []


def test_without_a_mask_a_plain_loop_gives_its_numbers():
    feed = batches("Mistral")
    unmasked = input_scales(
        make("Mistral"), [dict(input_ids=b["input_ids"], attention_mask=torch.zeros(2, 1, 16, 16)) for b in feed]
    )
    theirs, mine = (who(make("Mistral"), feed, pipeline="sequential", **INPUTS) for who in (reference, ours))
    right = input_scales(make("Mistral"), feed)
    assert all(torch.equal(theirs[n], unmasked[n]) and torch.equal(mine[n], right[n]) for n in right)
    assert unequal(right, unmasked)


@pytest.mark.parametrize("config, left_out", [(BART, "model.encoder."), (T5, "")], ids=["BART", "T5"])
def test_its_sequential_pipeline_computes_no_scale_of_an_encoder(config, left_out):
    "Nor, where the tracer gets hold of no block, any at all."
    basic = reference(seq2seq(config), seq2seq_data(), **STATIC)
    with nan_in_fresh_memory(): theirs = reference(seq2seq(config), seq2seq_data(), pipeline="sequential", **STATIC)
    one, other = (ours(seq2seq(config), seq2seq_data(), pipeline, **STATIC) for pipeline in PIPELINES)
    assert unequal(one, other) == [] and all(v.isfinite().all() for v in other.values())
    unset = [n for n, v in theirs.items() if v.isnan().any()]
    assert unset == [n for n in basic if n.startswith(left_out) and n.endswith("_scale")]


@pytest.mark.parametrize("architecture, configuration", ONE_LATENT)
def test_heads_that_share_a_latent_have_a_scale_each_with_which_nothing_runs(architecture, configuration):
    "Or, by its sequential pipeline, one of another shape than a loader makes room for."
    recipe, feed = CONFIGURATIONS[configuration] | dict(ignore=["lm_head"]), batches(architecture)
    models = [make(architecture), make(architecture)]
    basic, sequential = (reference(model, feed, pipeline=p, **recipe) for model, p in zip(models, PIPELINES))
    name = "model.layers.0.self_attn.k_scale"
    assert (basic[name].shape, sequential[name].shape) == ((4, 1, 1), (1, 1, 1))
    with pytest.raises(RuntimeError), torch.no_grad(): models[0](**feed[0])
    with pytest.raises(ValueError, match="use strategy 'tensor'"): ours(make(architecture), feed, **recipe)


def test_a_nan_becomes_its_scale_in_silence():
    def broken():
        model = llama()
        with torch.no_grad(): model.model.embed_tokens.weight[5, 3] = torch.nan
        return model
    feed = [dict(input_ids=torch.full((1, 8), 5), attention_mask=torch.ones(1, 8, dtype=torch.long))]
    assert any(v.isnan().any() for v in reference(broken(), feed, **STATIC).values() if v.is_floating_point())
    with pytest.raises(NonFiniteError, match="model.layers.0.self_attn.q_proj, input: .* of batch 0"):
        ours(broken(), feed, **STATIC)


def test_a_nan_in_an_nvfp4_weight_is_a_global_scale_of_one():
    def broken():
        model = llama()
        with torch.no_grad(): model.model.layers[0].self_attn.o_proj.weight[0, 0] = torch.nan
        return model
    recipe = dict(scheme="NVFP4A16", ignore=["lm_head"])
    assert reference(broken(), data(), **recipe)["model.layers.0.self_attn.o_proj.weight_global_scale"] == 1
    with pytest.raises(NonFiniteError, match="model.layers.0.self_attn.o_proj, weight"):
        ours(broken(), data(), **recipe)


def test_its_output_scales_depend_on_memory():
    "Values pass through scales that were never set; ours are those of a plain loop over the outputs."
    recipe, model, seen = dict(config_groups={"group_0": OUTPUTS}, ignore=["lm_head"]), llama(), {}
    model.set_attn_implementation("eager")
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.Linear) and name != "lm_head":
            m.register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: max(seen.get(name, 0), out.abs().max())})
            )
    with torch.no_grad():
        for batch in data(): model(**batch)
    mine = ours(llama(), data(), **recipe)
    assert all(torch.equal(mine[f"{name}.output_scale"], largest.reshape(1) / 127.5) for name, largest in seen.items())
    theirs = reference(llama(), data(), **recipe)
    assert [n for n in unequal(theirs, mine) if n.endswith("output_scale")]
    with nan_in_fresh_memory(): theirs, again = reference(llama(), data(), **recipe), ours(llama(), data(), **recipe)
    assert sum(v.isnan().any() for v in theirs.values()) > 5 and unequal(mine, again) == []


def test_it_cannot_calibrate_the_output_of_the_head():
    with pytest.raises(RuntimeError, match="meta"): reference(llama(), data(), config_groups={"group_0": OUTPUTS})
    assert ours(llama(), data(), config_groups={"group_0": OUTPUTS})["lm_head.output_scale"].isfinite()


def test_a_module_that_no_batch_reaches_runs_with_what_is_in_memory():
    def with_spare():
        model = llama()
        model.spare = torch.nn.Linear(128, 4, bias=False)
        return model
    theirs, mine, x = with_spare(), with_spare(), torch.ones(1, 128)
    with nan_in_fresh_memory(): reference(theirs, data(), **STATIC)
    with pytest.raises(ValueError, match="spare"): ours(with_spare(), data(), **STATIC)
    modifier = QuantizationModifier(**STATIC)
    calibrate(mine, data(), modifier, on_uncalibrated="skip", progress=False)
    with torch.no_grad(): assert theirs.spare(x).isnan().all() and torch.equal(mine.spare(x), x @ mine.spare.weight.T)
    assert [row.module for row in modifier.coverage if not row.computed] == ["spare"]


def test_its_query_scales_are_never_computed():
    recipe = dict(config_groups={
        "attention": QuantizationScheme(targets=["re:.*self_attn$"], input_activations=FP8 | dict(strategy="tensor"))
    })
    theirs, mine = reference(llama(), data(), **recipe), ours(llama(), data(), **recipe)
    assert unequal(theirs, mine) == [f"model.layers.{i}.self_attn.q_scale" for i in range(2)]
    assert all(mine[f"model.layers.{i}.self_attn.q_scale"].isfinite().all() for i in range(2))


def test_its_half_precision_search_overflows():
    "A sum in float16 ends at 65,504; then no candidate is better than min and max, which is what it takes."
    recipe = linears(
        INT8 | dict(num_bits=2, strategy="tensor", observer="memoryless_mse", observer_kwargs=dict(norm=2.0))
    )
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
    """OPT feeds its fc1 and fc2 (tokens, hidden): the reference takes all of it as one group, and searches one range
    instead of one a group."""
    recipe = dict(scheme="NVFP4", input_observer="mse", ignore=["lm_head"])
    def opt():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(OPTConfig(**SIZE, ffn_dim=256, word_embed_proj_dim=128)).eval()
    found = unequal(reference(opt(), data(), **recipe), ours(opt(), data(), **recipe))
    assert found and all(".fc" in name and name.endswith("input_global_scale") for name in found)


def test_the_same_numbers_in_two_or_three_dimensions():
    from llmcompressor.observers import Observer as Theirs
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    def found(observers, value):
        args = QuantizationArgs(
            num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16, dynamic="local"
        )
        return observers.load_from_registry(
            "memoryless_mse", base_name="input", args=args
        )(value).get_qparams()["global_scale"].item()
    assert found(Theirs, x) != found(Theirs, x[None]) == found(Observer, x[None]) == found(Observer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_changes_the_norms_of_gemma(dtype):
    "And calibrates, in bf16, a model with rounded norms."
    def gemma():
        model = make("Gemma 3").to(dtype)
        model.config.dtype = dtype
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" in name: p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        return model
    def norms(model): return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "norm" in n])
    theirs, mine, feed = gemma(), gemma(), batches("Gemma 3")
    their_scales = reference(theirs, feed, **INPUTS)
    my_scales = ours(mine, feed, **INPUTS)
    right = input_scales(gemma(), feed, dtype)
    assert (norms(theirs) != norms(gemma())).float().mean() > 0.5 and torch.equal(norms(mine), norms(gemma()))
    assert all(torch.equal(my_scales[n], right[n]) for n in right)
    assert bool(unequal(their_scales, my_scales)) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_its_experts_of_gpt_oss_compute_something_else(dtype):
    def gpt_oss():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(GptOssConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16,
            num_local_experts=4, num_experts_per_tok=2)).to(dtype).eval()
        model.config.dtype = dtype
        model.set_experts_implementation("eager")
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "experts" in name: p.normal_(0, 0.3)
        return model
    @torch.no_grad()
    def logits(model): return model.apply(disable_quantization)(**data()[0]).logits
    theirs, mine = gpt_oss(), gpt_oss()
    found = unequal(
        reference(theirs, data(), scheme="FP8", ignore=["lm_head"]),
        ours(mine, data(), scheme="FP8", ignore=["lm_head"]),
    )
    assert found and all(name.endswith("input_scale") for name in found)
    assert torch.equal(logits(mine), logits(gpt_oss())) and not torch.equal(logits(theirs), logits(gpt_oss()))


def test_its_bf16_search_depends_on_the_number_of_threads():
    from llmcompressor.observers import Observer as Theirs
    weights = {
        n: m.weight.detach()
        for n, m in load_tiny_llama(torch.bfloat16)[0].named_modules() if isinstance(m, torch.nn.Linear)
    }
    def scale(observers, weight):
        observer = observers.load_from_registry(
            "memoryless_mse", base_name="weight", args=QuantizationArgs(**FP8, strategy="tensor")
        )
        return observer(weight).get_qparams()["scale"]
    def scales(observers, threads):
        torch.set_num_threads(threads)
        try: return {n: scale(observers, weight) for n, weight in weights.items()}
        finally: torch.set_num_threads(1)
    alone = scales(Observer, 1)
    assert unequal(scales(Theirs, 1), alone) == [] == unequal(scales(Observer, 4), alone)
    assert unequal(scales(Theirs, 4), alone)


def test_on_disk_it_loses_the_quantization_of_weights(tmp_path):
    recipe = linears(INT8 | dict(num_bits=2, strategy="channel")) | dict(ignore=["lm_head"])
    @torch.no_grad()
    def logits(model): return model(**data()[0]).logits
    results = {}
    for who in (reference, ours):
        in_memory, on_disk = llama(), offload(llama(), "disk", tmp_path / who.__name__)
        assert unequal(who(in_memory, data(), **recipe), who(on_disk, data(), **recipe)) == []
        results[who] = logits(in_memory), logits(on_disk)
    assert torch.equal(results[reference][1], logits(llama())) and not torch.equal(*results[reference])
    assert torch.equal(*results[ours]) and torch.equal(results[ours][0], results[reference][0])


def test_its_eager_attention_does_not_reach_the_stacks_of_t5():
    def by_hand():
        model = seq2seq(T5)
        for stack in (model.encoder, model.decoder): stack.config._attn_implementation = "eager"
        return model
    theirs, mine = reference(seq2seq(T5), seq2seq_data(), **STATIC), ours(seq2seq(T5), seq2seq_data(), **STATIC)
    found = unequal(theirs, mine)
    assert found and all(n.endswith("input_scale") and torch.allclose(theirs[n], mine[n], rtol=1e-6) for n in found)
    assert unequal(reference(by_hand(), seq2seq_data(), **STATIC), mine) == []
