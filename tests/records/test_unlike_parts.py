"""Parts that were not recorded alike: what can be drawn anew is, everything else says why not, and what does not belong
together is refused."""
import pytest
import torch
from helpers import make_batches, make_model

from qcal_nb.analysis import compare_observers
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import calibrate
from qcal_nb.records import CalibrationRecord, record, record_equal


def parts(first, second, **options):
    model, data = make_model("llama_gqa"), make_batches(5)
    a = record(model, data[:1], observers=first, progress=False, **options)
    b = record(model, data[1:], observers=second, batch_indices=range(1, 5), progress=False, **options)
    return a, b, record(model, data, observers=[*dict.fromkeys([*first, *second])], progress=False, **options)


@pytest.mark.parametrize("turned", [False, True])
def test_an_observer_of_one_part_does_not_speak_for_both(turned):
    a, b, whole = parts(["static_minmax", "percentile"], ["minmax", "entropy"])
    merged = b | a if turned else a | b
    for key, found in merged.results.items():
        if key[1] == "weight" or key[2] != "minmax": assert torch.equal(found.scale, whole.results[key].scale), key
        else: assert found.scale is None and "saw a part of the data only" in found.reason, key
    table = compare_observers(merged).set_index(["module", "base_name", "observer"])
    right = compare_observers(whole).set_index(["module", "base_name", "observer"])
    assert table.reason.str.contains("a part of the data only").sum() == 14
    for row in right.index:
        if not table.reason[row]: assert table.scale[row] == right.scale[row], row


def test_an_observer_of_the_only_part_that_saw_a_tensor_speaks_for_it():
    a, b, _ = parts(["minmax"], [])
    inputs = [key for key in a.results if key[1] == "input"]
    weights_alone = CalibrationRecord(
        {k: v for k, v in b.tensors.items() if k[1] == "weight"}, b.types, about=b.about, spans=b.spans
    )
    merged = a | weights_alone
    assert all(torch.equal(merged.results[k].scale, a.results[k].scale) for k in inputs)


def test_a_mask_belongs_to_a_record():
    model, data = make_model("llama_gqa"), make_batches(2)
    masked = record(model, data[:1], mask=[3, 1], progress=False)
    plain = record(model, data[1:], batch_indices=[1], progress=False)
    assert masked.about.mask == "token ids 1, 3" and "without token ids 1, 3" in repr(masked) and plain.about.mask == ""
    with pytest.raises(ValueError, match="of two runs: mask is 'token ids 1, 3' in one and '' in the other"):
        _ = masked | plain
    second = record(model, data[1:], mask=[1, 3], batch_indices=[1], progress=False)
    assert record_equal(masked | second, record(model, data, mask=[1, 3], progress=False))


def test_a_quantized_model_is_another_run():
    model, data = make_model("llama_gqa"), make_batches(2)
    plain = record(model, data[:1], progress=False)
    calibrate(model, data, QuantizationModifier(scheme="FP8", ignore=["lm_head"]), progress=False)
    quantized = record(model, data[1:], batch_indices=[1], progress=False)
    assert quantized.about.phase == "calibrated"
    with pytest.raises(ValueError, match="phase is 'original' in one and 'calibrated' in the other"):
        _ = plain | quantized


def test_what_was_left_out_is_in_the_file(tmp_path):
    masked = record(make_model("llama_gqa"), make_batches(1), mask=lambda batch: batch["input_ids"] > 5, progress=False)
    again = CalibrationRecord.load(masked.save(tmp_path/"a"))
    assert again.about == masked.about and again.about.mask == "what <lambda> leaves out"


def test_a_mask_that_leaves_nothing_is_said():
    with pytest.warns(UserWarning, match="mask leaves out every token"):
        run = record(make_model("llama_gqa"), make_batches(1), mask=range(128), progress=False)
    assert run.tokens == 0 and run.batches == 1


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere to write a.record to"):
        record(make_model("llama_gqa"), None, base_names="weight", progress=False).save(tmp_path/"nowhere"/"a.record")


@pytest.mark.parametrize("args", ["int4", 4, dict(num_bits=4)])
def test_arguments_of_a_comparison(args):
    with pytest.raises(TypeError, match="args must be QuantizationArgs, got"):
        compare_observers(CalibrationRecord(), args=args)


def test_what_differs_is_named_and_nothing_else_is_printed():
    model, data = make_model("llama_gqa"), make_batches(3)
    a, b, c = (
        record(model, data[i:i + 1], scheme=s, batch_indices=[i], progress=False)
        for i, s in enumerate(("FP8", "INT8_STATIC", None))
    )
    with pytest.raises(
        ValueError,
        match="two runs: config.config_groups.group_0.weights.type is 'float' in one and 'int' in the other$",
    ):
        a | b
    with pytest.raises(ValueError, match="two runs: config is None in one and {'config_groups'"): c | a
