"""Recipes for so many bytes: small by forecast and when measured, whole units, exact bytes; and refusals in words."""
import itertools

import numpy as np
import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model
from transformers import AutoModelForCausalLM

from qcal_nb.evaluate import allocate, evaluate, pareto
from qcal_nb.evaluate.budget import bytes_in, choices_of, recipe_for, solve, _checked
from qcal_nb.evaluate.sensitivities import Probe
from qcal_nb.lifecycle import QuantizationModifier, phase_of, reset_quantization
from qcal_nb.models import calibration_texts, heldout_texts, load_tiny_llama
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import from_yaml, save_quantized, stored_bytes, to_yaml
from qcal_nb.records import record
from qcal_nb.schemes import preset
from tests.evaluate.test_forecasts import of_length
from tests.records.samples import QUIET


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load_tiny_llama(torch.bfloat16)
    data, held_out = of_length(tokenizer, calibration_texts(), 10), of_length(tokenizer, heldout_texts(), 4)
    return model, data, held_out, record(model, data, gradients=True, **QUIET)


def measured_costs(model, choices, held_out):
    "KL of every unit and candidate by itself."
    cost = np.zeros_like(choices.cost)
    for i in range(len(choices.labels)):
        everywhere = recipe_for(choices, [i] * len(choices.units))
        if everywhere is None: continue
        calibrate(model, None, everywhere, progress=False)
        probe = Probe(model, [dict(input_ids=ids) for ids in held_out])
        cost[:, i] = [probe(names).kl for names in choices.units.values()]
        reset_quantization(model)
    return cost


def real_kl(model, recipe, held_out):
    calibrate(model, None, recipe, progress=False)
    kl = evaluate(model, held_out, progress=False).kl
    reset_quantization(model)
    return kl


def test_mixtures_are_as_good_as_those_by_measured_kl(tiny):
    model, _, held_out, made = tiny
    choices = choices_of(made, model, _checked(None))
    cost = measured_costs(model, choices, held_out[:2])
    for budget in (1_900_000, 2_200_000, 2_600_000, 3_200_000):
        found = allocate(made, model, budget)
        other = recipe_for(choices, solve(cost, choices.size, budget - choices.rest))
        ours, theirs = (real_kl(model, recipe, held_out) for recipe in (found.recipe, other))
        assert ours <= 1.10 * theirs, (budget, ours, theirs)
        assert 0.7 < found.kl / ours < 1.2 or ours < 5e-4  # where bf16 rounds as much


def test_bytes_are_those_of_the_checkpoint_which_loads(tiny, tmp_path):
    model, _, held_out, made = tiny
    before = fingerprint(model)
    table = pareto(made, model)
    assert differences(before, fingerprint(model)) == [] and phase_of(model) == "original"
    for i in (1, len(table) // 2, len(table) - 3):
        row = table.iloc[i]
        recipe = from_yaml(to_yaml(row.recipe))
        calibrate(model, None, recipe, progress=False)
        assert stored_bytes(model) == row.bytes
        save_quantized(model, tmp_path/str(i))
        with torch.no_grad(): expected = model(held_out[0]).logits
        reset_quantization(model)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path/str(i), dtype=torch.bfloat16)
        with torch.no_grad(): assert torch.equal(loaded(held_out[0]).logits, expected)


def test_the_frontier_falls_and_knows_uniform_schemes(tiny):
    model, *_, made = tiny
    table = pareto(made, model, {"W4A16": preset("W4A16"), "FP8_DYNAMIC": "FP8_DYNAMIC", "no": None})
    assert table.bytes.is_monotonic_increasing and {"W4A16", "FP8_DYNAMIC", "no"} <= set(table.mix)
    mixtures = table[table.mix.str.contains(",")]
    assert len(mixtures) >= 10 and mixtures.kl.is_monotonic_decreasing
    best = table.kl.cummin()
    uniform = table[table.mix == "FP8_DYNAMIC"]
    assert (best[uniform.index] <= uniform.kl).all()


def test_units_are_whole_and_kept_modules_stay(tiny):
    model, *_, made = tiny
    found = allocate(made, model, "2.7 MB", keep=["re:.*layers.0.*o_proj"])
    targets = {group: scheme.targets for group, scheme in found.recipe.resolved_config.config_groups.items()}
    of = {name: group for group, some in targets.items() for name in some}
    for layer in range(4):
        for names in (("q", "k", "v"), ("gate", "up")):
            part = "self_attn" if "q" in names else "mlp"
            groups = {of.get(rf"re:^model\.layers\.{layer}\.{part}\.{n}_proj$") for n in names}
            assert len(groups) == 1, (layer, names, groups)
    assert not any("layers\\.0\\.self_attn\\.o_proj" in name for name in of)


def test_a_budget_that_holds_everything_quantizes_nothing(tiny):
    model, *_, made = tiny
    found = allocate(made, model, "1 GB")
    assert found.recipe is None and found.kl == 0 and found.bytes == stored_bytes(model)
    assert set(found.table.scheme) == {"unquantized"} and (found.table.next_scheme == "").all()


