"""What makes the largest values: planted sinks and planted tokens, and what looks like them but is not."""
import itertools
from collections import Counter

import pytest
import torch
from helpers import make_batches, make_model
from pydoc_data.topics import topics

from qcal_nb.analysis import compare_observers, findings, outlier_ratio
from qcal_nb.analysis.finding import in_figures
from qcal_nb.analysis.positions import LEAST_ROW, TIMES, first_position, loud_token, massive_activations
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts, load_smollm2, load_tiny_llama
from qcal_nb.records import CalibrationRecord, record
from qcal_nb.stats import measure
from tests.modeling import mixtures

OPTIONS = dict(scheme="INT8_STATIC", progress=False)
PLANTED = "model.layers.1.mlp.down_proj"


def said(run, words): return next((f for f in findings(run, progress=False) if f.words.startswith(words)), None)


class Planted:
    "Inside, the input of a module is changed by a function of the input and the token ids."

    def __init__(self, model, module, change):
        self.ids = None
        def keep(_, args, kwargs): self.ids = kwargs["input_ids"]
        def alter(_, args): return (change(args[0].clone(), self.ids),)
        self.handles = [model.register_forward_pre_hook(keep, with_kwargs=True),
                        model.get_submodule(module).register_forward_pre_hook(alter)]

    def __enter__(self): return self

    def __exit__(self, *_):
        for handle in self.handles: handle.remove()


def sink(x, ids, size=500.0):
    x[:, 0, 5] = size
    return x


def first_seen(x, ids):
    "A sink at the first token of each row that is not padding (0)."
    place = (ids != 0).int().argmax(1)
    x[torch.arange(len(x)), place, 5] = 500.0
    return x


def loud(token):
    def change(x, ids):
        x[ids == token] *= 300
        return x
    return change


@pytest.fixture(scope="module")
def tiny(): return load_tiny_llama()


def ids_of(rows=10, length=64, seed=3):
    "Random ids, none of a special token (0 and 1)."
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- the first position ---

def test_a_planted_sink_is_named_with_channel_times_and_modules():
    model = make_model("llama_gqa")
    with Planted(model, PLANTED, sink):
        run = record(model, [row[None] for row in ids_of()], **OPTIONS)
    found = said(run, "Massive activations of the first position in 1 of 8 inputs")
    assert found.keys == ((PLANTED, "input"),) and PLANTED in found.words and "Sun et al. 2024" in found.words
    times = in_figures(outlier_ratio(run[PLANTED, "input"]))
    assert found.tensors == (f"{PLANTED} (input): channel 5, 500, which is {times} times the bulk",)
    assert [one.words.split()[0] for one in found.remedies] == ["spare", "use", "give"]
    assert "FP8" in found.remedies[1].words and not any("percentile" in one.words for one in found.remedies)
    assert found.remedies[0].code == f"ignore=['lm_head', {PLANTED!r}]" and "only measuring can say" in found.words


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_position_is_that_in_the_row(batch_size):
    model = make_model("llama_gqa")
    with Planted(model, PLANTED, sink):
        run = record(model, list(ids_of().split(batch_size)), **OPTIONS)
    assert list(massive_activations(run)) == [(PLANTED, "input")]


def test_a_merged_record_says_the_same():
    model, batches = make_model("llama_gqa"), [row[None] for row in ids_of()]
    with Planted(model, PLANTED, sink):
        whole = record(model, batches, **OPTIONS)
        parts = [record(model, batches[i:i + 5], batch_indices=range(i, i + 5), **OPTIONS) for i in (0, 5)]
    assert str(said(parts[1] | parts[0], "Massive")) == str(said(whole, "Massive"))


def test_a_record_from_a_file_says_the_same(tmp_path):
    model = make_model("llama_gqa")
    with Planted(model, PLANTED, sink):
        run = record(model, [row[None] for row in ids_of()], **OPTIONS)
    assert str(said(CalibrationRecord.load(run.save(tmp_path / "a")), "Massive")) == str(said(run, "Massive"))


@pytest.mark.parametrize("rows, found", [(1, False), (2, True), (4, True), (7, True)])
def test_few_rows_are_enough_but_one(rows, found):
    x = torch.randn(rows, 64, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0, 3] = 300.0
    assert (first_position(measure(x)) is not None) == found


def rows_with(places, channels, value=300.0):
    x = torch.randn(8, 64, 32, generator=torch.Generator().manual_seed(0))
    for row, (place, channel) in enumerate(zip(places, channels)): x[row, place, channel] = value
    return measure(x)


