"""Perplexity, and drift from the original model, measured always the same way so that numbers can be compared.

The text is tokenised once without special tokens and cut into windows that do not overlap; the last partial one is
dropped. A window of n tokens gives n - 1 predictions, and perplexity is exp(mean negative log-likelihood) over them.
With `bos`, each window is the BOS token and n - 1 tokens of text, so that every token of the text is predicted.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from halfbyte.calibration.text import check_positions, check_vocabulary, first_tokens, read_text
from halfbyte.errors import CalibrationError, ModelError
from halfbyte.evaluation.drift import concatenate, drift, negative_log_likelihood
from halfbyte.runtime.load import Pair, opened

Model = str | Path | Pair
LONGEST_FILE_NAME = 1024


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured, and everything that it takes to measure it again."""

    perplexity: float
    tokens: int  # in the windows, of which the first of each is read and not predicted
    window: int
    kl_mean: float | None  # nats per predicted token, KL(original || model); None without an original
    kl_p99: float | None
    top1_agreement: float | None
    model: str
    against: str | None
    bos: bool
    dtype: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as plain values."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Model,
    *,
    against: Model | None = None,
    text: str | Path,
    window: int = 2048,
    limit_windows: int | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    bos: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The perplexity of a model on a text, and its drift from the model `against`.

    Models are folders, hub names, or loaded (model, tokenizer) pairs, which are used as they are; `device` and `dtype`
    are for the others (float32 on the CPU unless given). `text` is a file, or a string that names none and is the text
    itself. `progress` is told (windows done, windows in all). CalibrationError where the text or the window does not
    suit the model; ModelError for models that cannot be compared.
    """
    started = time.monotonic()
    candidate, tokenizer = _loaded(model, device, dtype)
    original, other_tokenizer = (None, None) if against is None else _loaded(against, device, dtype)
    if original is not None:
        _check_comparable(candidate, tokenizer, original, other_tokenizer)
    windows = text_windows(text, tokenizer, window, limit_windows, bos)
    for judged in (candidate, original):
        if judged is not None:
            check_positions(window, judged.config, "choose a smaller --window")
            check_vocabulary(windows, judged.config)
    losses, drifts = [], []
    for done, ids in enumerate(windows, start=1):
        logits = predictions(candidate, ids)
        losses.append(negative_log_likelihood(logits, ids[1:]))
        if not torch.isfinite(losses[-1]).all():
            raise ModelError(
                f"{_name(model)} answers window {done} with NaN or Inf: its weights are damaged, or {candidate.dtype} "
                "is too narrow for it; try --dtype float32"
            )
        if original is not None:
            drifts.append(drift(predictions(original, ids), logits))
        if progress is not None:
            progress(done, len(windows))
    whole = concatenate(drifts) if drifts else None
    return Evaluation(
        perplexity=float(torch.cat(losses).mean().exp()),
        tokens=windows.numel(),
        window=window,
        kl_mean=None if whole is None else whole.mean,
        kl_p99=None if whole is None else whole.quantile,
        top1_agreement=None if whole is None else whole.top1_agreement,
        model=_name(model),
        against=None if against is None else _name(against),
        bos=bos,
        dtype=str(candidate.dtype).removeprefix("torch."),
        seconds=time.monotonic() - started,
    )


def text_windows(
    text: str | Path, tokenizer: Any, window: int, limit: int | None = None, bos: bool = False
) -> Int64[Tensor, "windows window"]:
    """The text's tokens as whole windows, the first `limit` of them. CalibrationError where there is not one."""
    if window < 2 or (limit is not None and limit < 1):
        raise CalibrationError(f"{limit} windows of {window} tokens predict nothing: ask for 1 of 2 tokens at least")
    if bos and tokenizer.bos_token_id is None:
        raise CalibrationError("this tokenizer has no BOS token to begin windows with: evaluate without --bos")
    fresh = window - 1 if bos else window
    body, is_file = _body(text)
    ids = first_tokens(body, tokenizer, None if limit is None else limit * fresh)
    count = len(ids) // fresh
    if count == 0:
        hint = "" if is_file else " (it is taken as the text itself: there is no file of that name)"
        raise CalibrationError(
            f"the text{hint} has {len(ids)} tokens and one window needs {fresh}: give a longer text or a "
            "smaller --window"
        )
    windows = ids[: count * fresh].view(count, fresh)
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), windows], dim=1) if bos else windows


def predictions(model: Any, ids: Int64[Tensor, "window"]) -> Float[Tensor, "predictions vocabulary"]:
    """The logits for every token of a window but its first."""
    return model(input_ids=ids[None, :].to(model.device), use_cache=False).logits[0, :-1]


def _body(text: str | Path) -> tuple[str, bool]:
    """What is to be read, and whether it comes from a file."""
    if isinstance(text, Path):
        return read_text(text.expanduser()), True
    if "\n" not in text and len(text) < LONGEST_FILE_NAME and Path(text).expanduser().exists():
        return read_text(Path(text).expanduser()), True
    return text, False


def _loaded(model: Model, device: str, dtype: torch.dtype | None) -> Pair:
    pair = opened(model, device=device, dtype=dtype)
    if type(pair[0]).__name__.endswith("ForMaskedLM"):
        raise ModelError(f"{_name(model)} fills masks and predicts no next token, so it has no perplexity")
    return pair


def _check_comparable(model: Any, tokenizer: Any, original: Any, other: Any) -> None:
    sizes = model.config.get_text_config().vocab_size, original.config.get_text_config().vocab_size
    if sizes[0] != sizes[1]:
        raise ModelError(f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens: they cannot be compared")
    if tokenizer is not other and tokenizer.get_vocab() != other.get_vocab():
        raise ModelError("the models' tokenizers number their tokens differently: they cannot be compared")


def _name(model: Model) -> str:
    return str(model) if isinstance(model, str | Path) else model[0].name_or_path or type(model[0]).__name__
