"""Errors name the argument that was passed, what came, and what would be right."""
import pytest
import torch
from helpers import make_batches, make_model

from qcal_nb import CalibrationRecord, Workbench, record
from qcal_nb.cli import main
from qcal_nb.evaluate import compare_schemes
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.plots import to_png


@pytest.mark.parametrize("field, near", [("schme", "scheme"), ("ignroe", "ignore"), ("kv_cache", "kv_cache_scheme")])
def test_fields_that_recipes_do_not_have(field, near):
    with pytest.raises(ValueError, match=f"^{field} is no field of a recipe .close to it: .*{near}"):
        QuantizationModifier(**{field: "FP8"})


def test_fields_are_given_by_name():
    with pytest.raises(TypeError, match="given by name, such as scheme='FP8'"): QuantizationModifier("FP8")


@pytest.mark.parametrize("data, error, words", [
    ([5], TypeError, "^eval_data holds a int"),
    (["a text"], ValueError, "^eval_data holds strings but tokenizer=None"),
    (5, TypeError, "^eval_data must be an iterable"),
    ([torch.full((1, 4), 999)], ValueError, "^eval_data: input_ids go from 999 to 999, but this Llama"),
    ([], ValueError, "^eval_data must hold at least one token"),
])
def test_what_to_evaluate_on_is_called_eval_data(data, error, words):
    with pytest.raises(error, match=words):
        compare_schemes(make_model("llama_gqa"), make_batches(1), ["FP8"], eval_data=data, progress=False)


def test_observers_that_differ_in_case_alone_are_one():
    asked = ["MSE", "mse", "MinMax", ("Percentile", dict(percentile=99.0)), ("percentile", dict(percentile=99.0))]
    seen = record(make_model("llama_gqa"), make_batches(1), observers=asked, progress=False)
    assert {key[2] for key in seen.results} == {"mse", "minmax", "percentile(percentile=99.0)"}


def test_a_module_that_is_not_there_cannot_be_selected():
    wb = Workbench(make_model("llama_gqa"), make_batches(1))
    with pytest.raises(ValueError, match="selected='model.layers.0.mlp.up' is no module.*close to it are.*up_proj"):
        wb.selected = "model.layers.0.mlp.up"
    with pytest.raises(ValueError, match="selected=5 is no module"): wb.selected = 5
    assert wb.selected == ""
    wb.selected = "model.layers.0.mlp.up_proj"
    wb.selected = ""


def test_a_picture_is_made_of_axes():
    with pytest.raises(TypeError, match="ax must be matplotlib axes.*got Calib"): to_png(CalibrationRecord())


@pytest.mark.parametrize("command", [["lab"], ["calibrate", "--out", "out"]])
@pytest.mark.parametrize("name", ["model.pkl", "model.pt", "weights.bin"])
def test_a_file_that_is_no_model_is_not_opened(command, name, tmp_path, capsys):
    "A pickle runs code when it is read, so nothing here reads one."
    (tmp_path/name).write_bytes(b"\x80\x04.")
    (tmp_path/"texts.txt").write_text("a text")
    words = [*command, str(tmp_path/name)] + (["--data", str(tmp_path/"texts.txt")] if command[0] != "lab" else [])
    assert main(words) == 1
    assert "is a file; expected the folder of a model, or a record" in capsys.readouterr().err


@pytest.mark.parametrize("data, words", [
    ([{"input_ids": None}], "data holds a dict whose input_ids are 'None'"),
    ([{"input_ids": "abc"}], "data holds a dict whose input_ids are 'abc'"),
    ([{"input_ids": [1, 2.5]}], "they must be whole numbers, a row"),
    ([torch.zeros(1, 0, dtype=torch.long)], "data holds a batch without values, a tensor of shape .1, 0."),
])
def test_rows_that_are_none(data, words):
    with pytest.raises(ValueError, match=words): record(make_model("llama_gqa"), data, progress=False)


@pytest.mark.parametrize("none", [[], {}])
def test_a_comparison_of_nothing(none):
    with pytest.raises(ValueError, match="must hold at least one preset or modifier"):
        compare_schemes(make_model("llama_gqa"), make_batches(1), none, eval_data=make_batches(1), progress=False)


def test_paths_of_a_user(tmp_path, monkeypatch):
    "`~` is the home folder, and an error names the file that was asked for, not the draft."
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CalibrationRecord().save("~/mine.record") == tmp_path/"mine.record"
    assert CalibrationRecord.load("~/mine.record").batches == 0
    def refuse(*_): raise PermissionError(13, "Permission denied", ".qcal_nb-draft")
    monkeypatch.setattr("qcal_nb.recipes.files._write_to_disk", refuse)
    with pytest.raises(PermissionError, match="no permission to write mine.record in") as told:
        CalibrationRecord().save("~/mine.record")
    assert "draft" not in str(told.value) and [p.name for p in tmp_path.iterdir()] == ["mine.record"]
