import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from halfbyte.calibration.data import calibration_tokens, fingerprint, ordinary_tokens
from halfbyte.calibration.text import first_tokens, tokenize
from halfbyte.errors import CalibrationError
from tiny_models import VOCABULARY, tiny
from tiny_tokenizer import prose, tiny_tokenizer


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text(prose(1500))
    return path


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chatty() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
        "<s>{{ m.content }}</s>{% endfor %}"
    )
    return tokenizer


def test_a_file_gives_its_first_tokens_as_windows_without_gaps(text_file):
    calibration = calibration_tokens(text_file, tiny_tokenizer(), samples=7, length=33)
    whole = tokenize(text_file.read_text(), tiny_tokenizer())
    assert [len(sample) for sample in calibration.samples] == [33] * 7
    assert torch.equal(torch.cat(calibration.samples), whole[: 7 * 33])
    assert "some.txt" in calibration.description
    assert calibration.tokens == 7 * 33


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 700), words=st.integers(1, 2500), seed=st.integers(0, 9))
def test_reading_a_part_of_a_text_changes_no_token(count, words, seed):
    text = prose(words, seed)
    assert torch.equal(first_tokens(text, tiny_tokenizer(), count), tokenize(text, tiny_tokenizer())[:count])


def test_a_seed_does_not_move_the_windows_of_a_file(text_file):
    one, other = (calibration_tokens(text_file, tiny_tokenizer(), samples=2, length=9, seed=seed) for seed in (0, 1))
    assert one.sha256 == other.sha256


def test_the_fingerprint_tells_tokens_order_and_where_samples_end():
    samples = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    others = [
        samples[::-1],
        [torch.tensor([1, 2]), torch.tensor([3, 4, 5])],
        samples[:1],
        [torch.tensor([1, 2, 3, 4, 5])],
    ]
    assert len({fingerprint(found) for found in [samples, *others]}) == 5
    assert fingerprint(samples) == fingerprint([sample.clone() for sample in samples])


def test_rows_of_a_jsonl_stay_apart_are_cut_and_never_padded(tmp_path):
    texts = [prose(words, seed=words) for words in (40, 3, 15, 60, 20)]
    path = jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    calibration = calibration_tokens(path, tiny_tokenizer(), samples=3, length=90)
    expected = [tokenize(text, tiny_tokenizer())[:90] for text in texts if text != texts[1]][:3]
    assert [sample.tolist() for sample in calibration.samples] == [ids.tolist() for ids in expected]
    assert len({len(sample) for sample in calibration.samples}) > 1


