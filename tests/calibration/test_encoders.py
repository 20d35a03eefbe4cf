"""What an encoder reads in calibration: its tokenizer's frame around each sample, and masks in it."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from halfbyte.calibration.data import calibration_tokens, ordinary_tokens
from halfbyte.calibration.encoders import (
    HIDDEN_SHARE,
    Frame,
    Masking,
    fills_masks,
    frame_of,
    longest_window,
    masking_of,
)
from halfbyte.calibration.text import tokenize
from halfbyte.errors import CalibrationError
from tiny_encoder import BEGIN, END, MASK, PAD, UNKNOWN, encoder_tokenizer
from tiny_models import tiny
from tiny_tokenizer import prose, tiny_tokenizer


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text(prose(900))
    return path


def test_bert_fills_masks_and_llama_does_not():
    assert fills_masks(tiny("bert"))
    assert not fills_masks(tiny("llama"))


def test_the_frame_is_what_the_tokenizer_writes_around_a_text():
    assert frame_of(encoder_tokenizer()) == Frame((BEGIN,), (END,))
    assert frame_of(tiny_tokenizer()) == Frame()
    twice = encoder_tokenizer()
    twice.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] [PAD] $A [SEP]", special_tokens=[("[CLS]", BEGIN), ("[PAD]", PAD), ("[SEP]", END)]
    )
    assert frame_of(twice) == Frame((BEGIN, PAD), (END,))


def test_a_frame_goes_around_every_row():
    rows = torch.tensor([[7, 8, 9], [9, 8, 7]])
    assert Frame((1, 2), (3,)).around(rows).tolist() == [[1, 2, 7, 8, 9, 3], [1, 2, 9, 8, 7, 3]]
    assert torch.equal(Frame().around(rows), rows)


MASKING = Masking(Frame((BEGIN,), (END,)), MASK, (PAD, UNKNOWN, BEGIN, END, MASK))


@given(
    text=st.lists(st.integers(0, 40), min_size=1, max_size=120).filter(lambda ids: max(ids) > MASK),
    seed=st.integers(0, 99),
)
def test_a_fixed_share_of_ordinary_tokens_is_hidden_and_nothing_else_changes(text, seed):
    shown, places = MASKING.hide(torch.tensor(text), torch.Generator().manual_seed(seed))
    framed = torch.tensor([BEGIN, *text, END])
    ordinary = sum(token > MASK for token in text)
    assert len(places) == min(max(1, round(HIDDEN_SHARE * len(text))), ordinary)
    assert (framed[places] > MASK).all()
    assert (shown[places] == MASK).all()
    assert places.tolist() == sorted(set(places.tolist()))
    assert torch.equal(shown.index_copy(0, places, framed[places]), framed)


def test_every_place_is_hidden_about_as_often_as_the_others():
    dice, count = torch.Generator().manual_seed(0), torch.zeros(42)
    for _ in range(1000):
        count[MASKING.hide(torch.arange(5, 45), dice)[1]] += 1
    assert count[0] == count[-1] == 0
    # 6 of 40 in each of 1000: a standard deviation is 11.3
    assert ((count[1:-1] - 150).abs() < 57).all()


def test_a_text_of_unknown_words_hides_nothing_and_says_so():
    with pytest.raises(CalibrationError, match="3 tokens holds nothing but special and unknown ones"):
        MASKING.hide(torch.tensor([UNKNOWN, UNKNOWN, END]), torch.Generator())


def test_samples_of_an_encoder_are_framed_masked_and_as_long_as_asked_for(text):
    calibration = calibration_tokens(text, encoder_tokenizer(), samples=7, length=33, model=tiny("bert"))
    samples = torch.stack(calibration.samples)
    assert samples.shape == (7, 33)
    assert (samples[:, 0] == BEGIN).all()
    assert (samples[:, -1] == END).all()
    inner, whole = samples[:, 1:-1].flatten(), tokenize(text.read_text(), encoder_tokenizer())[: 7 * 31]
    assert torch.equal(inner[inner != MASK], whole[inner != MASK])
    assert (inner == MASK).sum() == 7 * round(HIDDEN_SHARE * 31)


def test_the_seed_chooses_what_is_hidden_and_the_description_says_so(text):
    one, again, other = (
        calibration_tokens(text, encoder_tokenizer(), samples=2, length=20, seed=seed, model=tiny("bert"))
        for seed in (0, 0, 1)
    )
    assert one.sha256 == again.sha256 != other.sha256
    assert "hidden by seed 1" in other.description


def test_rows_keep_their_length_within_the_frame(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": prose(words)}) + "\n" for words in (14, 60)))
    found = calibration_tokens(path, encoder_tokenizer(), samples=2, length=60, model=tiny("bert")).samples
    shorter = len(tokenize(prose(14), encoder_tokenizer()))
    assert [len(sample) for sample in found] == [shorter + 2, 60]
    assert all((sample[0], sample[-1]) == (BEGIN, END) for sample in found)


def test_random_tokens_of_an_encoder_are_ordinary_but_for_frame_and_masks():
    tokenizer, model = encoder_tokenizer(), tiny("bert")
    drawn = torch.stack(calibration_tokens("random", tokenizer, samples=30, length=40, model=model).samples)
    inner = drawn[:, 1:-1]
    assert set(inner[inner != MASK].tolist()) == set(ordinary_tokens(tokenizer, model).tolist())
    assert not set(inner.flatten().tolist()) & {PAD, UNKNOWN, BEGIN, END}


def test_a_decoders_samples_have_neither_frame_nor_masks(text):
    tokenizer = encoder_tokenizer()
    bare = calibration_tokens(text, tokenizer, samples=2, length=20, model=tiny("llama"))
    assert torch.equal(torch.cat(bare.samples), tokenize(text.read_text(), tokenizer)[:40])


def test_an_encoder_does_not_write_its_own_text():
    with pytest.raises(CalibrationError, match="writes no text of its own: give a text file, or `random`"):
        calibration_tokens("self", encoder_tokenizer(), samples=1, length=8, model=tiny("bert"))


@pytest.mark.parametrize(("positions", "told"), [(48, 48), (80, 64)], ids=["model", "tokenizer"])
def test_lengths_beyond_what_an_encoder_reads_name_the_option(positions, told, text):
    """The tokenizer's model_max_length is 64."""
    model = tiny("bert", max_position_embeddings=positions)
    assert longest_window(model.config, encoder_tokenizer()) == told
    with pytest.raises(CalibrationError, match=rf"2048 tokens are longer than the {told} that .* --length"):
        calibration_tokens(text, encoder_tokenizer(), model=model)
    calibration_tokens(text, encoder_tokenizer(), samples=1, length=told, model=model)


