"""What an observer costs the model: from all tokens, with and without gradients, kept, shipped and merged."""
import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from helpers import make_batches, make_model

from qcal_nb.analysis import compare_observers, per_reader
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.observers import CLIPS, DEFAULT_ARGS
from qcal_nb.records import CalibrationRecord, input_costs, record, result_of
from qcal_nb.records.gradient_collector import GradientCollector
from qcal_nb.records.kept_forecasts import forecasts_from_tree, forecasts_to_tree
from qcal_nb.records.module_costs import RECORDED
from qcal_nb.stats import mean_of_parts
from tests.records.samples import QUIET

FP8 = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor")
INT4 = QuantizationArgs(num_bits=4, symmetric=True, strategy="tensor")
UNEVEN = QuantizationArgs(num_bits=8, symmetric=False, strategy="tensor")


@pytest.fixture(scope="module")
def tiny():
    "The embedded model, its record, and every token that was recorded: (x, h²) of each module, batch by batch."
    model, tokenizer = load_tiny_llama()
    texts = [text for text in calibration_texts() if len(text) > 700][:6]
    options = dict(tokenizer=tokenizer, max_length=128, progress=False)
    seen = {}
    see = GradientCollector.see
    def keep(self, name, x, g, h):
        tokens = x.detach().clone().reshape(-1, x.shape[-1])
        seen.setdefault(name, []).append((tokens, h.reshape(-1, h.shape[-1]).float()))
        see(self, name, x, g, h)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientCollector, "see", keep)
        made = record(model, texts, scheme="INT8_STATIC", observers=["minmax", "mse"], gradients=True, **options)
    return model, made, seen


def exact(seen, readers, result, labels):
    "½ Σ h² (QDQ(x) - x)² over all tokens of all readers, per label, part by part."
    costs = torch.zeros(5, dtype=torch.float64)
    for name in readers:
        for batch, (x, h) in enumerate(seen[name]):
            error = fake_quantize(x, result.scale, result.zero_point, result.args) - x
            costs[batch % 5] += (h.double().square() * error.double().square()).sum() / 2
    return costs / torch.tensor(labels)


@pytest.mark.parametrize("args", [DEFAULT_ARGS, FP8, INT4, UNEVEN], ids=["int8", "fp8", "int4", "uneven"])
def test_it_is_the_sum_over_all_tokens_within_two_percent(tiny, args):
    _, made, seen = tiny
    checked = 0
    for key, readers in made.readers.items():
        if key[1] != "input": continue
        for observer in ("static_minmax", "percentile", "entropy", "fisher_mse"):
            result = result_of(made, key, observer, args)
            wanted = exact(seen, readers, result, made.labels)
            told = input_costs(made, key, result)
            assert told.sum().item() == pytest.approx(wanted.sum().item(), rel=0.02), (key, observer)
            assert torch.allclose(told, wanted, rtol=0.05), (key, observer)     # a part is 128 tokens
            checked += 1
    assert checked == 16 * 4


def test_the_table_has_it_and_the_search_is_the_cheapest_of_97_clips(tiny):
    _, made, _ = tiny
    table = compare_observers(made, progress=False)
    inputs = table[table.base_name == "input"]
    assert inputs.kl.notna().all() and table[table.base_name == "weight"].kl.isna().all()
    mean = inputs.kl_parts.map(lambda parts: sum(parts) / 5)
    searched = mean[inputs.observer == "fisher_mse"].to_numpy()
    whole = mean[inputs.observer == "static_minmax"].to_numpy()
    assert (searched <= whole * (1 + 1e-9)).all() and (searched < 0.9 * whole).sum() > 8
    shipped = made.without_gradients()
    for module, base in made.readers:
        if base != "input": continue
        clips = shipped.forecasts.inputs[module].clips
        chosen = result_of(made, (module, base), "fisher_mse").scale
        full = result_of(made, (module, base), "static_minmax").scale
        assert (chosen / full).item() == pytest.approx(CLIPS[clips.mean(1).argmin()], rel=1e-3)


def test_without_gradients_nothing_is_best():
    made = record(make_model("llama_gqa"), make_batches(6), **QUIET)
    table = compare_observers(made)
    assert not table.best.any() and table.highest_sqnr.any() and table.kl.isna().all()
    assert "fisher_mse" not in set(table.observer)
    assert all(parts is None for parts in table.kl_parts)


