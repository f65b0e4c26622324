"""Block by block: as whole passes where outputs are handed on unquantized, as a plain loop where they are quantized;
nothing is left behind."""
import gc
import weakref

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, disable_quantization, enable_quantization
from helpers import differences, fingerprint, make_batches, make_model, outputs, qparams
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from qcal_nb.calibration import claim
from qcal_nb.lifecycle import QuantizationModifier, State, phase_of, reset_quantization
from qcal_nb.pipelines import calibrate, calibration_context
from qcal_nb.pipelines.sequential import BlockByBlock, ForwardPass, look_ahead, run_blocks, waiting_at
from qcal_nb.modeling import blocks_of

INT8 = dict(num_bits=8, type="int", strategy="tensor", symmetric=True)
RECIPE = dict(
    config_groups={
        "g": QuantizationScheme(
            targets=["Linear"], weights=dict(num_bits=4, type="int", strategy="group", group_size=32),
            input_activations=INT8 | dict(observer="static_minmax")
        )
    },
    ignore=["lm_head", "re:.*altup.*"],
)
SMALL_LLAMA = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64
)
BOTH = dict(
    d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=128, decoder_start_token_id=0, pad_token_id=1, bos_token_id=0,
    eos_token_id=2
)
SPECIAL = dict(
    t5=lambda: AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    bart=lambda: AutoModelForSeq2SeqLM.from_config(BartConfig(**BOTH)),
    whisper=lambda: WhisperForConditionalGeneration(WhisperConfig(**BOTH, max_source_positions=16, num_mel_bins=8)),
    # its later blocks read keys and values that earlier ones left in a dict, and outputs of a projection outside of
    # blocks
    gemma3n=lambda: Gemma3nForCausalLM(Gemma3nTextConfig(
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size=64,
        hidden_size_per_layer_input=32,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        sliding_window=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        laurel_rank=32,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )),
    albert=lambda: AlbertModel(AlbertConfig(
        vocab_size=128, embedding_size=32, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128
    )),
)


def make(name):
    if name not in SPECIAL: return make_model(name)
    torch.manual_seed(0)
    return SPECIAL[name]().eval()


def data_for(name):
    data = make_batches()
    if name == "whisper":
        return [
            dict(
                input_features=torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(i)),
                decoder_input_ids=b["input_ids"],
            )
            for i, b in enumerate(data)
        ]
    return [dict(b, decoder_input_ids=b["input_ids"]) for b in data] if name in ("t5", "bart") else data


def result(name, **options):
    model = make(name)
    before = fingerprint(model)
    modifier = QuantizationModifier(**RECIPE)
    calibrate(model, data_for(name), modifier, progress=False, **options)
    found = qparams(model)
    seen = {(r.module, r.base_name): (r.observations, r.batches, r.elements) for r in modifier.coverage}
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == []
    return found, seen


@pytest.mark.parametrize(
    "name", ["llama_gqa", "qwen3", "gemma2", "opt", "phi", "gpt_neox", "mixtral", "bert", *SPECIAL]
)
def test_float_outputs_give_the_scales_of_whole_passes(name):
    "And every observer, inside blocks and outside, has seen the same tensors equally often."
    (basic, seen), (sequential, seen_too) = result(name), result(name, pipeline="sequential")
    assert basic.keys() == sequential.keys() and all(torch.equal(v, sequential[k]) for k, v in basic.items())
    assert seen == seen_too


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "mixtral", "bart", "t5"])
def test_quantized_outputs_change_what_later_blocks_see(name):
    floats, seen = result(name, pipeline="sequential")
    quantized, seen_too = result(name, pipeline="sequential", propagate="quantized")
    first = next(iter(blocks_of(make(name))))
    changed = {k for k, v in floats.items() if not torch.equal(v, quantized[k])}
    assert changed and seen == seen_too and all(k.endswith("input_scale") for k in changed)
    assert not any(k.startswith(f"{first}.") for k in changed)


