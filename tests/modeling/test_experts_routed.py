"""Who saw which token: all experts or those that the router chose, as the reference does it."""
import pytest
import torch
from transformers import (
    Llama4Config,
    Llama4ForConditionalGeneration,
)

from qcal_nb.modeling import all_experts, take_experts_apart, tokens_per_expert, unfused_experts
from qcal_nb.lifecycle import edits, snapshot
from tests.modeling.mixtures import BOTH, CONFIGS, EVERY, HEADS, LLAMA4, linears, logits, make, randomize, same

pytestmark = pytest.mark.usefixtures("one_thread")


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
            if len(args) == 1:
                chosen = [e for e, block in enumerate(args[0].chunk(6)) for row in block if row.abs().sum() > 0]
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
        # one of the two always loses
        for layer in model.model.layers: layer.mlp.gate.weight[4] = -layer.mlp.gate.weight[3]
        for layer in model.model.layers: layer.mlp.gate.weight[4] *= 0
        for layer in model.model.layers: layer.mlp.gate.register_forward_hook(no_expert_four)
    take_experts_apart(model)
    rows = watch(model)
    with all_experts(model, False): logits(model)
    assert [r.tokens for r in tokens_per_expert(model) if r.expert == 4] == [0, 0]
    assert all(not seen for (_, e, _), seen in rows.items() if e == 4) and len(tokens_per_expert(model)) == 12
    with all_experts(model): logits(model)
    # the router's choice, not what was shown
    assert [r.tokens for r in tokens_per_expert(model) if r.expert == 4] == [0, 0]
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


def reference_model(name, dtype):
    if name != "llama4": return make(name, dtype)
    config = Llama4Config(text_config=HEADS | LLAMA4, vision_config=dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=14,
        vision_output_dim=32,
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
    mine, right = ({key: torch.cat(parts) for key, parts in seen.items()} for seen in (mine, right))
    for key in (key for key in mine if not torch.equal(mine[key], right[key])):
        assert behind_a_layout_that_torch_rounds_otherwise(ours, key, mine), key
        torch.testing.assert_close(mine[key], right[key], rtol=2**-6, atol=0)  # a step a factor, one in the product


def behind_a_layout_that_torch_rounds_otherwise(model, key, seen):
    """Whether this is fed by Linears whose product depends on how their weights lie in memory. Experts of Llama 4 are
    stored with rows and columns exchanged; ours are views of that, the reference's are copies. Without bf16
    instructions torch adds up the two in another order."""
    modules, path = dict(model.named_modules()), key.rpartition(".")[0]
    def depends(name):
        x, weight = seen[f"{path}.{name}"], modules[f"{path}.{name}"].weight
        product = torch.nn.functional.linear
        return not weight.is_contiguous() and not torch.equal(product(x, weight), product(x, weight.contiguous()))
    return key.endswith("down_proj") and (depends("gate_proj") or depends("up_proj"))


@pytest.mark.parity
def test_gpt_oss_rounds_as_the_model_and_not_as_the_reference():
    """A known difference: the reference multiplies the activation's factors in another order and adds biases before
    rounding."""
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
        module.register_forward_pre_hook(
            lambda m, args, name=name: seen[name].append(args[0]) if len(args[0]) else None
        )
    return seen
