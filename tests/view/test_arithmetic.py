"""The page's arithmetic is Python's: 500 seeded ranges and four observers, and mutations that must be seen."""
import re

import pytest

from qcal_nb.stats import TOO_DAMAGED
from qcal_nb.view.javascript import MODULES, PAGE, arithmetic, source
from tests.view.cases import differences, javascript_says, seeded_cases

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def by_hand(): return seeded_cases(500, 0)


@pytest.fixture(scope="module")
def answers(by_hand): return javascript_says(by_hand[0])


def test_ranges_by_hand(by_hand, answers): assert differences(*by_hand, answers) == []


def test_bounds_are_close(by_hand, answers):
    for want, got in zip(by_hand[1], answers):
        assert float(got["bound"]) == pytest.approx(want["bound"], rel=1e-6, abs=1e-9, nan_ok=True)


def test_observers():
    asked, expected = seeded_cases(0, 60, seed=1)
    assert differences(asked, expected, javascript_says(asked)) == []


MUTATIONS = {
    "4 places for 16": ("const POINTS = 16", "const POINTS = 4"),
    "no rounding to the dtype before the code": ("const scaled = forth(values[k] / scale)",
                                                 "const scaled = values[k] / scale"),
    "no rounding to the dtype after the code": ("back(back(back(point) - zero) * scale)", "(point - zero) * scale"),
    "half is rounded up": ("return x + BIG - BIG", "return Math.floor(x + 0.5)"),
    "the width of a range is not rounded": ("round(round(to - from) / span)", "round((to - from) / span)"),
    "fp4 takes the upper of two at half way": ("i % 2 ? size >= FP4_UP_TO[i] : size > FP4_UP_TO[i]",
                                               "size >= FP4_UP_TO[i]"),
    "no smallest scale": ("exact === 0 ? EPS[dtype] : exact", "exact"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_seen(name, by_hand):
    right, wrong = MUTATIONS[name]
    assert arithmetic().count(right) == 1
    try:
        found = javascript_says(by_hand[0], arithmetic().replace(right, wrong))
    except AssertionError:
        return      # it does not even run to the end
    assert differences(*by_hand, found)


def test_what_is_too_damaged_is_so_in_both():
    assert f"const TOO_DAMAGED = {TOO_DAMAGED};" in source("words")


# --- modules ---

ALL = [*MODULES, *PAGE]


def top_names(text): return re.findall(r"^(?:export )?(?:async )?(?:const|let|class|function\*?) ?(\w+)", text, re.M)


def test_no_name_stands_at_the_top_of_two_modules():
    names = [name for module in ALL for name in top_names(source(module))]
    assert len(names) > 60 and sorted(names) == sorted(set(names))


@pytest.mark.parametrize("module", ALL)
def test_a_module_needs_only_those_before_it(module):
    needed = re.findall(r'from "\./(\w+)\.js"', source(module))
    assert all(ALL.index(other) < ALL.index(module) for other in needed)


@pytest.mark.parametrize("module", ALL)
def test_what_is_imported_is_exported_and_used(module):
    for names, other in re.findall(r'^import \{ ([^}]*) \} from "\./(\w+)\.js";', source(module), re.M):
        for name in names.split(", "):
            made = rf"^export (?:async )?(?:const|class|function\*?) {name}\b"
            assert re.search(made, source(other), re.M), (other, name)
            assert len(re.findall(rf"\b{name}\b", source(module))) > 1, name


LONGEST = 40


@pytest.mark.parametrize("module", ALL)
def test_functions_are_short_and_lines_narrow(module):
    lines = source(module).splitlines()
    assert max(map(len, lines)) <= 120
    begun = [i for i, line in enumerate(lines) if re.match(r"(?:export )?(?:async )?function", line)]
    for i in begun:
        if lines[i].endswith("}"): continue
        end = next(k for k in range(i, len(lines)) if lines[k] == "}")
        assert end - i < LONGEST, lines[i]