def test_a_record_without_its_gradients_says_the_same(tiny, tmp_path):
    _, made, _ = tiny
    shipped = CalibrationRecord.load(made.without_gradients().save(tmp_path / "small"))
    assert not shipped.gradients and shipped.labels == (0,) * 5
    assert (tmp_path / "small").stat().st_size < made.save(tmp_path / "large").stat().st_size / 2
    one, two = (per_reader(compare_observers(r, progress=False)).set_index(["module", "base_name", "observer"])
                for r in (made, shipped))
    two = two.loc[one.index]
    assert (one.best == two.best).all()
    assert one.kl.equals(two.kl) or (one.kl - two.kl).abs().max() <= 1e-12 * one.kl.max()
    other = compare_observers(shipped, args=FP8, progress=False)
    assert other.kl.isna().all()    # of other formats nothing was kept
    assert {*shipped.forecasts.schemes} == {RECORDED} and len(shipped.forecasts.schemes[RECORDED]) == 28


def test_its_own_scheme_is_kept_when_it_is_recorded(tiny):
    from qcal_nb.forecasts import forecast
    model, made, _ = tiny
    kept = made.forecasts.schemes[RECORDED]
    table = forecast(made, model, ["INT8_STATIC", "W8A8"])
    total = sum(mean_of_parts(cost.total).item() for cost in kept.values())
    assert table.kl[0] == pytest.approx(total) and {*made.forecasts.schemes} == {RECORDED, "INT8_STATIC", "W8A8"}
    again = record(make_model("llama_gqa"), make_batches(6), **QUIET)
    assert not again.forecasts.schemes and not again.forecasts.inputs


def test_more_data_makes_old_forecasts_go(tiny):
    parts = [record(make_model("llama_gqa"), make_batches(10)[some], batch_indices=range(10)[some], gradients=True,
                    scheme="INT8_STATIC", **QUIET) for some in (slice(5), slice(5, 10))]
    assert all(RECORDED in part.forecasts.schemes for part in parts)
    both = parts[0] | parts[1]
    assert not both.forecasts.schemes and min(both.labels) > 0
    key = next(k for k in both.tensors if k[1] == "input")
    whole = record(make_model("llama_gqa"), make_batches(10), gradients=True, scheme="INT8_STATIC", **QUIET)
    result = result_of(both, key, "fisher_mse")
    assert torch.equal(result.scale, result_of(whole, key, "fisher_mse").scale)
    assert torch.allclose(input_costs(both, key, result), input_costs(whole, key, result), rtol=1e-9)


def test_few_batches_have_no_cost():
    made = record(make_model("llama_gqa"), make_batches(3), gradients=True, **QUIET)
    assert made.gradients and compare_observers(made).kl.isna().all() and not made.forecasts.schemes
    key = next(k for k in made.tensors if k[1] == "input")
    assert "fisher_mse needs gradients" in result_of(made, key, "fisher_mse").reason


@pytest.mark.parametrize("change, fault", [
    (lambda t: t["inputs"].update(nobody=99), "costs were referred to"),
    (lambda t: t["costs"][0].__setitem__(2, torch.ones(3, 5).double()), "costs are"),
    (lambda t: t["schemes"][RECORDED][0].__setitem__(1, torch.full((5,), math.nan).double()), "not finite"),
    (lambda t: t["schemes"][RECORDED].append(t["schemes"][RECORDED][0]), "there is the forecast of"),
])
def test_a_damaged_forecast_is_refused(change, fault):
    made = record(make_model("llama_gqa"), make_batches(5), gradients=True, scheme="INT8_STATIC", **QUIET)
    tree = forecasts_to_tree(made.without_gradients().forecasts)
    forecasts_from_tree(tree)
    change(tree)
    with pytest.raises(ValueError, match=fault): forecasts_from_tree(tree)


def test_a_recipe_with_a_search_is_forecast_and_measured_alike():
    "`forecast` finds the scale of `fisher_mse` in the record, too."
    from qcal_nb.forecasts import forecast
    model = make_model("llama_gqa")
    made = record(model, make_batches(6), gradients=True, **QUIET)
    static = QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"], input_observer="static_minmax")
    searched = QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"], input_observer="fisher_mse")
    table = forecast(made, model, dict(static=static, searched=searched))
    assert list(table.why) == ["", ""] and table.inputs[1] <= table.inputs[0]
    assert table.weights[0] == pytest.approx(table.weights[1], rel=0.1)     # other parts may count
