"""Where calibration tokens come from: a text, rows of a .jsonl, a named data set, chance, or the model itself.

source                what a sample is
FILE                  one of the first `samples` windows of `length` tokens: the text is tokenised once and cut
FILE.jsonl            one row ("text", or "messages" through the chat template), cut at `length`, never padded
c4, pile, wikitext2   a window at a random place of a random document
random                tokens drawn evenly from the vocabulary without the special ones (ZeroQuant, arXiv 2206.01861)
self                  what the model writes (LLM-QAT, arXiv 2305.17888)

No special tokens are added, except those of a chat template. An encoder's samples are what it reads: between the
special tokens of its tokenizer, with some tokens hidden (encoders.py); `self` is not for encoders, which do not write.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte.calibration.encoders import check_window, fills_masks, masking_of
from halfbyte.calibration.self_written import write
from halfbyte.calibration.text import (
    check_positions,
    check_vocabulary,
    first_tokens,
    read_lines,
    read_text,
    tokenize,
    vocabulary_size,
)
from halfbyte.errors import CalibrationError

SHORTEST_ROW = 32


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where the hub keeps a named data set."""

    path: str
    options: dict[str, Any]
    joined: bool  # rows are lines of one text, not documents


DATA_SETS = {
    "c4": DataSet(
        "allenai/c4", {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"}, joined=False
    ),
    "pile": DataSet("NeelNanda/pile-10k", {"split": "train"}, joined=False),
    "wikitext2": DataSet("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train"}, joined=True),
}


@dataclass(frozen=True, slots=True)
class Calibration:
    """The calibration set: one tensor of token ids per sample, where they are from, and what identifies them."""

    samples: list[Int64[Tensor, "_"]]
    description: str
    sha256: str

    @property
    def tokens(self) -> int:
        return sum(len(sample) for sample in self.samples)

    def batches(self, size: int) -> list[Int64[Tensor, "_ _"]]:
        """Neighbours of one length stacked, at most `size` at a time, in their order: [samples, length] each."""
        runs = [list(run) for _, run in groupby(self.samples, key=len)]
        return [torch.stack(run[start : start + size]) for run in runs for start in range(0, len(run), size)]


def calibration_tokens(
    source: str | Path,
    tokenizer: Any,
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    model: Any = None,
) -> Calibration:
    """`samples` samples of at most `length` tokens (exactly `length`, except for a .jsonl).

    `seed` chooses the places in a data set, `random`, `self`, and what is hidden from an encoder; a file has none.
    `model`, a transformers model on any device, says whether it is an encoder and gives the limits that the samples are
    checked against; `self` needs its weights. CalibrationError where the source is missing, too short, or does not fit
    the model.
    """
    masking = masking_of(tokenizer) if model is not None and fills_masks(model) else None
    around = 0 if masking is None else len(masking.frame)
    if samples < 1 or length < 2 + around:
        raise CalibrationError(
            f"{samples} samples of {length} tokens are no calibration set: ask for 1 of {2 + around} at least"
        )
    if model is not None:
        if masking is not None:
            check_window(length, model.config, tokenizer, "choose a smaller --length")
        check_positions(length, model.config, "choose a --length within them")
    name = str(source)
    length -= around
    if name == "random":
        found, description = _random(tokenizer, model, samples, length, seed), f"random tokens, seed {seed}"
    elif name == "self":
        found, description = _self(tokenizer, model, samples, length, seed), f"written by the model, seed {seed}"
    elif name in DATA_SETS:
        found = _windows_of_documents(_documents(name, seed), name, tokenizer, samples, length, seed)
        description = f"{name} ({DATA_SETS[name].path}), seed {seed}"
    elif name.endswith(".jsonl"):
        found, description = _rows(Path(source).expanduser(), tokenizer, samples, length), f"rows of {Path(name).name}"
    else:
        found, description = _first_windows(Path(source).expanduser(), tokenizer, samples, length), Path(name).name
    if masking is not None:
        dice = torch.Generator().manual_seed(seed)
        found = [masking.hide(sample, dice)[0] for sample in found]
        description += f", some hidden by seed {seed}"
    if model is not None:
        check_vocabulary(torch.cat(found), model.config)
    tokens = sum(len(sample) for sample in found)
    return Calibration(found, f"{len(found)} samples, {tokens} tokens: {description}", fingerprint(found))


def fingerprint(samples: list[Int64[Tensor, "_"]]) -> str:
    """SHA-256 of the token ids and of where each sample ends."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample).to_bytes(8, "little"))
        digest.update(sample.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def ordinary_tokens(tokenizer: Any, model: Any = None) -> Int64[Tensor, "tokens"]:
    """The ids of the vocabulary that are not special and that the model, where given, has embeddings for."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ordinary = set(tokenizer.get_vocab().values()) - added - set(tokenizer.all_special_ids)
    size = max(ordinary, default=-1) + 1 if model is None else vocabulary_size(model.config)
    ids = sorted(index for index in ordinary if index < size)
    if not ids:
        raise CalibrationError("the tokenizer has no token but special ones: use the one in the model's own folder")
    return torch.tensor(ids)