@pytest.mark.parametrize("at_first, in_one", list(itertools.product(range(3, 9), repeat=2)))
def test_six_of_eight_at_the_first_position_and_six_in_one_channel(at_first, in_one):
    stats = rows_with([0] * at_first + list(range(10, 18 - at_first)), [3] * in_one + list(range(10, 18 - in_one)))
    assert (first_position(stats) is not None) == (at_first >= 6 and in_one >= 6)


@pytest.mark.parametrize("value", [10.0, 25.0, 60.0])
def test_ten_times_the_bulk(value):
    stats = rows_with([0] * 8, [3] * 8, value)
    assert (first_position(stats) is not None) == (outlier_ratio(stats) >= TIMES)


@pytest.mark.parametrize("length", [1, 2, LEAST_ROW])
def test_rows_of_a_few_tokens_say_nothing_about_position(length):
    x = torch.randn(400, length, 32, generator=torch.Generator().manual_seed(0))
    x[:8, 0, 3] = 300.0
    assert (first_position(measure(x)) is not None) == (length >= LEAST_ROW)


def test_tensors_without_rows_of_tokens_are_left_alone():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[0, 3] = 300.0
    assert first_position(measure(x)) is None and loud_token(measure(x)) is None
    assert first_position(measure(torch.zeros(8, 64, 4))) is None and first_position(measure(torch.zeros(0, 4))) is None


def test_routed_tokens_have_no_position():
    "An expert that is fed its own tokens: the first of them is not the first of a text."
    model = mixtures.make("llama4")
    expert = "model.layers.0.feed_forward.experts.1.down_proj"
    run = record(model, make_batches(8), progress=False)
    assert {len(e.position) for e in run[expert, "input"].top} == {1}
    assert not massive_activations(run) and not [f for f in findings(run) if f.words.startswith("Tokens")]


def test_a_sink_in_a_mixture_of_experts():
    model = mixtures.make("mixtral")
    name = "model.layers.1.self_attn.o_proj"
    with Planted(model, name, sink):
        run = record(model, make_batches(8), progress=False)
    assert list(massive_activations(run)) == [(name, "input")]


def test_bert_whose_first_position_is_always_one_token():
    model = make_model("bert")
    batches = make_batches(8)
    for batch in batches: batch["input_ids"][:, 0] = 101
    name = "encoder.layer.1.output.dense"
    assert said(record(model, batches, **OPTIONS), "Massive") is None
    with Planted(model, name, sink):
        run = record(model, batches, **OPTIONS)
    assert said(run, "Massive").keys == ((name, "input"),)


def test_embedded_model_is_silent_and_its_first_token_is_not_blamed(tiny):
    model, tokenizer = tiny
    run = record(model, calibration_texts()[:10], tokenizer=tokenizer, max_length=256, **OPTIONS)
    downs = [run[f"model.layers.{i}.mlp.down_proj", "input"] for i in range(4)]
    assert all(Counter(e.position[-1] for e in stats.top)[0] >= 6 for stats in downs)
    assert all(3 < outlier_ratio(stats) < TIMES for stats in downs)
    assert not massive_activations(run) and said(run, "Tokens") is None
    assert not [f for f in findings(run) if "<s>" in str(f)]


def test_token_and_position_that_cannot_be_told_apart(tiny):
    model, tokenizer = tiny
    with Planted(model, PLANTED, sink):
        run = record(model, calibration_texts()[:8], tokenizer=tokenizer, max_length=64, **OPTIONS)
    assert "always under the token '<s>', so that token and position cannot be told apart" in said(run, "Massive").words
    bare = [dict(input_ids=row[None], attention_mask=torch.ones(1, 64, dtype=torch.long)) for row in ids_of()]
    with Planted(model, PLANTED, sink):
        run = record(model, bare, tokenizer=tokenizer, **OPTIONS)
    assert "different tokens" in said(run, "Massive").words


def test_what_the_recipe_makes_of_a_sink(tiny):
    model, tokenizer = tiny
    endings = dict(INT8_STATIC="at most a tenth of its levels to 99.9 % of the values.", W4A16="unquantized.",
                   W8A8="they change no other token's scale.", FP8="most other values their precision.")
    options = dict(tokenizer=tokenizer, max_length=64, progress=False)
    for scheme, ending in endings.items():
        with Planted(model, PLANTED, sink):
            run = record(model, calibration_texts()[:8], scheme=scheme, **options)
        found = said(run, "Massive")
        assert found.words.endswith(ending) and bool(found.remedies) == (scheme in ("INT8_STATIC", "FP8"))
        assert any("use FP8" in one.words for one in found.remedies) == (scheme == "INT8_STATIC")


