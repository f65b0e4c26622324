"""Suspects: names of kinds and blocks, the order with and without a forecast, and bounds."""
import math

import pytest
from torch.nn import Linear

from qcal_nb.evaluate.suspects import Plan, asked_modules, at_most, block_name, bounds_of, kind_name, unit_name

NAMES = [f"model.layers.{i}.{part}" for i in range(3) for part in ("attn.q_proj", "attn.k_proj", "mlp.down_proj")]
UNITS = [(name,) for name in NAMES]


@pytest.mark.parametrize("unit, kind, block, name", [
    (("model.layers.11.mlp.down_proj",), "down_proj", "model.layers.11", None),
    (("h.0.attn.q", "h.0.attn.k"), "q+k", "h.0", "h.0.attn.q+k"),
    (("lm_head",), "lm_head", "", None), (("3",), "3", "3", None),
    (("layers.1.experts.5.w1",), "w1", "layers.1", None), (("v2.proj",), "proj", "", None),
])
def test_names(unit, kind, block, name):
    assert (kind_name(unit), block_name(unit), unit_name(unit)) == (kind, block, name or unit[0])
    assert asked_modules(unit_name(unit), dict.fromkeys(unit, Linear(1, 1))) == list(unit)


def costs_of(plan, kinds, blocks):
    return dict(zip((step.key for step in (*plan.kinds, *plan.blocks)), [*kinds, *blocks]))


def test_nothing_known_is_the_order_of_the_model():
    plan = Plan(UNITS)
    assert plan.order({}) == UNITS and [step.name for step in plan.kinds] == ["q_proj", "k_proj", "down_proj"]
    assert [step.name for step in plan.blocks] == [f"model.layers.{i}" for i in range(3)]


def test_the_costliest_kind_in_the_costliest_block_comes_first_and_equals_keep_their_order():
    plan = Plan(UNITS)
    order = [name for name, in plan.order(costs_of(plan, [1, 1, 5], [2, 2, 4]))]
    assert order == [NAMES[i] for i in (8, 2, 5, 6, 7, 0, 1, 3, 4)]


def test_a_unit_without_groups_may_cost_anything():
    plan = Plan([*UNITS, ("lm_head",)])
    assert plan.order(costs_of(plan, [0, 1, 5], [2, 0, 4]))[0] == ("lm_head",)


def test_a_forecast_decides_alone():
    forecast = {name: float(i % 4) for i, name in enumerate(NAMES)}
    plan = Plan(UNITS, forecast=forecast)
    order = [name for name, in plan.order(costs_of(plan, [9, 1, 1], [9, 1, 1]))]
    assert order == sorted(NAMES, key=lambda name: -forecast[name])


def test_the_order_is_found_when_the_modules_are_reached():
    plan, costs = Plan(UNITS), {}
    steps = plan.steps(costs)
    for _ in range(6): costs[next(steps).key] = 1.0
    costs |= costs_of(plan, [1, 1, 5], [2, 2, 4])
    assert next(steps).name == NAMES[8]


def test_rests_hold_all_quantized_modules_but_the_first():
    plan = Plan(UNITS, wanted=NAMES[:6])
    levels = [step.level for step in plan.steps({})]
    assert levels == [*["kind"] * 3, *["block"] * 2, *["module"] * 4, "rest", *["module"] * 2]
    rest = next(step for step in plan.steps({}) if step.level == "rest")
    assert set(rest.modules) == {*NAMES[4:]} and rest.name == "all but the first 4"


def test_bounds():
    plan = Plan(UNITS)
    costs = costs_of(plan, [1, 1, 5], [2, 3, 4]) | {plan.whole.key: 9.0}
    bounds = bounds_of(plan, costs)
    assert [at_most([name], bounds) for name in NAMES[6:]] == [1, 1, 4]
    assert at_most(NAMES[:2], bounds) == 2 and at_most(NAMES[:4], bounds) == 9
    assert math.isnan(at_most(["lm_head"], bounds)) and math.isnan(at_most(NAMES[:1], []))
