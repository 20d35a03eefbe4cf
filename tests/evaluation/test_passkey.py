"""Texts that hide a number, and what counts as finding it."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte.errors import CalibrationError, ModelError
from halfbyte.evaluation import passkey as task
from halfbyte.evaluation.passkey import answer, doubling, passkey, prompt, tokens
from tiny_models import tiny


def every_byte(first: str) -> PreTrainedTokenizerFast:
    """A token for each byte, `first` as token 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (letter != first, letter))
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="ÿ")


def pair(first: str = "7"):
    model = tiny("llama", vocab_size=260, max_position_embeddings=1024, eos_token_id=None)
    return model, every_byte(first)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_key_is_hidden_as_deep_as_asked(depth):
    _, tokenizer = pair()
    text = prompt(tokenizer, "31415", 900, depth)
    assert text.startswith(task.TASK)
    assert text.endswith(task.QUESTION)
    before, _, after = (
        text.removeprefix(task.TASK).removesuffix(task.QUESTION).partition(task.HIDDEN.format(key="31415"))
    )
    assert before.count("cart") == round(depth * (before + after).count("cart"))
    assert 900 - tokens(tokenizer, task.FILLER) < tokens(tokenizer, text + " 31415") <= 900


def test_a_text_without_room_is_refused():
    with pytest.raises(CalibrationError, match="longer"):
        prompt(every_byte("7"), "31415", 200, 0.5)


def test_lengths_double_up_to_the_limit():
    assert doubling(1024) == [256, 512, 1024]
    assert doubling(1000) == [256, 512, 1000]
    assert doubling(200) == [200]


@pytest.mark.parametrize("kv_cache", [None, "int4"])
def test_keys_that_are_named_count_and_no_others(kv_cache, monkeypatch):
    """A model that always says 7 finds the sevens."""
    monkeypatch.setattr(task, "DIGITS", 1)
    model, tokenizer = pair("7")
    model.model.norm.weight.zero_()  # all logits are equal: token 0 is the first of the largest
    found = passkey((model, tokenizer), kv_cache=kv_cache, lengths=[480], depths=(0.0, 1.0), keys=12, seed=3)
    draw = random.Random(3)
    drawn = ["".join(draw.choices("123456789", k=1)) for _ in range(24)]
    assert "7" in drawn
    assert found.shares == {480: {0.0: drawn[:12].count("7") / 12, 1.0: drawn[12:].count("7") / 12}}
    assert found.mean == pytest.approx(drawn.count("7") / 24)
    assert found.to_json()["keys"] == 12
    assert (found.kv_cache is None) == (kv_cache is None)


def test_the_answer_is_what_the_model_writes():
    model, tokenizer = pair()
    ids = tokenizer("The pass key is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert answer((model, tokenizer), "The pass key is") == str(tokenizer.decode(written[0, ids.shape[1] :])).strip()


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(CalibrationError, match="choose shorter"):
        passkey(pair(), lengths=[2048])
    with pytest.raises(ModelError, match="fills masks"):
        passkey((tiny("bert"), every_byte("7")))