def test_a_recipe_that_ignores_something_keeps_ignoring_it(tiny):
    model, tokenizer = tiny
    recipe = QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head", "re:.*layers[.]0[.].*"])
    with Planted(model, PLANTED, sink):
        run = record(model, calibration_texts()[:8], tokenizer=tokenizer, max_length=64, scheme=recipe, progress=False)
    assert said(run, "Massive").remedies[0].code == f"ignore=['lm_head', 're:.*layers[.]0[.].*', {PLANTED!r}]"


def test_left_padding_blames_no_token_by_itself(tiny):
    "The first token of each text stands somewhere else, so the finding is silent."
    model, tokenizer = tiny
    ids = ids_of(12)
    for row in range(12): ids[row, :row + 1] = 0
    batch = dict(input_ids=ids, attention_mask=(ids != 0).long())
    mask = lambda batch: batch["attention_mask"].bool()
    with Planted(model, PLANTED, first_seen):
        run = record(model, [batch], tokenizer=tokenizer, mask=mask, **OPTIONS)
    assert said(run, "Massive") is None and said(run, "Tokens") is None
    ids[range(12), range(1, 13)] = 7    # now every text begins with one token, which cannot be told from a loud one
    with Planted(model, PLANTED, first_seen):
        run = record(model, [dict(batch, input_ids=ids)], tokenizer=tokenizer, mask=mask, **OPTIONS)
    assert "padded on the left" in said(run, "Tokens").words


def test_no_forecast_says_what_clips_do_to_massive_activations(tiny):
    "A sink whose own scale is forecast to cost a little, and that another observer would clip."
    model, tokenizer = tiny
    options = dict(tokenizer=tokenizer, max_length=64, gradients=True, **OPTIONS)
    with Planted(model, PLANTED, lambda x, ids: sink(x, ids, 60.0)):
        run = record(model, calibration_texts()[:10], **options)
    found = said(run, "Massive")
    rows = compare_observers(run).query(f"module == {PLANTED!r} and base_name == 'input'").set_index("observer").kl
    assert found.kl == pytest.approx(rows["minmax"])
    assert f"{in_figures(rows['minmax'], 2)} nats forecast" in found.tensors[0]
    assert [one.words.split()[0] for one in found.remedies][0] == "spare" and found.remedies[0].saves >= found.kl
    assert rows.min() < rows["minmax"] and not any("observer" in one.words for one in found.remedies)
    assert "at the 15 inputs of 27 modules" in said(run, "The observer with the least forecast cost").words
    assert "without massive activations" in said(run, "The observer with the least forecast cost").words


# --- a token ---

def test_a_token_that_is_loud_wherever_it_stands(tiny):
    model, tokenizer = tiny
    ids = ids_of()
    ids[:, 0] = 0
    for row in range(8): ids[row, 10 + 3 * row] = 99
    with Planted(model, "model.layers.1.mlp.up_proj", loud(99)):
        run = record(model, [row[None] for row in ids], tokenizer=tokenizer, **OPTIONS)
    found = said(run, "Tokens that make outliers")
    token = tokenizer.decode([99])
    assert repr(token) in found.words and "mask=[its id]" in found.words and "That is no remedy" in found.words
    assert (PLANTED, "input") in found.keys and said(run, "Massive") is None
    assert not any("mask" in one.words for one in found.remedies)


def test_a_token_at_one_position_is_not_blamed(tiny):
    model, tokenizer = tiny
    ids = ids_of()
    ids[ids == 99] = 98
    ids[:, 20] = 99
    with Planted(model, "model.layers.1.mlp.up_proj", loud(99)):
        run = record(model, [row[None] for row in ids], tokenizer=tokenizer, **OPTIONS)
    assert said(run, "Tokens") is None


def test_without_a_tokenizer_no_token_is_named():
    model = make_model("llama_gqa")
    ids = ids_of()
    with Planted(model, "model.layers.1.mlp.up_proj", loud(99)):
        run = record(model, [row[None] for row in ids], **OPTIONS)
    assert said(run, "Tokens") is None


# --- a real model ---

@pytest.mark.real
@pytest.mark.slow
def test_smollm2_has_seven_and_blames_no_token():
    model, tokenizer = load_smollm2()
    texts = [topics[key] for key in sorted(topics) if len(topics[key]) > 1800]
    ids = (tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :256] for text in texts)
    data = list(itertools.islice((row for row in ids if row.shape[1] == 256), 10))
    run = record(model, data, tokenizer=tokenizer, **OPTIONS)
    found = said(run, "Massive activations of the first position in 7 of 120 inputs")
    assert "model.layers.{1,2,8,9,11,27,28}.mlp.down_proj." in found.words
    assert found.tensors[0].startswith("model.layers.11.mlp.down_proj (input): channel 1229,")
    assert "under 10 different tokens" in found.words and said(run, "Tokens") is None