def test_a_length_without_room_for_text_is_refused(text):
    with pytest.raises(CalibrationError, match="1 samples of 3 tokens are no calibration set: ask for 1 of 4"):
        calibration_tokens(text, encoder_tokenizer(), samples=1, length=3, model=tiny("bert"))


def test_an_encoder_needs_a_mask_token_and_a_frame_that_can_be_told(text):
    with pytest.raises(CalibrationError, match="no mask token: use the tokenizer in the model's own folder"):
        calibration_tokens(text, encoder_tokenizer(mask_token=None), samples=1, length=8, model=tiny("bert"))
    unclear = encoder_tokenizer()
    unclear.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS]", special_tokens=[("[CLS]", BEGIN)])
    with pytest.raises(CalibrationError, match="cannot be told"):
        masking_of(unclear)


class Unframed(Masking):
    def hide(self, text, dice):
        return Masking(Frame(), self.mask, self.special).hide(text, dice)


class Shown(Masking):
    def hide(self, text, dice):
        return self.frame.around(text), super().hide(text, dice)[1]


@pytest.mark.parametrize("bug", [Unframed, Shown])
def test_the_comparison_with_the_text_notices(bug, text, monkeypatch):
    monkeypatch.setattr(
        "halfbyte.calibration.data.masking_of", lambda _: bug(MASKING.frame, MASKING.mask, MASKING.special)
    )
    with pytest.raises((AssertionError, RuntimeError)):
        test_samples_of_an_encoder_are_framed_masked_and_as_long_as_asked_for(text)
