"""Fixtures that tests of this wing share."""
import pytest
from helpers import make_batches, make_model

from qcal_nb.records import record
from qcal_nb.report import to_html


@pytest.fixture(scope="module")
def run():
    return record(
        make_model("llama_gqa"), make_batches(4), scheme="INT8_STATIC", observers=["static_minmax", "mse"],
        progress=False
    )


@pytest.fixture(scope="module")
def page(run, tmp_path_factory): return to_html(run, tmp_path_factory.mktemp("report") / "report.html", title="A & B")
