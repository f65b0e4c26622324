"""The report: what stands in the file, and that nothing in it points outside or runs."""
import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers import make_batches, make_model

from qcal_nb.analysis import compare_observers, coverage, ranges
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.plots import observer_to_draw
from qcal_nb.plots import data_of
from qcal_nb.records import CalibrationRecord, record
from qcal_nb.report import CLOSE_UPS, cell, to_html
from qcal_nb.stats import measure
from tests.report.samples import EVIL, odd_record


class Reader(HTMLParser):
    "Tables as lists of rows by id, links, and text outside of script and style."

    def __init__(self, text):
        super().__init__()
        self.tables, self.links, self.tags, self.text, self.policy = {}, [], [], "", ""
        self._id = self._cell = self._raw = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag in ("script", "style"): self._raw = tag
        if tag == "section": self._id = attrs.get("id")
        if tag == "tr": self.tables.setdefault(self._id, []).append([])
        if tag in ("td", "th"): self._cell = ""
        if attrs.get("http-equiv") == "Content-Security-Policy": self.policy = attrs["content"]
        self.links += [attrs[k] for k in ("src", "href", "action", "poster", "data", "srcset") if k in attrs]

    def handle_endtag(self, tag):
        if tag == self._raw: self._raw = None
        if tag in ("td", "th"):
            self.tables[self._id][-1].append(self._cell)
            self._cell = None

    def handle_data(self, data):
        if self._raw: return
        self.text += data
        if self._cell is not None: self._cell += data


def read(path): return Reader(Path(path).read_text(encoding="utf-8"))


def test_tables_are_those_of_the_analysis(run, page):
    tables = read(page).tables
    for name, wanted in dict(ranges=ranges(run), observers=compare_observers(run), coverage=coverage(run)).items():
        assert tables[name][0] == list(wanted.columns)
        assert tables[name][1:] == [
            [html.unescape(cell(v)) for v in row] for row in wanted.astype(object).values.tolist()
        ], name
    assert set(tables) == {"ranges", "observers", "extremes", "outlier-channels", "coverage", "convergence"}
    assert len(tables["convergence"]) == 1 + sum(b == "input" for _, b in run.readers)


def test_pictures_carry_their_numbers(run, page):
    import base64
    pictures = [attrs for tag, attrs in read(page).tags if tag == "img"]
    data = [data_of(base64.b64decode(p["src"].partition(",")[2])) for p in pictures]
    table = ranges(run)
    for base_name in ("input", "weight"):
        assert table[table.base_name == base_name][["min", "max"]].values.tolist() in [d.get("range") for d in data]
    assert all(len(p["alt"]) > 10 for p in pictures) and len(pictures) >= 5 + 3 * 1


def test_the_top_says_what_was_run(run, page):
    text = read(page).text
    for fact in (
        "A & B", "LlamaForCausalLM", "int8", "4 batches, 128 tokens", "static_minmax, mse",
        f"torch {run.about.versions['torch']}"
    ):
        assert fact in text
    assert "Nothing is wrong" in text and "pieces of the calibration text" not in text