def _random(tokenizer: Any, model: Any, samples: int, length: int, seed: int) -> list[Tensor]:
    vocabulary = ordinary_tokens(tokenizer, model)
    drawn = torch.randint(len(vocabulary), (samples, length), generator=torch.Generator().manual_seed(seed))
    return list(vocabulary[drawn])


def _self(tokenizer: Any, model: Any, samples: int, length: int, seed: int) -> list[Tensor]:
    if model is None:
        raise CalibrationError("the source `self` needs the loaded model, which writes the text: give it, or a file")
    if fills_masks(model):
        raise CalibrationError("an encoder fills masks and writes no text of its own: give a text file, or `random`")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = ordinary_tokens(tokenizer, model)
    first = vocabulary[torch.randint(len(vocabulary), (samples,), generator=generator)]
    return list(write(model, first, length, generator))


def _first_windows(path: Path, tokenizer: Any, samples: int, length: int) -> list[Tensor]:
    if not path.exists():
        raise CalibrationError(
            f"there is no file {path}: give a text file, a .jsonl, or one of {', '.join(DATA_SETS)}, random, self"
        )
    ids = first_tokens(read_text(path), tokenizer, samples * length)
    if len(ids) < samples * length:
        raise CalibrationError(
            f"{path} has {len(ids)} tokens and {samples} samples of {length} need {samples * length}: give a longer "
            f"text, {_smaller(len(ids), length)}"
        )
    return list(ids.view(samples, length))


def _smaller(tokens: int, length: int) -> str:
    if tokens >= length:
        return f"or --samples {tokens // length}"
    return f"or a smaller --length (at most {tokens}, with --samples 1)"


def _rows(path: Path, tokenizer: Any, samples: int, length: int) -> list[Tensor]:
    shortest = min(SHORTEST_ROW, length)
    found: list[Tensor] = []
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            ids = _row(line, f"line {number} of {path}", tokenizer)[:length]
            if len(ids) >= shortest:
                found.append(ids)
        if len(found) == samples:
            return found
    if not found:
        raise CalibrationError(f"{path} has no row of {shortest} tokens or more: give longer texts")
    raise CalibrationError(
        f"{path} has {len(found)} rows of {shortest} tokens or more and {samples} are needed: give more rows, or "
        f"--samples {len(found)}"
    )


def _row(line: str, where: str, tokenizer: Any) -> Tensor:
    try:
        row = json.loads(line)
    except ValueError as cause:
        raise CalibrationError(f"{where} is not JSON ({cause}): write one object per line") from cause
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return tokenize(row["text"], tokenizer)
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return _conversation(row["messages"], where, tokenizer)
    keys = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
    raise CalibrationError(f'{where} has neither "text" (a string) nor "messages" (a list), but {keys}')


def _conversation(messages: list[Any], where: str, tokenizer: Any) -> Tensor:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f'{where} has "messages" and the tokenizer no chat template to spell them with: give rows with "text"'
        )
    if not all(isinstance(message, dict) and "role" in message for message in messages):
        raise CalibrationError(f'{where}: every one of the "messages" is an object with "role" and "content"')
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as cause:
        raise CalibrationError(f"{where} does not fit the tokenizer's chat template: {cause}") from cause
    return torch.tensor(ids, dtype=torch.int64)


def _documents(name: str, seed: int) -> Iterator[str]:
    """The documents of a named data set in random order; one, where the data set is one text."""
    # The one door to `datasets`, which is an extra and slow to import.
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as missing:
        raise CalibrationError(
            f"the data set {name} needs the package `datasets`: pip install 'halfbyte[datasets]', or give a text file, "
            "`random` or `self`"
        ) from missing
    where = DATA_SETS[name]
    try:
        rows = datasets.load_dataset(where.path, **where.options)
    except (OSError, ValueError, DatasetsError) as cause:
        raise CalibrationError(
            f"the data set {name} ({where.path}) can be neither downloaded nor found in the cache ({cause}): give a "
            "text file of your own, `random`, or `self`"
        ) from cause
    if where.joined:
        yield "\n\n".join(rows["text"])
    else:
        for row in rows.shuffle(seed=seed):
            yield row["text"]


def _windows_of_documents(
    documents: Iterator[str], name: str, tokenizer: Any, samples: int, length: int, seed: int
) -> list[Tensor]:
    """A window at a random place of each document that is long enough, or `samples` windows of a single one."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for document in documents:
        ids = tokenize(document, tokenizer)
        for _ in range(samples if DATA_SETS[name].joined else 1):
            if len(ids) >= length:
                start = int(torch.randint(len(ids) - length + 1, (1,), generator=generator))
                found.append(ids[start : start + length])
        if len(found) == samples:
            return found
    raise CalibrationError(
        f"{name} has {len(found)} documents of {length} tokens or more and {samples} samples are needed: use a "
        "smaller --length or fewer --samples"
    )
