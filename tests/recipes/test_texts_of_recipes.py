"""A recipe's text says what the recipe says, whatever its names hold; and texts that harm are refused."""
import json
from pathlib import Path

import pytest
import yaml
from helpers import make_batches, make_model
from hypothesis import given
from hypothesis import strategies as st

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.recipes import from_config, from_yaml, to_config, to_yaml
from qcal_nb.session import Session

NAMES = ["a\x85b", "a\u2028b", "\ufeffa", 'a"""b', "a\\b", "a'b", "re:.*\\bmlp\\b.*", "re:\\x41", "a\nb", "a\tb", "ü名",
         '""")\nimport os; os.abort()\n("""', "{x}", "a: b", "# a", "-", "null", "1e3", "é\x07"]


def ignoring(*names): return QuantizationModifier(scheme="FP8", ignore=list(names))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_survives_yaml_json_and_the_script(name, tmp_path, monkeypatch):
    recipe = ignoring(name, "lm_head")
    assert from_yaml(to_yaml(recipe)).ignore == [name, "lm_head"]
    path = tmp_path/"a{b}.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8", newline="")
    assert from_yaml(path).ignore == from_yaml(str(path)).ignore == [name, "lm_head"]
    assert from_config(json.dumps(to_config(recipe))).ignore == [name, "lm_head"]
    lines = Session(make_model("llama_gqa"), make_batches(1), recipe=recipe).production()
    end = lines.index(")\n", lines.index("recipe = ("))
    space = {}
    exec(lines[lines.index("recipe = ("):end + 1], space)
    assert space["recipe"] == to_yaml(recipe)


@given(st.text(max_size=30))
def test_any_text_survives_yaml(text):
    if text.startswith("re:"): text = f"_{text}"
    if any(0xD800 <= ord(sign) < 0xE000 for sign in text): return
    assert from_yaml(to_yaml(ignoring(text))).ignore == [text]


def test_paths_with_braces(tmp_path):
    recipe = ignoring("lm_head")
    for name in ("run{1}.yaml", "{a}"):
        path = tmp_path/name
        path.write_text(to_yaml(recipe))
        assert from_yaml(str(path)).ignore == ["lm_head"]
    with pytest.raises(FileNotFoundError, match="there is no file"): from_yaml("no{such}.yaml")
    assert from_yaml("{QuantizationModifier: {scheme: FP8}}").scheme == "FP8"
    folder = tmp_path/"{ckpt}"
    folder.mkdir()
    (folder/"config.json").write_text(json.dumps(dict(quantization_config=to_config(recipe))))
    assert from_config(str(folder)).ignore == ["lm_head"]


def merged(levels):
    lines = ["a0: &a0 {x: 1}"]
    for i in range(1, levels): lines.append(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]")
    return "\n".join(lines) + "\n"


HARM = {
    "merges": (merged(40), "merges expand to more than"),
    "references": ("\n".join(["a: &a [1]", *(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]" for p, c in
                                             zip("abcdefghi", "bcdefghij"))]), "references expand to more than"),
    "a number in base 60": ("QuantizationModifier:\n  x: " + "9:" * 200 + "9.5\n", "cannot be read"),
    "depth": ("QuantizationModifier:\n  x: " + "[" * 5000 + "]" * 5000, "cannot be read"),
    "a key twice": ("QuantizationModifier:\n  scheme: FP8\n  scheme: W8A8\n", "scheme appears twice"),
    "a key twice in JSON": ('{"QuantizationModifier": {"scheme": "FP8", "scheme": "W8A8"}}', "scheme appears twice"),
}


@pytest.mark.parametrize("text, why", HARM.values(), ids=HARM)
def test_texts_that_harm_are_refused(text, why, tmp_path):
    path = tmp_path/"recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=why) as error: from_yaml(path)
    assert str(path) in str(error.value)


def test_honest_merges_work():
    group = "QuantizationModifier:\n  config_groups:\n    a: {targets: [Linear], weights: {<<: *x, symmetric: true}}\n"
    text = f"x: &x {{num_bits: 8}}\n{group}"
    with pytest.raises(ValueError, match="'x' is neither a stage"): from_yaml(text)
    found = from_yaml(group.replace("<<: *x", "<<: {num_bits: 8}"))
    assert found.resolved_config.config_groups["a"].weights.num_bits == 8


def test_what_is_no_file(tmp_path):
    import os
    os.mkfifo(tmp_path/"pipe.yaml")
    with pytest.raises(ValueError, match="not a regular file"): from_yaml(tmp_path/"pipe.yaml")
    with pytest.raises(ValueError, match="is a folder"): from_yaml(tmp_path)
    (tmp_path/"bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not text"): from_yaml(tmp_path/"bytes.yaml")
    (tmp_path/"mark.yaml").write_bytes(b"\xef\xbb\xbf" + to_yaml(ignoring("a")).encode())
    assert from_yaml(Path(tmp_path/"mark.yaml")).ignore == ["a"]
    assert yaml.safe_load(to_yaml(ignoring("a")))  # the reference's reader reads it