def test_the_solver_is_near_the_best_choice():
    drawn = np.random.default_rng(1)
    off = []
    for _ in range(40):
        units, schemes = int(drawn.integers(2, 8)), int(drawn.integers(2, 5))
        cost = np.sort(drawn.exponential(1.0, (units, schemes)), 1)[:, ::-1] * drawn.exponential(1.0, (units, 1))**2
        size = np.sort(drawn.integers(10, 400, (units, schemes)), 1).astype(float)
        every = np.array(list(itertools.product(range(schemes), repeat=units)))
        costs, sizes = (table[np.arange(units), every].sum(1) for table in (cost, size))
        budget = size.min(1).sum() + drawn.random() * (size.max(1).sum() - size.min(1).sum())
        choice = solve(cost, size, budget)
        assert size[np.arange(units), choice].sum() <= budget
        off.append(cost[np.arange(units), choice].sum() / costs[sizes <= budget].min())
    assert np.median(off) < 1.01 and max(off) < 1.5, sorted(off)[-3:]


def test_a_scheme_that_does_not_fit_a_unit_is_not_chosen_for_it():
    model = make_model("llama_gqa")
    made = record(model, make_batches(5), gradients=True, **QUIET)
    wide = {"W4A16": "W4A16", "W8": dict(weights=dict(num_bits=8, strategy="channel"))}
    found = allocate(made, model, 10**9, wide)
    fits = found.table.unit.str.contains("down_proj")
    assert set(found.table.scheme[~fits]) == {"W8"}
    with pytest.raises(ValueError, match="candidates: none of .* fits model.layers.0.self_attn.q_proj"):
        allocate(made, model, 10**9, {"W4A16": "W4A16"})


@pytest.mark.parametrize("said, is_", [("5 GB", 5e9), ("120MB", 1.2e8), (" 1.5 gib ", 1.5 * 2**30), (7, 7.0)])
def test_budgets_in_words(said, is_): assert bytes_in(said) == is_


@pytest.mark.parametrize("budget", [0, -1, "much", "5", "5 XB", None, True, float("nan"), "1..2 MB", ". MB"])
def test_no_budget(budget):
    with pytest.raises(ValueError, match="must be bytes above 0, as a number or such as '120 MB'"): bytes_in(budget)


def test_refusals(tiny):
    model, *_, made = tiny
    with pytest.raises(ValueError, match="the smallest mixture of W4A16, W8A16, unquantized takes 1,745,856 bytes"):
        allocate(made, model, "1 MB")
    with pytest.raises(TypeError, match="candidates must be a dict"): allocate(made, model, "3 MB", ["W4A16"])
    two = QuantizationModifier(config_groups=dict(a=preset("W4A16", ["re:.*q_proj"]), b=preset("FP8", ["re:.*o_proj"])))
    with pytest.raises(ValueError, match="a candidate is one scheme"): allocate(made, model, "3 MB", {"two": two})
    with pytest.raises(ValueError, match="the record has no gradients"): pareto(made.without_gradients(), model)


def test_all_experts_of_a_layer_have_one_scheme():
    "vLLM runs them in one kernel, and asks the first for the scheme of all."
    model = make_model("mixtral")
    made = record(model, make_batches(5), gradients=True, **QUIET)
    sizes = pareto(made, model).bytes
    for budget in np.linspace(sizes.min(), sizes.max(), 5)[:-1]:
        found = allocate(made, model, float(budget))
        experts = found.table[found.table.unit.str.endswith("experts")]
        assert list(experts.unit) == [f"model.layers.{n}.mlp.experts" for n in range(len(experts))] and len(experts)
        assert all(len(names) == 3 * model.config.num_local_experts for names in experts.modules)
        assert stored_bytes(calibrate(make_model("mixtral"), None, found.recipe, progress=False)) == found.bytes
    kept = allocate(made, model, float(sizes.max()), keep=["re:.*layers.0.mlp.experts.1.down_proj"])
    assert "model.layers.0.mlp.experts" not in set(kept.table.unit) >= {"model.layers.1.mlp.experts"}


def test_an_expert_without_tokens_has_the_scheme_of_the_others():
    model = make_model("mixtral")
    made = record(model, [torch.full((1, 2), 7)] * 5, gradients=True, **QUIET)
    unseen = [name for name, tokens in made.expert_tokens.items() if not tokens]
    assert unseen
    table = allocate(made, model, float(pareto(made, model).bytes.min())).table.set_index("unit")
    for name in unseen: assert f"{name}.up_proj" in table.modules[name.rpartition(".")[0]]


@pytest.mark.parametrize("keep, words", [
    (["nonsense"], "keep: 'nonsense' matches none of the 28 recorded modules"),
    ("model.layers.0", r"'re:model\.layers\.0\..*' matches the 7 in it"),
])
def test_a_kept_module_that_is_none(tiny, keep, words):
    model, _, _, made = tiny
    before = fingerprint(model)
    with pytest.raises(ValueError) as found: allocate(made, model, "2.7 MB", keep=keep)
    assert words in str(found.value) and differences(before, fingerprint(model)) == []
