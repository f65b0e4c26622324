"""The static pages: one for each notebook, every link and picture leads somewhere."""
import importlib.util
import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("qcal_tools_docs", ROOT / "tools" / "docs.py")
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "nbs", root / "nbs")
    return builder.docs(root)


def test_a_page_for_each_notebook(pages):
    notebooks = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert len(list(pages.rglob("*.html"))) == len(notebooks) > 10


def broken(pages):
    "Links and pictures on the pages that lead nowhere."
    found = []
    for page in pages.rglob("*.html"):
        targets = re.findall(r"""(?:href|src)=["'](?!https?:|data:|#|mailto:)([^"'#]+)""", page.read_text(encoding="utf-8"))
        found += [(page.name, t) for t in targets if not (page.parent / t).exists()]
    return found


def test_every_link_leads_somewhere(pages): assert broken(pages) == []


def test_a_broken_link_is_seen(pages):
    (pages / "models.html").rename(pages / "elsewhere.html")
    assert ("index.html", "models.html") in broken(pages)
    (pages / "elsewhere.html").rename(pages / "models.html")


def test_directives_and_empty_cells_do_not_show(pages):
    text = (pages / "lifecycle.html").read_text(encoding="utf-8")
    assert "#| export" not in text and "default_exp" not in text and "reset_quantization" in text
