"""Second copies and worst heads."""

from typing import Any

import pytest
import torch
from torch import nn

from closeness import relative_error
from halfbyte.errors import CalibrationError, FormatError, ModelError
from halfbyte.evaluation.long_context import doubling, long_context, repeated
from halfbyte.runtime.cache_attention import head_errors, seen_through_cache
from halfbyte.runtime.cache_plan import cache_plan, named_format
from tiny_models import tiny, tokens
from tiny_tokenizer import prose, tiny_tokenizer

TEXT = prose(400)


class Copier(nn.Module):
    """Predicts what followed the last time that the current token was seen; knows nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config: Any = model.config
        self.device = torch.device("cpu")

    def forward(self, input_ids, use_cache=False):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        row = input_ids[0].tolist()
        for place, token in enumerate(row):
            before = [other for other in range(place) if row[other] == token]
            if before:
                logits[0, place, row[before[0] + 1]] = 30.0
        return type("Output", (), {"logits": logits})


def test_the_sequence_ends_with_its_beginning():
    assert repeated(torch.arange(9), 2, 6).tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_distances_double_up_to_the_limit():
    assert doubling(64, 1024) == [64, 128, 256, 512, 960]
    assert doubling(64, 128) == [64]
    assert doubling(64, 100) == []


def test_the_second_copy_and_nothing_else_is_judged():
    """A model that copies is right there, whatever it does elsewhere."""
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    found = long_context((model, tokenizer), text=TEXT, passage=8, distances=[8, 32], sequences=2)
    copied = long_context((Copier(model), tokenizer), text=TEXT, passage=8, distances=[8], sequences=2)
    assert set(found.losses) == {8, 32}
    assert copied.losses[8] < found.losses[8]
    assert copied.first_copy > 1
    assert found.worst_head is None


def test_fewer_bits_hurt_the_worst_head_more():
    pair = tiny("llama"), tiny_tokenizer()
    coarse, fine = (
        long_context(pair, text=TEXT, passage=8, distances=[32], sequences=2, kv_cache=name)
        for name in ("int2", "int8")
    )
    assert coarse.worst_head is not None
    assert fine.worst_head is not None
    assert coarse.worst_head > 10 * fine.worst_head
    assert coarse.kv_cache == "k2 v2 asym g128"


@torch.no_grad()
def test_the_error_of_a_head_is_that_of_its_output():
    """Eight bits are within 5 % everywhere, and nowhere exact."""
    model, ids = tiny("gpt_neox"), tokens(1, 20)
    with seen_through_cache(model, cache_plan(model, named_format("int8")), compare=True):
        model(input_ids=ids, use_cache=False)
        errors = head_errors(model)
    assert errors.shape == (2, 4)
    assert bool(((errors > 0) & (errors < 0.05)).all())


@torch.no_grad()
def test_comparing_changes_no_answer():
    model, ids = tiny("llama"), tokens(1, 20)
    plan = cache_plan(model, named_format("int4"))
    answers = []
    for compare in (False, True):
        with seen_through_cache(model, plan, compare=compare):
            answers.append(model(input_ids=ids, use_cache=False).logits)
    assert relative_error(*answers) == 0


def test_distances_that_leave_the_model_are_refused():
    with pytest.raises(CalibrationError, match="64 positions"):
        long_context((tiny("llama"), tiny_tokenizer()), text=TEXT, passage=8, distances=[60])


def test_an_encoder_and_an_unknown_format_are_refused():
    with pytest.raises(ModelError, match="fills masks"):
        long_context((tiny("bert"), tiny_tokenizer()), text=TEXT)
    with pytest.raises(FormatError, match="no cache format"):
        long_context((tiny("llama"), tiny_tokenizer()), text=TEXT, passage=8, distances=[8], kv_cache="int99")