def test_batches_hold_neighbours_of_one_length_in_order(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": prose(words)} for words in (40, 50, 60, 14, 70)])
    calibration = calibration_tokens(path, tiny_tokenizer(), samples=5, length=60)
    batches = calibration.batches(2)
    assert [tuple(batch.shape) for batch in batches][:2] == [(2, 60), (1, 60)]
    assert [row.tolist() for batch in batches for row in batch] == [sample.tolist() for sample in calibration.samples]


def test_messages_go_through_the_chat_template(tmp_path):
    rows = [{"messages": [{"role": "user", "content": prose(20)}, {"role": "assistant", "content": "tea"}]}]
    calibration = calibration_tokens(jsonl(tmp_path / "m.jsonl", rows), chatty(), samples=1, length=500)
    spelt = f"<s>{rows[0]['messages'][0]['content']}</s><s>tea</s>"
    assert calibration.samples[0].tolist() == tiny_tokenizer()(spelt, add_special_tokens=False)["input_ids"]


def test_random_tokens_are_drawn_from_all_ordinary_ones():
    calibration = calibration_tokens("random", tiny_tokenizer(), samples=40, length=60, seed=3)
    seen = torch.cat(calibration.samples).unique()
    assert torch.equal(seen, ordinary_tokens(tiny_tokenizer()))
    assert not set(seen.tolist()) & set(tiny_tokenizer().all_special_ids)


def test_random_tokens_stay_within_a_smaller_vocabulary():
    model = tiny("llama", vocab_size=20)
    assert (
        max(sample.max() for sample in calibration_tokens("random", tiny_tokenizer(), length=60, model=model).samples)
        == 19
    )


def test_self_written_text_begins_greedily_and_is_the_same_for_the_same_seed():
    model = tiny("llama")
    state = torch.get_rng_state()
    first, again, other = (
        calibration_tokens("self", tiny_tokenizer(), samples=18, length=12, seed=seed, model=model)
        for seed in (5, 5, 6)
    )
    assert first.sha256 == again.sha256 != other.sha256
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.stack(first.samples)
    likeliest = model(input_ids=ids).logits.argmax(dim=2)
    follows = ids[:, 1:] == likeliest[:, :-1]
    assert follows[:, :3].all()
    assert follows[:, 5:].float().mean() < 0.7
    assert len(ids[:, 0].unique()) > 5


def test_self_written_text_follows_the_models_distribution():
    """A model whose next token does not depend on the context: its bias alone says how often each token comes."""
    model = tiny("gptj")
    model.lm_head.weight.zero_()
    model.lm_head.bias.copy_(torch.linspace(-2, 2, VOCABULARY))
    samples = calibration_tokens("self", tiny_tokenizer(), samples=64, length=40, model=model).samples
    drawn = torch.stack(samples)[:, 6:].flatten()
    found = torch.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    expected = model.lm_head.bias.softmax(dim=0)
    # a count of n draws deviates by sqrt(p (1 - p) / n); five of those are met once in a million
    assert ((found - expected).abs() < 5 * (expected / len(drawn)).sqrt()).all()


def test_self_needs_a_model_with_weights():
    with pytest.raises(CalibrationError, match="needs the loaded model"):
        calibration_tokens("self", tiny_tokenizer())
    with pytest.raises(CalibrationError, match="no weights in memory"):
        calibration_tokens("self", tiny_tokenizer(), length=8, model=tiny("llama").to("meta"))


def test_a_model_that_overflows_cannot_write():
    model = tiny("llama")
    model.get_submodule("model.norm").weight.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        calibration_tokens("self", tiny_tokenizer(), samples=1, length=8, model=model)


@pytest.fixture
def data_sets(monkeypatch):
    """Stands in for the package `datasets`: 60 documents of many lengths, and what was asked for."""
    asked = []

    class Rows(list):
        def shuffle(self, seed: int) -> "Rows":
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
            return Rows(self[index] for index in order)

        def __getitem__(self, key):
            return [row["text"] for row in self] if key == "text" else super().__getitem__(key)

    def load_dataset(path, **options):
        asked.append((path, options))
        return Rows({"text": prose(5 + 3 * index, seed=index)} for index in range(60))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", ["c4", "pile"])
def test_a_data_set_gives_a_window_of_each_of_several_documents(data_sets, name):
    texts = {tuple(tokenize(prose(5 + 3 * index, seed=index), tiny_tokenizer()).tolist()) for index in range(60)}
    calibration = calibration_tokens(name, tiny_tokenizer(), samples=9, length=40)
    homes = [
        next(text for text in texts if any(text[at : at + 40] == tuple(window.tolist()) for at in range(len(text))))
        for window in calibration.samples
    ]
    assert len(set(homes)) == 9
    assert all(len(sample) == 40 for sample in calibration.samples)
    again, other = (calibration_tokens(name, tiny_tokenizer(), samples=9, length=40, seed=seed) for seed in (0, 1))
    assert calibration.sha256 == again.sha256 != other.sha256


def test_wikitext_is_one_text(data_sets):
    joined = tokenize("\n\n".join(prose(5 + 3 * index, seed=index) for index in range(60)), tiny_tokenizer()).tolist()
    calibration = calibration_tokens("wikitext2", tiny_tokenizer(), samples=3, length=200)
    for sample in calibration.samples:
        assert any(joined[at : at + 200] == sample.tolist() for at in range(len(joined)))
    assert data_sets == [("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train"})]


def test_a_data_set_with_too_few_long_documents_is_refused(data_sets):
    with pytest.raises(CalibrationError, match=r"pile has \d+ documents of 400 tokens or more and 60 samples"):
        calibration_tokens("pile", tiny_tokenizer(), samples=60, length=400)


