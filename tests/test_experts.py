"""Fused experts taken apart into Linear modules: the same logits to the last bit, no memory, and everything back in its place afterwards."""
import gc
import weakref
from copy import deepcopy

import pytest
import torch
from helpers import SMALL, differences, fingerprint, make_batches, make_model, outputs
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    JetMoeConfig,
    Lfm2MoeConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    MiniMaxConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import qcal_nb.experts as experts_module
from qcal_nb.calibration import exclusive
from qcal_nb.experts import (
    BiasedLinear,
    all_experts,
    expert_layout,
    fused_experts,
    implementation_of,
    matches_experts,
    refused_experts,
    tokens_per_expert,
    take_experts_apart,
    unfused_experts,
)
from qcal_nb.snapshots import edits, restore, snapshot, undo

HEADS = SMALL | dict(num_key_value_heads=2, head_dim=16, pad_token_id=0)
MLA = SMALL | dict(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
DEEPSEEK = dict(intermediate_size=96, moe_intermediate_size=48, n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=3,
                first_k_dense_replace=0, n_group=1, topk_group=1)
LLAMA4 = dict(intermediate_size=96, intermediate_size_mlp=96, num_local_experts=6, num_experts_per_tok=1)
CONFIGS = dict(
    mixtral=lambda: MixtralConfig(**HEADS, intermediate_size=96, num_local_experts=6, num_experts_per_tok=3),
    qwen2_moe=lambda: Qwen2MoeConfig(**SMALL, num_key_value_heads=2, moe_intermediate_size=48, shared_expert_intermediate_size=32,
                                     num_experts=6, num_experts_per_tok=3),
    qwen3_moe=lambda: Qwen3MoeConfig(**HEADS, moe_intermediate_size=48, num_experts=6, num_experts_per_tok=3),
    olmoe=lambda: OlmoeConfig(**SMALL, num_key_value_heads=2, intermediate_size=48, num_experts=6, num_experts_per_tok=3),
    deepseek_v3=lambda: DeepseekV3Config(**MLA, **DEEPSEEK),
    glm4_moe=lambda: Glm4MoeConfig(**HEADS, **DEEPSEEK),
    gpt_oss=lambda: GptOssConfig(**HEADS, intermediate_size=48, num_local_experts=6, num_experts_per_tok=3),
    granitemoe=lambda: GraniteMoeConfig(**SMALL, num_key_value_heads=2, intermediate_size=48, num_local_experts=6, num_experts_per_tok=3),
    phimoe=lambda: PhimoeConfig(**SMALL, num_key_value_heads=2, intermediate_size=48, num_local_experts=6),
    lfm2_moe=lambda: Lfm2MoeConfig(**SMALL, num_key_value_heads=2, intermediate_size=96, moe_intermediate_size=48, num_experts=6,
                                   num_experts_per_tok=3, num_dense_layers=0, layer_types=["conv", "full_attention"]),
    minimax=lambda: MiniMaxConfig(**HEADS, intermediate_size=48, num_local_experts=6, num_experts_per_tok=3),
    nemotron_h=lambda: NemotronHConfig(**HEADS | dict(num_hidden_layers=None), layers_block_type=["attention", "moe"], n_routed_experts=6,
                                       num_experts_per_tok=3, moe_intermediate_size=48, moe_shared_expert_intermediate_size=32, n_group=1,
                                       topk_group=1),
    llama4=lambda: Llama4TextConfig(**HEADS, **LLAMA4),
)
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
EVERY = pytest.mark.parametrize("name", CONFIGS)
BOTH = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def make(name, dtype=torch.float32, implementation=None):
    "A small model whose parameters are all random and not small, biases too."
    config = CONFIGS[name]()
    if implementation: config._experts_implementation = implementation
    return randomize(AutoModelForCausalLM.from_config(config)).to(dtype).eval()


@torch.no_grad()
def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters(): p.copy_(0.15 * torch.randn(p.shape, generator=generator))
    return model


def logits(model): return [outputs(model, batch) for batch in make_batches(2)]


def same(a, b): return all(torch.equal(x, y) and not x.isnan().any() for x, y in zip(a, b, strict=True))


def memory(*modules):
    "Bytes behind parameters and buffers, shared memory counted once."
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def linears(model):
    "The Linears of a model's experts, by (container, expert, projection)."
    return {(name, e, part): linear for name, group in unfused_experts(model).items() for e, expert in enumerate(group)
            for part, linear in expert.named_children()}


# --- the same model ---

@BOTH
@EVERY
def test_logits_to_the_last_bit_and_back(name, dtype):
    "With transformers' default implementation, and nothing is left when it is undone."
    model = make(name, dtype)
    fused, before, prior, state = fused_experts(model), logits(model), fingerprint(model), snapshot(model)
    kinds = {implementation_of(m) for m in fused.values()}
    assert fused and kinds == ({"eager"} if name == "llama4" else {"grouped_mm"})
    assert take_experts_apart(model) is model and not fused_experts(model) and unfused_experts(model).keys() == fused.keys()
    assert same(before, logits(model))
    for path, old in fused.items(): assert model.get_submodule(path) is not old
    restore(model, state)
    assert all(model.get_submodule(path) is old for path, old in fused.items())
    assert differences(prior, fingerprint(model)) == [] and not edits(state, snapshot(model)) and same(before, logits(model))


@BOTH
@EVERY
def test_logits_of_the_eager_implementation(name, dtype):
    model = make(name, dtype, "eager")
    before = logits(model)
    assert {implementation_of(m) for m in fused_experts(model).values()} == {"eager"}
    assert same(before, logits(take_experts_apart(model)))


def test_the_order_of_a_sum_matters():
    "What the two tests above can see: the other implementation's order gives other bits."
    model = make("mixtral", torch.bfloat16)
    before = logits(model)
    take_experts_apart(model).config._experts_implementation = "eager"
    assert not same(before, logits(model))


@EVERY
def test_no_memory_and_the_same_storage(name):
    model = make(name)
    fused, before = list(fused_experts(model).values()), memory(model)
    stacks = {p.untyped_storage().data_ptr() for m in fused for p in m.parameters()}
    take_experts_apart(model)
    assert memory(model) == before == memory(model, *fused)
    found = {p.untyped_storage().data_ptr() for linear in linears(model).values() for p in linear.parameters()}
    assert found == stacks
    count = sum(p.numel() for linear in linears(model).values() for p in linear.parameters())
    assert count == sum(p.numel() for m in fused for p in m.parameters())  # every number once


@EVERY
def test_names_and_kinds(name):
    model = take_experts_apart(make(name))
    parts = ["up_proj", "down_proj"] if name == "nemotron_h" else ["gate_proj", "up_proj", "down_proj"]
    for path, group in unfused_experts(model).items():
        assert [key for key, _ in group.named_children()] == [str(i) for i in range(6)] and len(group[:2]) == 2
        for e in range(6):
            assert [key for key, _ in model.get_submodule(f"{path}.{e}").named_children()] == parts
            assert f"{path}.{e}.up_proj.weight" in model.state_dict()
    for linear in linears(model).values():
        assert isinstance(linear, torch.nn.Linear) and linear.weight.shape == (linear.out_features, linear.in_features)
        assert isinstance(linear, BiasedLinear) == (name == "gpt_oss") == (linear.bias is not None)


def test_no_random_number_is_drawn():
    model = make("mixtral")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    take_experts_apart(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_twice_and_without_experts():
    model = take_experts_apart(make("mixtral"))
    prior = fingerprint(model)
    take_experts_apart(model)
    assert differences(prior, fingerprint(model)) == []
    llama = make_model("llama_gqa")
    prior = fingerprint(llama)
    assert take_experts_apart(llama) is llama and differences(prior, fingerprint(llama)) == [] and tokens_per_expert(llama) == []


def test_weights_written_through_either_are_seen_by_both():
    model = make("gpt_oss")
    (path, fused), *_ = fused_experts(model).items()
    expert = unfused_experts(take_experts_apart(model))[path][2]
    with torch.no_grad(): expert.up_proj.weight.fill_(7.0)
    assert (fused.gate_up_proj[2, :, 1::2] == 7).all() and not (fused.gate_up_proj[2, :, 0::2] == 7).any()
    with torch.no_grad(): fused.down_proj_bias[2] = 3.0
    assert (expert.down_proj.bias == 3).all()


def test_hooks_on_the_experts_keep_working():
    model = make("mixtral")
    state, heard = snapshot(model), []
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, args: heard.append(type(m).__name__))
    take_experts_apart(model)
    logits(model)
    assert heard == ["UnfusedExperts"] * 2
    handle.remove()
    logits(model)
    assert len(heard) == 2
    restore(model, state)
    assert not model.model.layers[0].mlp.experts._forward_pre_hooks


def test_experts_used_in_two_places_stay_one():
    model = make("mixtral")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    before = logits(model)
    take_experts_apart(model)
    assert model.model.layers[1].mlp.experts is model.model.layers[0].mlp.experts and len(unfused_experts(model)) == 1
    assert same(before, logits(model))


def test_nothing_keeps_the_model_alive():
    model = take_experts_apart(make("mixtral"))
    stack = weakref.ref(model.model.layers[0].mlp.experts.source[0].down_proj)
    del model
    gc.collect()
    assert stack() is None


# --- copies, casts, files ---

@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "llama4"])
def test_a_deep_copy_is_as_small_and_shares_nothing(name):
    model = make(name)
    before, size = logits(model), memory(model)
    take_experts_apart(model)
    twin = deepcopy(model)
    sources = [group.source[0] for group in unfused_experts(twin).values()]
    assert same(before, logits(twin)) and memory(twin) == size == memory(twin, *sources)
    assert memory(model, twin) == 2 * size
    with torch.no_grad():
        for p in twin.parameters(): p.zero_()
    assert same(before, logits(model)) and not any(s.down_proj.any() for s in sources)


