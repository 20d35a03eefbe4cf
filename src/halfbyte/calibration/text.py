"""Text to tokens: read, tokenised in one piece, checked against the model that will read them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte.errors import CalibrationError

CHARACTERS_PER_TOKEN = 8  # a first guess on the generous side
MARGIN = 256  # tokens at the end of a cut text, which its next words could have changed


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. CalibrationError where it is missing, empty, or something else than text."""
    with _readable(path):
        text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise CalibrationError(f"{path} is empty: give a file with text in it")
    return text


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file one by one. CalibrationError as of `read_text`, but an empty file has no lines."""
    with _readable(path), path.open(encoding="utf-8") as lines:
        yield from lines


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    if not path.exists():
        raise CalibrationError(f"there is no text file {path}: check the spelling")
    if not path.is_file():
        raise CalibrationError(f"{path} is a folder: give one text file")
    try:
        yield
    except UnicodeDecodeError as cause:
        raise CalibrationError(
            f"{path} is not UTF-8 text ({cause.reason}): convert it, or unpack it if it is compressed"
        ) from cause
    except OSError as cause:
        raise CalibrationError(f"{path} cannot be read ({cause}): check its permissions") from cause


def tokenize(text: str, tokenizer: Any) -> Int64[Tensor, "tokens"]:
    """The tokens of a text as one piece: no special tokens, nothing truncated."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def first_tokens(text: str, tokenizer: Any, count: int | None) -> Int64[Tensor, "tokens"]:
    """The first `count` tokens of `tokenize(text)`; fewer where the text has fewer, all where `count` is None.

    Reads no more of the text than it takes: a tokenizer looks a few words ahead, and `MARGIN` tokens cover that.
    """
    reach = len(text) if count is None else CHARACTERS_PER_TOKEN * (count + MARGIN)
    while reach < len(text):
        ids = tokenize(text[:reach], tokenizer)
        if count is not None and len(ids) >= count + MARGIN:
            return ids[:count]
        reach *= 2
    return tokenize(text, tokenizer)[:count]


def check_vocabulary(ids: Int64[Tensor, "..."], config: Any) -> None:
    """CalibrationError where the model has no embedding for a token."""
    size, highest = vocabulary_size(config), int(ids.max())
    if highest >= size:
        raise CalibrationError(
            f"the tokenizer gives token {highest} and the model's vocabulary ends at {size - 1}: this is the wrong "
            "tokenizer for this model; use the one in the model's own folder"
        )


def check_positions(length: int, config: Any, remedy: str) -> None:
    """CalibrationError, ending in `remedy`, where a sequence is longer than the model's positions."""
    limit = longest_sequence(config)
    if limit is not None and length > limit:
        raise CalibrationError(f"sequences of {length} tokens are longer than the model's {limit} positions: {remedy}")


def vocabulary_size(config: Any) -> int:
    """How many tokens a transformers configuration has embeddings for."""
    return int(config.get_text_config().vocab_size)


def longest_sequence(config: Any) -> int | None:
    """The positions a transformers configuration allows; None where it states no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)
