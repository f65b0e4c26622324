"""Bit for bit: every scale, zero point and global scale of many architectures and recipes, by both pipelines, against
`oneshot` in this process.

`make parity` compares every cell. Otherwise it is a sample by design, in which every architecture meets every family of
configurations.
"""
import os
from collections import defaultdict

import pytest
from harness import ARCHITECTURES, CONFIGURATIONS, FAMILIES, PIPELINES, applies, measure, sample, whole

pytestmark = [pytest.mark.parity, pytest.mark.slow]
pytest.importorskip("llmcompressor", reason="no reference: pip install -e '.[dev]'")
WHOLE = os.environ.get("QCAL_MATRIX") == "whole"
CASES = whole() if WHOLE else sample()
IMPOSSIBLE = [(a, c) for a in ARCHITECTURES for c in CONFIGURATIONS if not applies(a, c)]


@pytest.mark.parametrize("architecture, configuration, pipeline", CASES, ids=[" | ".join(case) for case in CASES])
def test_same_bits(architecture, configuration, pipeline):
    cell = measure(architecture, configuration, pipeline)
    assert cell.scales and cell.differ == []


@pytest.mark.parametrize("architecture, configuration", IMPOSSIBLE, ids=[" | ".join(cell) for cell in IMPOSSIBLE])
def test_one_of_the_two_says_that_it_cannot(architecture, configuration):
    with pytest.raises(ValueError): measure(architecture, configuration)


def test_the_sample_covers_the_matrix(record_property):
    family = {c: name for name, members in FAMILIES.items() for c in members}
    assert family.keys() == CONFIGURATIONS.keys()
    met, by_architecture, by_configuration = set(), defaultdict(set), defaultdict(set)
    for architecture, configuration, pipeline in sample():
        met.add((architecture, family[configuration]))
        by_architecture[architecture].add(pipeline)
        by_configuration[configuration].add(pipeline)
    assert met == {(a, family[c]) for a, c, _ in whole()} and set(sample()) <= set(whole())
    for pipelines, names in ((by_architecture, ARCHITECTURES), (by_configuration, CONFIGURATIONS)):
        assert pipelines == {name: set(PIPELINES) for name in names}
    record_property(
        "tell",
        f"parity matrix: {len(CASES)} of {len(whole())} cells compared"
        + ("" if WHOLE else "; all of them: make parity"),
    )