def test_a_deep_copy_keeps_a_weight_that_was_replaced():
    model = take_experts_apart(make("mixtral"))
    linear = model.model.layers[0].mlp.experts[1].up_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone() + 1)
    twin = deepcopy(model)
    other = twin.model.layers[0].mlp.experts[1].up_proj
    assert torch.equal(other.weight, linear.weight) and other.weight.data_ptr() != linear.weight.data_ptr() and same(logits(twin), logits(model))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_cast_reaches_the_stacks(name):
    "`model.to(...)` between unfusing and undoing: the module that comes back was cast with the others."
    model, plain = make(name), make(name).bfloat16()
    state, parameters = snapshot(model), dict(model.named_parameters())
    done = edits(state, snapshot(take_experts_apart(model)))
    model.bfloat16()
    assert memory(model, *(g.source[0] for g in unfused_experts(model).values())) == memory(plain) and same(logits(plain), logits(model))
    undo(done)
    assert all(p is parameters[name] and p.dtype == torch.bfloat16 for name, p in model.named_parameters()) and same(logits(plain), logits(model))


def test_a_state_dict_goes_both_ways():
    model, other = make("deepseek_v3"), make("deepseek_v3")
    state, before = snapshot(other), logits(model)
    with torch.no_grad():
        for p in other.parameters(): p.zero_()
    take_experts_apart(other).load_state_dict(take_experts_apart(model).state_dict())
    restore(other, state)
    assert same(before, logits(other))


