"""Bit for bit: every scale, zero point and global scale of many architectures and recipes, by both pipelines, against `oneshot` in this process."""
import pytest
from harness import ARCHITECTURES, CONFIGURATIONS, PIPELINES, applies, measure

pytestmark = [pytest.mark.parity, pytest.mark.slow]
pytest.importorskip("llmcompressor", reason="no reference: pip install -e '.[dev]'")


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_bits(architecture, configuration):
    if not applies(architecture, configuration):
        with pytest.raises(ValueError): measure(architecture, configuration)  # one of the two says that it cannot
        return
    for pipeline in PIPELINES:
        cell = measure(architecture, configuration, pipeline)
        assert cell.scales and cell.differ == [], pipeline
