"""The page in a real Chromium, from a file, offline: what it shows is what Python says; hand, keys and choices."""
import pytest
from helpers import make_batches, make_model

from qcal_nb.analysis import compare_observers, result_by_hand, result_row
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.records import CalibrationRecord, record
from qcal_nb.session import args_for
from qcal_nb.view import page as page_of
from tests.records.samples import QUIET

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PAGE = "document.querySelector('.qcal').qcal"
DOWN = "model.layers.0.mlp.down_proj"
SETTLED = f"""() => {{
  const page = {PAGE};
  return page && !page.frame && !page.job && !page.foundMore(performance.now() + 5);
}}"""


@pytest.fixture(scope="module")
def made():
    model, tokenizer = load_tiny_llama()
    texts = [text for text in calibration_texts() if len(text) > 700][:6]
    options = dict(tokenizer=tokenizer, max_length=64, gradients=True, scheme="INT8_STATIC", **QUIET)
    return record(model, texts, **options).without_gradients()


@pytest.fixture
def opened(browser, tmp_path):
    "`opened(record, …)`: a tab without a network, when everything is found; nothing may be asked for or thrown."
    contexts, wrong = [], []

    def open_page(made, width=1400, scheme="light", **state):
        file = tmp_path / "page.html"
        file.write_text(page_of(made, **state), encoding="utf-8")
        context = browser.new_context(viewport=dict(width=width, height=1000), color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(file.as_uri())
        page.wait_for_function(SETTLED)
        return page

    yield open_page
    for context in contexts: context.close()
    assert wrong == []


def ask(page, what): return page.evaluate(f"() => {{ const page = {PAGE}; return {what}; }}")


def figures(page):
    "What the page shows of the selected tensor: label -> words."
    return dict(page.locator(".figures > div").evaluate_all(
        "cells => cells.map(cell => [cell.querySelector('dt').textContent, cell.querySelector('dd').textContent])"))


def drag(page, side, pixels):
    box = ask(page, f"page.plot.grips[{side}].getBoundingClientRect().toJSON()")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for i in range(1, 11): page.mouse.move(x + pixels * i / 10, y)
    page.mouse.up()
    page.wait_for_function(SETTLED)


def test_it_begins_as_recorded_and_says_what_python_says(opened, made):
    page = opened(made, selected=DOWN)
    assert ask(page, "[page.state.format, page.state.observer, page.state.color]") == ["int8", "minmax", "cost"]
    rows = compare_observers(made).query(f"module == {DOWN!r} and base_name == 'input'").set_index("observer")
    table = ask(page, "page.table().map(({name, sqnr, cost, isBest}) => ({name, sqnr, cost, isBest}))")
    shown = {row["name"]: row for row in table}
    for name, row in rows.iterrows():
        assert shown[name]["cost"] == pytest.approx(row.kl, rel=1e-9), name
        assert shown[name]["sqnr"] == pytest.approx(row.sqnr_db, abs=1e-9), name
        assert shown[name]["isBest"] == row.best, name
    assert figures(page)["SQNR"].startswith(f"{rows.sqnr_db['minmax']:.1f} dB")
    words = page.locator(".says").inner_text()
    assert words.startswith("Costs the model") and "fisher_mse" in words


def test_a_dragged_range_is_pythons(opened, made):
    page = opened(made, selected=DOWN)
    drag(page, 1, -150)
    clip = ask(page, "page.state.clip")
    assert 0.002 <= clip < 0.9 and ask(page, "page.state.observer") == "by hand"
    row = result_row(result_by_hand(made[DOWN, "input"], "input", args_for("int8"), clip), made[DOWN, "input"])
    found = ask(page, "page.result()")
    names = dict(scale="scale", low="min", high="max", levels="levels_used")
    assert [found[name] for name in names] == [row[column] for column in names.values()]
    assert found["sqnr"] == pytest.approx(row["sqnr_db"], abs=1e-9)
    assert found["clipped"] == pytest.approx(row["clipped"])
    assert page.locator(".says").inner_text().find("By hand") >= 0
    assert page.locator(".spoken").inner_text() == page.locator(".says").inner_text()


def test_choices_keys_and_the_map(opened, made):
    page = opened(made, selected=DOWN)
    page.get_by_role("button", name="int4", exact=True).click()
    page.wait_for_function(SETTLED)
    assert ask(page, "page.state.format") == "int4" and "noisy" in page.locator("h3").first.inner_text()
    page.get_by_role("button", name="weights").click()
    page.wait_for_function(SETTLED)
    assert ask(page, "page.tensors().length") == 28
    handle = page.get_by_role("slider", name="Upper end of the range")
    handle.focus()
    for _ in range(3): page.keyboard.press("PageDown")
    assert ask(page, "page.state.clip") == pytest.approx(0.8 ** 3, rel=1e-2)
    page.keyboard.press("End")
    assert ask(page, "page.state.clip") == 1
    before = ask(page, "page.current().path")
    page.locator("canvas").first.focus()
    page.keyboard.press("ArrowRight" if ".3." not in before else "ArrowLeft")
    assert ask(page, "page.current().path") != before
    page.locator(".worst button").nth(2).click()
    assert ask(page, "page.current().path") == page.locator(".worst button").nth(2).get_attribute("data-path")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 800, 420])
def test_widths_and_themes(opened, made, width, scheme):
    page = opened(made, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".view").get_attribute("data-theme") == scheme
    assert page.locator(".row:visible").count() == 7


def test_readers_share_a_cell_and_experts_a_column(opened, made):
    page = opened(made, selected="model.layers.1.self_attn.k_proj")
    assert page.locator("h3").nth(1).inner_text() == "layers.1.self_attn.q/k/v_proj · input"
    assert ask(page, "page.current().path") == "model.layers.1.self_attn.q_proj"
    mixture = record(make_model("mixtral"), make_batches(2), **QUIET)
    page = opened(mixture)
    cells = ask(page, "page.map.layout.cells.map(({tensor: {kind, expert}, wide}) => ({kind, expert, wide}))")
    wide = {(cell["kind"], cell["expert"] is None): cell["wide"] for cell in cells}
    downs = [cell["expert"] for cell in cells if cell["kind"] == "experts.down_proj"]
    assert sorted(set(downs)) == [0, 1, 2, 3] and len(downs) == 8
    assert wide["experts.down_proj", False] == pytest.approx(wide["o_proj", True] / 4)


def test_nothing_recorded_and_damaged_tensors(opened):
    page = opened(CalibrationRecord())
    assert "Nothing recorded yet" in page.locator(".empty").inner_text()
    model, data = make_model("llama_gqa"), make_batches(2)
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: (args[0] * float("nan"),))
    page = opened(record(model, data, **QUIET))
    handle.remove()
    assert ask(page, "page.tensors().some(tensor => tensor.nan > 0)") and page.locator(".says").inner_text()