def test_weights_on_the_meta_device():
    "Without values there is nothing to compute with, but the structure can be had."
    model = take_experts_apart(make("mixtral").to("meta"))
    assert len(linears(model)) == 2 * 6 * 3 and all(p.is_meta for p in model.parameters())


def test_offloaded_experts():
    "Kept in CPU memory by compressed-tensors: the Linears are offloaded as the stacks were, and share their memory."
    from compressed_tensors.offload import disable_onloading, offload_module
    model = make("mixtral")
    before = logits(model)
    (path, fused), *_ = fused_experts(model).items()
    offload_module(fused, "cpu", "cpu")
    state = snapshot(model)
    take_experts_apart(model)
    linear = model.get_submodule(path)[0].gate_proj
    assert type(linear._parameters).__name__ == "CPUCache" and same(before, logits(model))
    with disable_onloading():
        assert linear._parameters["weight"].untyped_storage().data_ptr() == fused._parameters["gate_up_proj"].untyped_storage().data_ptr()
    restore(model, state)
    assert model.get_submodule(path) is fused and same(before, logits(model))


def test_experts_on_disk(tmp_path):
    from compressed_tensors.offload import offload_module
    model = make("mixtral")
    before = logits(model)
    (path, fused), *_ = fused_experts(model).items()
    offload_module(fused, torch.device("cpu"), "disk", offload_dir=str(tmp_path))
    take_experts_apart(model)
    assert type(model.get_submodule(path)[0].gate_proj._parameters).__name__ == "DiskCache" and same(before, logits(model))