def layers_of(model): return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "opt", "mixtral"])
def test_quantized_outputs_are_those_of_a_plain_loop(name):
    from qcal_nb.lifecycle import unfuse_experts
    model, data, modifier = make(name), data_for(name), QuantizationModifier(**RECIPE)
    quantized = result(name, pipeline="sequential", propagate="quantized")[0]
    unfuse_experts(model)
    modifier.on_initialize(State(model)); modifier.on_start(State(model))
    with calibration_context(model):
        caught = [[] for _ in data]
        claim(model, "deaf")
        for calls, batch in zip(caught, data):
            def note(m, args, kwargs, calls=calls): calls.append((args, kwargs))
            handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers_of(model)]
            model(**batch)
            for handle in handles: handle.remove()
        claim(model, None)
        hidden = [(calls[0][0] or (calls[0][1]["hidden_states"],))[0] for calls in caught]
        def run(layer, i, h, calls):
            kwargs = {k: v for k, v in calls[i][1].items() if k != "hidden_states"}
            out = layer(h, *calls[i][0][1:], **kwargs)
            return out if isinstance(out, torch.Tensor) else out[0]
        for i, layer in enumerate(layers_of(model)):
            for h, calls in zip(hidden, caught): run(layer, i, h, calls)
            modifier.on_sequential_epoch_end(State(model), None, list(layer.modules()))
            claim(model, "deaf"); layer.apply(enable_quantization)
            hidden = [run(layer, i, h, calls) for h, calls in zip(hidden, caught)]
            layer.apply(disable_quantization); claim(model, None)
    found = qparams(model)
    assert found.keys() == quantized.keys() and all(torch.equal(v, quantized[k]) for k, v in found.items())


@pytest.mark.parametrize("propagate", ["float", "quantized"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_a_later_block_leaves_what_reset_restores(error, propagate):
    model = make("llama_gqa")
    before, exact, calls = fingerprint(model), outputs(model, make_batches()[0]), []
    def fail(*_):
        calls.append(1)
        if len(calls) == 4: raise error("in the middle")
    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    modifier = QuantizationModifier(**RECIPE)
    with pytest.raises(error):
        calibrate(model, make_batches(), modifier, pipeline="sequential", propagate=propagate, progress=False)
    handle.remove()
    assert phase_of(model) == "calibrating" and "forward" not in vars(model.model.layers[0])
    assert not any(m.quantization_enabled for m in model.modules())
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == [] and torch.equal(outputs(model, make_batches()[0]), exact)


def test_each_batch_passes_each_block_once():
    model, calls = make("llama_gqa"), []
    handles = [layer.self_attn.register_forward_pre_hook(lambda m, *_: calls.append(m)) for layer in model.model.layers]
    calibrate(model, make_batches(), QuantizationModifier(**RECIPE), pipeline="sequential", progress=False)
    assert len(calls) == 2 * (1 + 3)  # once to look ahead, and once for each of three batches
    calls.clear(); reset_quantization(model)
    calibrate(
        model, make_batches(), QuantizationModifier(**RECIPE), pipeline="sequential", propagate="quantized",
        progress=False
    )
    assert len(calls) == 2 * (1 + 3 + 3)  # every block is passed a second time, since the head follows the last one
    for handle in handles: handle.remove()


@pytest.mark.parametrize("layers", [2, 8])
@pytest.mark.parametrize(("propagate", "passes"), [("float", 1 + 3), ("quantized", 1 + 3 + 3)])
def test_blocks_are_called_as_often_as_there_are_layers_and_batches(layers, propagate, passes):
    "The call itself counts, also one that would not compute: nothing is started over."
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL_LLAMA, num_hidden_layers=layers)).eval()
    calls = []
    handles = [layer.register_forward_pre_hook(lambda m, *_: calls.append(m)) for layer in model.model.layers]
    inner = [layer.mlp.register_forward_pre_hook(lambda m, *_: calls.append(m)) for layer in model.model.layers]
    outside = [model.model.register_forward_pre_hook(lambda m, *_: calls.append(m))]
    calibrate(
        model, make_batches(), QuantizationModifier(**RECIPE), pipeline="sequential", propagate=propagate,
        progress=False
    )
    # of whole passes, by the model
    assert [sum(m is layer for m in calls) for layer in model.model.layers] == [1 + 3] * layers
    assert [sum(m is layer.mlp for m in calls) for layer in model.model.layers] == [passes] * layers
    assert sum(m is model.model for m in calls) == 1 + 3
    for handle in (*handles, *inner, *outside): handle.remove()


