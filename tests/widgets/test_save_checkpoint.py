"""*Save checkpoint*: from the workbench's last step to a folder that transformers loads."""
import pytest
import torch
from helpers import make_batches, make_model
from transformers import LlamaForCausalLM

from qcal_nb import Workbench
from qcal_nb.lifecycle import LifecycleError
from qcal_nb.session import SessionError


def bench(scheme: str = "INT8_STATIC") -> Workbench:
    return Workbench(make_model("llama_gqa"), make_batches(2), scheme=scheme)


def test_a_checkpoint_is_saved_as_the_panel_says(tmp_path):
    wb = bench()
    for step in ("initialize", "start", "feed_all", "end"): getattr(wb, step)()
    wb.code.save("checkpoint", str(tmp_path/"mine"))
    assert f"Written: {tmp_path/'mine'}" in wb.code.said.value
    loaded = LlamaForCausalLM.from_pretrained(tmp_path/"mine").eval()
    batch = make_batches(1, seed=7)[0]
    with torch.no_grad(): assert torch.equal(loaded(**batch).logits, wb.session.model(**batch).logits)
    wb.code.save("checkpoint", str(tmp_path/"mine"))    # nothing is overwritten
    assert 'role="alert"' in wb.code.said.value and "mine" in wb.code.said.value


def test_warnings_of_the_checkpoint_are_in_the_panel(tmp_path):
    wb = bench("NVFP4A16")
    for step in ("initialize", "start", "end"): getattr(wb, step)()
    wb.code.save("checkpoint", str(tmp_path/"mine"))
    assert "compressed-tensors unpacks nvfp4-pack-quantized to torch.bfloat16" in wb.code.said.value


@pytest.mark.parametrize("steps, words", [
    ([], "it is not quantized"), (["initialize"], "its scales are empty"),
    (["initialize", "start", "feed"], "its calibration has not ended"),
])
def test_before_the_end_the_panel_says_what_is_missing(steps, words, tmp_path):
    wb = bench()
    for step in steps: getattr(wb, step)()
    wb.code.save("checkpoint", str(tmp_path/"mine"))
    assert words in wb.code.said.value and not (tmp_path/"mine").exists()
    with pytest.raises(LifecycleError, match=words): wb.save_checkpoint(tmp_path/"mine")
    wb.code.save("checkpoint", " ")
    assert "must name the file to write the checkpoint to" in wb.code.said.value


def test_a_saved_run_has_no_model_to_save(tmp_path):
    wb = bench()
    for step in ("initialize", "start", "feed_all"): getattr(wb, step)()
    saved = Workbench.from_record(wb.record)
    with pytest.raises(SessionError, match="model"): saved.save_checkpoint(tmp_path/"mine")
    saved.code.save("checkpoint", str(tmp_path/"mine"))
    assert "model" in saved.code.said.value and not (tmp_path/"mine").exists()