# --- what cannot be taken apart ---

def unfuse_warns(model, match):
    prior = fingerprint(model)
    with pytest.warns(UserWarning, match=match): take_experts_apart(model)
    assert differences(prior, fingerprint(model)) == []


def test_matrices_of_another_form_stay():
    jet = AutoModelForCausalLM.from_config(JetMoeConfig(**SMALL, num_key_value_heads=4, kv_channels=16, num_local_experts=4, intermediate_size=96))
    assert not fused_experts(jet) and all("weight" in reason for reason in refused_experts(jet).values())
    unfuse_warns(jet, "input_linear and 7 more stay fused")


def test_experts_that_compute_something_else_stay():
    class OddExperts(type(make("mixtral").model.layers[0].mlp.experts)):
        def forward(self, hidden_states, top_k_index, top_k_weights): return 2 * super().forward(hidden_states, top_k_index, top_k_weights)
    model = make("mixtral", implementation="eager")
    model.model.layers[1].mlp.experts.__class__ = OddExperts
    assert len(fused_experts(model)) == 2  # it looks like any other
    with pytest.warns(UserWarning, match="layers.1.*computes something else"): take_experts_apart(model)
    assert list(unfused_experts(model)) == ["model.layers.0.mlp.experts"]


@pytest.mark.parametrize("spoil, reason", [
    (lambda m: m.register_parameter("extra", torch.nn.Parameter(torch.zeros(2))), "its parameters are"),
    (lambda m: setattr(m, "down_proj", torch.nn.Parameter(m.down_proj[1:].detach())), "do not fit together"),
    (lambda m: setattr(m, "is_transposed", True), "do not fit together"),
    (lambda m: m.to(torch.float8_e4m3fn), "float8_e4m3fn: quantized already"),
    (lambda m: setattr(m, "forward", lambda *a: None), "forward was replaced"),
    (lambda m: m._modules.pop("act_fn"), "no act_fn"),
])
def test_reasons(spoil, reason):
    model = make("mixtral")
    spoil(fused := model.model.layers[0].mlp.experts)
    if reason == "no act_fn": type(fused)._apply_gate, gate = None, type(fused)._apply_gate
    try:
        if reason == "no act_fn": del type(fused)._apply_gate
        assert reason in refused_experts(model)["model.layers.0.mlp.experts"]
        with pytest.raises(ValueError, match=reason): expert_layout(fused)
        with pytest.warns(UserWarning, match=reason): take_experts_apart(model)
        assert model.model.layers[0].mlp.experts is fused and list(unfused_experts(model)) == ["model.layers.1.mlp.experts"]
    finally:
        if reason == "no act_fn": type(fused)._apply_gate = gate


def test_the_experts_alone_have_no_place_to_be_replaced_in():
    fused = make("mixtral").model.layers[0].mlp.experts
    with pytest.warns(UserWarning, match="MixtralExperts stay fused.*the whole model"): take_experts_apart(fused)
    assert not unfused_experts(fused)


@pytest.mark.parametrize("call", [take_experts_apart, fused_experts, refused_experts])
def test_not_a_model(call):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"): call("mixtral")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("what", ["_linear", "UnfusedExperts", "_prove"])
def test_all_or_nothing(what, error, monkeypatch):
    "A failure at the second layer leaves the first as it was, too."
    model, calls, right = make("mixtral"), [], getattr(experts_module, what)
    prior, limit = fingerprint(model), dict(_linear=25).get(what, 1)
    def failing(*args):
        calls.append(args)
        if len(calls) > limit: raise error("no memory")
        return right(*args)
    monkeypatch.setattr(experts_module, what, failing)
    with pytest.raises(error, match="no memory"): take_experts_apart(model)
    assert len(calls) == limit + 1 and differences(prior, fingerprint(model)) == []