def test_nothing_points_outside(page):
    found = read(page)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in found.links)
    assert "default-src 'none'" in found.policy and "unsafe" not in found.policy and "http" not in found.policy
    text = Path(page).read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttp|WebSocket|import\(", text)
    assert not [t for t, _ in found.tags if t in ("link", "iframe", "object", "embed", "form", "base")]
    ids = {attrs["id"] for _, attrs in found.tags if "id" in attrs}
    assert {link[1:] for link in found.links if link.startswith("#")} <= ids


def test_what_is_wrong_stands_first(tmp_path):
    found = read(to_html(odd_record(), tmp_path / "odd.html"))
    head = found.text[:found.text.index("Findings")]
    for words in (
        "pieces of the calibration text", "broken (input): 1 NaN, 1 infinite, the first nan at (0, 1) of batch 0",
        "Never seen: 1 tensor", "never (input)", "layers.0.experts.3"
    ):
        assert words in head, words


def test_scales_at_eps_are_reported(tmp_path):
    model = make_model("llama_gqa")
    with torch.no_grad(): model.model.layers[0].self_attn.k_proj.weight[1] = 0
    seen = record(
        model, None, scheme="FP8_DYNAMIC", observers=["memoryless_minmax"], base_names=["weight"], progress=False
    )
    text = read(to_html(seen, tmp_path / "eps.html")).text
    assert re.search(
        r"at eps \(all values were zero\): 1\.\s*model\.layers\.0\.self_attn\.k_proj \(weight\): 1 of 32, "
        r"memoryless_minmax",
        text,
    )


def test_ranges_and_scales_are_those_of_the_recipe(tmp_path):
    recipe = QuantizationModifier(scheme="INT8_STATIC", input_observer="mse", ignore=["lm_head"])
    text = read(
        to_html(record(make_model("llama_gqa"), make_batches(2), scheme=recipe, progress=False), tmp_path / "mse.html")
    ).text
    # of inputs, of weights
    assert re.findall(r"The black marks are the range that (\w+) chose", text) == ["mse", "memoryless_minmax"]
    assert "scales that mse chose for inputs" in text


def test_keys_are_drawn_as_the_cache_will_hold_them():
    recipe = QuantizationModifier(
        targets=[], kv_cache_scheme=dict(num_bits=8, type="float", strategy="tensor", symmetric=True, observer="mse")
    )
    seen = record(make_model("llama_gqa"), make_batches(2), scheme=recipe, base_names=["k"], progress=False)
    assert seen.observers == ["static_minmax", "mse"] and observer_to_draw(seen, "k") == "mse"


def test_html_in_names_and_tokens_is_text(tmp_path):
    found = read(to_html(odd_record(), tmp_path / "odd.html", title=EVIL))
    assert [t for t, _ in found.tags].count("script") == 1
    assert all(a.get("src", "data:").startswith("data:") for _, a in found.tags)
    assert not [a for _, attrs in found.tags for a in attrs if a.startswith("on")]
    assert EVIL in {row[0] for row in found.tables["ranges"]}
    assert EVIL in {c for row in found.tables["extremes"] for c in row}


def test_text_is_left_out_where_the_record_holds_none(run, page):
    assert not {"token", "context"} & set(read(page).tables["extremes"][0])


def test_an_empty_record(tmp_path):
    found = read(to_html(CalibrationRecord(), tmp_path / "empty.html"))
    assert "Nothing was recorded." in found.text and "0 batches" in found.text
    assert all(len(rows) == 1 for rows in found.tables.values())


def test_writing(run, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(TypeError, match="record must be a CalibrationRecord"): to_html("record", path)
    assert path.read_text() == "before"
    assert to_html(CalibrationRecord(), str(path)) == path and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError): to_html(CalibrationRecord(), tmp_path / "no" / "report.html")


def test_a_thousand_tensors_have_no_more_pictures(tmp_path):
    bell = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    stats = [measure(bell * (1 + i), 0) for i in range(20)]
    names = [f"model.layers.{i // 7}.m{i % 7}" for i in range(1000)]
    many = CalibrationRecord(
        {(n, "input"): replace(stats[i % 20]) for i, n in enumerate(names)}, dict.fromkeys(names, "Linear"),
        spans=((0, 1),), level_tokens={0: 20}
    )
    path = to_html(many, tmp_path / "many.html")
    found = read(path)
    assert len(found.tables["ranges"]) == 1001 and len(found.tables["observers"]) == 4001
    assert sum(t == "img" for t, _ in found.tags) <= 5 + 3 * CLOSE_UPS and path.stat().st_size < 8e6


def test_a_place_where_no_page_can_be_is_refused_before_anything_is_drawn(run, tmp_path, monkeypatch):
    def draw(*_): raise AssertionError("drawn in vain")
    monkeypatch.setattr("qcal_nb.report._page_body", draw)
    with pytest.raises(IsADirectoryError, match="is a folder; a file is to be written"): to_html(run, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"): to_html(run, tmp_path/"no"/"page.html")