def test_offline_a_data_set_names_what_else_there_is(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(CalibrationError, match=r"allenai/c4.*text\s+file of your own, `random`, or `self`"):
        calibration_tokens("c4", tiny_tokenizer())


def test_without_the_package_datasets_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"halfbyte\[datasets\]"):
        calibration_tokens("c4", tiny_tokenizer())


def test_a_short_text_says_how_much_there_is_and_what_would_do(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(prose(100))
    tokens = len(tokenize(prose(100), tiny_tokenizer()))
    with pytest.raises(
        CalibrationError, match=rf"{tokens} tokens and 128 samples of 50 need 6400.*--samples {tokens // 50}"
    ):
        calibration_tokens(path, tiny_tokenizer(), length=50)
    with pytest.raises(CalibrationError, match=rf"smaller --length \(at most {tokens}"):
        calibration_tokens(path, tiny_tokenizer(), length=2048)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"abc \xff\xfe", "not UTF-8"), (None, "there is no file")],
    ids=["empty", "blank", "binary", "missing"],
)
def test_a_file_without_text_is_refused(tmp_path, content, complaint):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=complaint):
        calibration_tokens(path, tiny_tokenizer())


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(CalibrationError, match="is a folder"):
        calibration_tokens(tmp_path, tiny_tokenizer())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "tea"', "line 2 of .* is not JSON"),
        ('["tea"]', "but a list"),
        ('{"content": "tea"}', "but content"),
        ('{"text": 5}', "but text"),
        ('{"messages": [{"role": "user", "content": "tea"}]}', "no chat template"),
    ],
)
def test_a_row_that_is_not_understood_is_named(tmp_path, line, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": prose(40)}) + "\n" + line + "\n")
    with pytest.raises(CalibrationError, match=complaint):
        calibration_tokens(path, tiny_tokenizer(), samples=2)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "judge", "content": "tea"}, r"does not fit the tokenizer's chat template: no judges"),
        ({"content": "tea"}, 'an object with "role"'),
        ("tea", 'an object with "role"'),
    ],
)
def test_messages_that_do_not_fit_the_template_are_named(tmp_path, message, complaint):
    path = jsonl(tmp_path / "m.jsonl", [{"messages": [message]}])
    with pytest.raises(CalibrationError, match=f"line 1 of .*{complaint}"):
        calibration_tokens(path, chatty(), samples=1)


def test_too_few_rows_say_how_many_there_are(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": prose(words)} for words in (40, 2, 50)])
    with pytest.raises(CalibrationError, match=r"2 rows of 32 tokens or more and 128 are needed.*--samples 2"):
        calibration_tokens(path, tiny_tokenizer())
    with pytest.raises(CalibrationError, match="no row of 32 tokens"):
        calibration_tokens(jsonl(path, [{"text": "tea"}]), tiny_tokenizer())


def test_tokens_beyond_the_models_vocabulary_mean_the_wrong_tokenizer(text_file):
    with pytest.raises(CalibrationError, match=r"vocabulary ends at 19: .*wrong\s+tokenizer"):
        calibration_tokens(text_file, tiny_tokenizer(), samples=1, length=60, model=tiny("llama", vocab_size=20))


def test_samples_longer_than_the_models_positions_are_refused(text_file):
    with pytest.raises(CalibrationError, match="65 tokens are longer than the model's 64 positions"):
        calibration_tokens(text_file, tiny_tokenizer(), samples=1, length=65, model=tiny("gpt2"))
    calibration_tokens(text_file, tiny_tokenizer(), samples=1, length=64, model=tiny("gpt2"))


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (1, 1)])
def test_no_samples_are_no_calibration_set(samples, length):
    with pytest.raises(CalibrationError, match="no calibration set"):
        calibration_tokens("random", tiny_tokenizer(), samples=samples, length=length)


def test_a_tokenizer_of_special_tokens_only_is_refused():
    empty = SimpleNamespace(get_vocab=lambda: {"<s>": 1}, all_special_ids=[1], added_tokens_decoder={})
    with pytest.raises(CalibrationError, match="no token but special"):
        calibration_tokens("random", empty)