def test_a_model_in_use_is_left_alone():
    import threading
    model, refused = make("mixtral"), []
    def attempt():
        try: take_experts_apart(model)
        except Exception as e: refused.append(str(e))
    with exclusive(model, "calibrate()"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "calibrate() is at work" in refused[0] and len(fused_experts(model)) == 2


def test_which_targets_concern_experts():
    model = make("qwen2_moe")
    for targets, ignore, expected in ((["Linear"], [], True), (["re:.*experts.5.gate_proj$"], [], True), (["re:.*experts.6.gate_proj$"], [], False),
                                      (["re:.*shared_expert.*"], [], False), (["Linear"], ["re:.*mlp.experts.*"], False), (["Embedding"], [], False)):
        assert matches_experts(model, targets, ignore) == expected, (targets, ignore)
        apart = take_experts_apart(deepcopy(model))
        from compressed_tensors.utils.match import match_named_modules
        names = {n for n, _ in match_named_modules(apart, targets, ignore)}
        assert any(".experts." in n for n in names) == expected
    assert not matches_experts(make_model("llama_gqa"), ["Linear"])


# --- who saw what ---

def watch(model):
    "Rows that each Linear of each expert was called with."
    rows = {key: [] for key in linears(model)}
    for key, linear in linears(model).items():
        linear.register_forward_pre_hook(lambda m, args, key=key: rows[key].append(len(args[0])))
    return rows


def routed(model, call):
    "How often each expert stands in what the routers chose, found without the code under test."
    counts = {name: torch.zeros(6, dtype=torch.int64) for name in unfused_experts(model)}
    def hook(name):
        def count(module, args):
            if len(args) == 1: chosen = [e for e, block in enumerate(args[0].chunk(6)) for row in block if row.abs().sum() > 0]
            else: chosen = args[1].flatten().tolist()
            for e in chosen: counts[name][e] += 1
        return count
    handles = [group.register_forward_pre_hook(hook(name)) for name, group in unfused_experts(model).items()]
    call()
    for handle in handles: handle.remove()
    return counts


@EVERY
def test_all_experts_see_all_tokens(name):
    model = take_experts_apart(make(name))
    rows = watch(model)
    with all_experts(model): logits(model)
    tokens = 2 * 16 * (6 if name == "llama4" else 1)  # Llama 4 gives every expert a block of all tokens
    assert all(seen == [tokens] * 2 for seen in rows.values())


@EVERY
def test_counts_are_the_routers(name):
    model = take_experts_apart(make(name))
    rows = watch(model)
    with all_experts(model, False): counts = routed(model, lambda: logits(model))
    found = {}
    for row in tokens_per_expert(model): found.setdefault(row.module, []).append(row.tokens)
    assert found == {name: c.tolist() for name, c in counts.items()} and sum(map(sum, found.values())) > 0
    if name == "llama4": return  # its Linears see the empty rows too
    for (path, e, _), seen in rows.items(): assert sum(seen) == found[path][e]


def test_an_expert_never_chosen_is_visible():
    model = make("mixtral")
    with torch.no_grad():
        for layer in model.model.layers: layer.mlp.gate.weight[4] = -layer.mlp.gate.weight[3]  # one of the two always loses
        for layer in model.model.layers: layer.mlp.gate.weight[4] *= 0
        for layer in model.model.layers: layer.mlp.gate.register_forward_hook(no_expert_four)
    take_experts_apart(model)
    rows = watch(model)
    with all_experts(model, False): logits(model)
    assert [r.tokens for r in tokens_per_expert(model) if r.expert == 4] == [0, 0]
    assert all(not seen for (_, e, _), seen in rows.items() if e == 4) and len(tokens_per_expert(model)) == 12
    with all_experts(model): logits(model)
    assert [r.tokens for r in tokens_per_expert(model) if r.expert == 4] == [0, 0]  # the router's choice, not what was shown
    assert all(seen for (_, e, _), seen in rows.items() if e == 4)


def no_expert_four(module, args, output):
    logits_, weights, chosen = output
    return logits_, weights, torch.where(chosen == 4, 5, chosen)


def test_counting_only_inside_the_block_and_never_in_place():
    model = take_experts_apart(make("mixtral"))
    group = next(iter(unfused_experts(model).values()))
    logits(model)
    assert group.tokens is None and {r.tokens for r in tokens_per_expert(model)} == {0}
    with all_experts(model, False): logits(model)
    first, kept = group.tokens, group.tokens.clone()
    assert first.dtype == torch.int64 and first.sum() == 2 * 32 * 3
    logits(model)
    assert group.tokens is first
    with all_experts(model): logits(model)
    assert torch.equal(first, kept) and torch.equal(group.tokens, 2 * kept)


def test_the_block_restores_itself():
    model, other = take_experts_apart(make("gpt_oss")), take_experts_apart(make("gpt_oss"))
    state = snapshot(model)
    def flags(m): return {group.calibrating for group in unfused_experts(m).values()}
    with all_experts(model):
        assert flags(model) == {True} and flags(other) == {None}
        with all_experts(model, False): assert flags(model) == {False}
        assert flags(model) == {True}
    with pytest.raises(RuntimeError, match="stop"), all_experts(model): raise RuntimeError("stop")
    assert not edits(state, snapshot(model))
    with pytest.raises(TypeError, match="enabled='yes'"), all_experts(model, "yes"): pass


# --- the reference ---

def reference_model(name, dtype):
    if name != "llama4": return make(name, dtype)
    config = Llama4Config(text_config=HEADS | LLAMA4, vision_config=dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=14, vision_output_dim=32,
        projector_input_dim=32, projector_output_dim=32))
    config.text_config.dtype = dtype  # the reference makes its Linears in the config's dtype
    return randomize(Llama4ForConditionalGeneration(config)).to(dtype).eval()