def test_passes_start_over_once_where_a_quantized_module_stands_before_a_block():
    "What goes on has come through the quantized embedding, and a pass cannot go back to before it."
    model, calls = make("llama_gqa"), []
    embedding = QuantizationScheme(targets=["Embedding"], weights=dict(num_bits=4, type="int", strategy="channel"))
    modifier = QuantizationModifier(config_groups=RECIPE["config_groups"] | {"e": embedding}, ignore=["lm_head"])
    handle = model.model.register_forward_pre_hook(lambda m, *_: calls.append(m))
    for propagate, passes in (("float", 1 + 3), ("quantized", 1 + 3 + 3)):
        calls.clear()
        calibrate(model, make_batches(), modifier, pipeline="sequential", propagate=propagate, progress=False)
        assert len(calls) == passes
        reset_quantization(model)
    handle.remove()


def test_a_pass_that_waits_keeps_one_hidden_state():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL_LLAMA, num_hidden_layers=6)).eval()
    returned = []
    def note(m, args, output): returned.append(weakref.ref(output if isinstance(output, torch.Tensor) else output[0]))
    handles = [layer.register_forward_hook(note) for layer in model.model.layers]
    feeds = [lambda batch=batch: model(**batch, use_cache=False) for batch in make_batches()]
    with calibration_context(model), waiting_at(blocks_of(model)):
        way = BlockByBlock(model, look_ahead(model, blocks_of(model), feeds[0]), feeds)
        returned.clear()
        for done in range(6):
            way.go_on(done)
            alive = [kept for kept in returned if kept() is not None]
            assert alive == returned[-3:]  # the last of each batch
        way.close()
    for handle in handles: handle.remove()


def waiting_passes(): return [o for o in gc.get_objects() if isinstance(o, ForwardPass) and not o.dead]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_no_pass_waits_for_ever(error):
    "Also of a model whose own code cleans up: it does, for every batch."
    model, calls, ended = Branching(), [], []
    forward = model.forward
    def cleaning_up(x):
        try: return forward(x)
        finally: ended.append(x)
    model.forward = cleaning_up
    def fail(*_):
        calls.append(1)
        if len(calls) == 1 + 2: raise error("in the middle")
    handle = model.blocks[1].register_forward_hook(fail)
    data = [torch.full((1, 32), float(-i)) for i in range(3)]
    feeds = [lambda batch=batch: model(batch) for batch in data]
    with pytest.raises(error): list(run_blocks(model, feeds, "me", lambda modules: None))
    handle.remove()
    assert len(ended) == 1 + 3 and waiting_passes() == [] and "forward" not in vars(model.blocks[0])


def test_a_model_without_blocks_is_one():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    data = [torch.randn(4, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    calibrate(model, data, QuantizationModifier(**RECIPE), pipeline="sequential", progress=False)
    found = qparams(model)
    reset_quantization(model)
    calibrate(model, data, QuantizationModifier(**RECIPE), progress=False)
    assert found and all(torch.equal(v, qparams(model)[k]) for k, v in found.items())


class Branching(torch.nn.Module):
    "Takes one way or another through its blocks, as the batch says."

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        for block in self.blocks[:2 if x[0, 0] > 0 else 3]: x = block(x)
        return x


def test_batches_that_take_different_ways_are_refused():
    data = [torch.full((1, 32), -1.0), torch.full((1, 32), 1.0)]
    with pytest.raises(ValueError, match="batch 1 takes another way through the blocks than the first one"):
        calibrate(Branching(), data, QuantizationModifier(**RECIPE), pipeline="sequential", progress=False)


@pytest.mark.parametrize(("options", "words"), [
    (
        dict(pipeline="layerwise"),
        "pipeline='layerwise' is unknown; it must be one of 'basic', 'sequential', 'datafree'",
    ),
    (
        dict(propagate="int8", pipeline="sequential"),
        "propagate='int8' is unknown; it must be one of 'float', 'quantized'",
    ),
    (dict(propagate="quantized"), "propagate='quantized' needs pipeline='sequential', got pipeline='basic'"),
])
def test_options_are_checked_before_anything_changes(options, words):
    model = make("llama_gqa")
    before = fingerprint(model)
    with pytest.raises(ValueError) as caught:
        calibrate(model, make_batches(), QuantizationModifier(**RECIPE), progress=False, **options)
    assert words in str(caught.value) and differences(before, fingerprint(model)) == []


def test_gpt2_has_blocks_but_nothing_to_quantize():
    model = make("gpt2")
    assert list(blocks_of(model)) == ["transformer.h.0", "transformer.h.1"]
    with pytest.warns(UserWarning, match="quantizes nothing"):
        calibrate(model, make_batches(), QuantizationModifier(**RECIPE), pipeline="sequential", progress=False)