@pytest.mark.parity
@pytest.mark.parametrize("every", [True, False], ids=["all experts", "routed only"])
@BOTH
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt_oss"])
def test_while_calibrating_the_same_bits_as_the_reference(name, dtype, every):
    "Every activation that an observer would see, and the logits."
    pytest.importorskip("llmcompressor", reason="no reference: pip install -e '.[dev]'")
    from llmcompressor.modeling.moe.context import moe_calibration_context
    from llmcompressor.modeling.moe.linearize import linearize_moe
    ours, theirs = reference_model(name, dtype), reference_model(name, dtype)
    for config in (theirs.config, getattr(theirs.config, "text_config", theirs.config)): config.dtype = dtype
    linearize_moe(theirs)
    take_experts_apart(ours)
    mine, right = inputs_of(ours), inputs_of(theirs)
    with all_experts(ours, every): a = logits(ours)
    if every:
        with moe_calibration_context(): b = logits(theirs)
    else: b = logits(theirs)
    assert same(a, b)
    assert mine.keys() == right.keys() and len(mine) >= 12
    unequal = [key for key in mine if not torch.equal(torch.cat(mine[key]), torch.cat(right[key]))]
    assert unequal == []


@pytest.mark.parity
def test_gpt_oss_rounds_as_the_model_and_not_as_the_reference():
    "A known difference: the reference multiplies the activation's factors in another order and adds biases before rounding."
    pytest.importorskip("llmcompressor", reason="no reference: pip install -e '.[dev]'")
    from llmcompressor.modeling.moe.linearize import linearize_moe
    plain, ours, theirs = (make("gpt_oss", implementation="eager") for _ in range(3))
    theirs.config.dtype = torch.float32
    take_experts_apart(ours)
    linearize_moe(theirs)
    right = logits(plain)
    assert same(logits(ours), right) and not same(logits(theirs), right)
    for a, b in zip(logits(theirs), right): torch.testing.assert_close(a, b)


def inputs_of(model):
    "What every Linear of every expert is called with; calls without tokens left out."
    seen = {}
    for name, module in model.named_modules():
        if not (isinstance(module, torch.nn.Linear) and ".experts." in name): continue
        seen[name] = [torch.empty(0, module.in_features, dtype=module.weight.dtype)]
        module.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0]) if len(args[0]) else None)
    return seen
