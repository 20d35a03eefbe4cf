"""Perplexity, accuracy, and drift from the original model, measured always the same way so that numbers can be compared.

The text is tokenised once without special tokens and cut into windows that do not overlap; the last partial one is
dropped. A window of n tokens gives n - 1 predictions, and perplexity is exp(mean negative log-likelihood) over them.
With `bos`, each window is the BOS token and n - 1 tokens of text, so that every token of the text is predicted.

Encoders predict no next token. Each of their windows has the special tokens of their tokenizer around its text, and
what is measured is what they say of the tokens that are hidden in it (calibration/encoders.py).
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from halfbyte.calibration.encoders import Frame, check_window, fills_masks, longest_window, masking_of
from halfbyte.calibration.text import check_positions, check_vocabulary, first_tokens, read_text
from halfbyte.errors import CalibrationError, ModelError
from halfbyte.evaluation.drift import concatenate, drift, negative_log_likelihood
from halfbyte.evaluation.masked import Question, masked_questions, next_token_questions
from halfbyte.recipe import Recipe
from halfbyte.runtime.cache_attention import seen_through_cache
from halfbyte.runtime.cache_plan import CachePlan, chosen_plan
from halfbyte.runtime.load import AnyRecipe, Pair, opened
from halfbyte.scheme import CacheFormat

Model = str | Path | Pair
LONGEST_FILE_NAME = 1024
NO_FRAME = Frame()
WINDOW = 2048  # as in most papers
SMALLER = "choose a smaller --window"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured, and everything that it takes to measure it again."""

    perplexity: float
    accuracy: float  # share of the predicted tokens that the model holds most likely
    task: Literal["next", "masked"]  # the next token of a text, or those that are hidden in it
    tokens: int  # in the windows, special ones included
    predicted: int  # those among them that the model had to tell
    window: int
    kl_mean: float | None  # nats per predicted token, KL(original || model); None without an original
    kl_p99: float | None
    top1_agreement: float | None
    model: str
    recipe: str | None  # that the model was quantized by while it was loaded
    against: str | None
    kv_cache: str | None  # the format that every token saw its past in; None: as computed
    bos: bool
    seed: int | None  # of the places that are hidden; None where none are
    dtype: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as plain values."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Model,
    *,
    recipe: AnyRecipe | None = None,
    against: Model | None = None,
    kv_cache: str | CacheFormat | None = None,
    text: str | Path,
    window: int | None = None,
    limit_windows: int | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    bos: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity and accuracy of a model on a text, and its drift from the model `against`.

    A decoder predicts every next token, an encoder those that `seed` hides. Models are folders, hub names, or loaded
    (model, tokenizer) pairs, which are used as they are; `device` and `dtype` are for the others (float32 on the CPU
    unless given), and with `recipe` the model, not the original, is quantized while it is loaded. `kv_cache`: a format
    by value or name (runtime/cache_plan.py), through which each token of the model sees its past as decoding would show
    it; "float" for none, None for what the checkpoint says. `text` is a file, or a
    string that names none and is the text itself. `window`: 2048 tokens, or all that an encoder reads at once if they
    are fewer. `progress` is told (windows done, windows in all). CalibrationError where the text or the window does not
    suit the model; ModelError for models that cannot be measured or compared.
    """
    started = time.monotonic()
    candidate, tokenizer = opened(model, recipe=recipe, device=device, dtype=dtype)
    original, other_tokenizer = (None, None) if against is None else opened(against, device=device, dtype=dtype)
    if original is not None:
        _check_comparable(candidate, tokenizer, original, other_tokenizer)
    masked = fills_masks(candidate)
    if masked and kv_cache is not None:
        raise ModelError(f"{type(candidate).__name__} fills masks and has no cache of a past: leave --kv-cache out")
    plan = None if masked else chosen_plan(candidate, kv_cache)
    limit = longest_window(candidate.config, tokenizer) if masked else None
    window = window or min(WINDOW, limit or WINDOW)
    configs = [judged.config for judged in (candidate, original) if judged is not None]
    for config in configs if masked else []:
        check_window(window, config, tokenizer, SMALLER)
    questions = _questions(text, tokenizer, window, limit_windows, masked=masked, bos=bos, seed=seed)
    for config in configs:
        check_positions(window, config, SMALLER)
        check_vocabulary(torch.cat([torch.cat([question.shown, question.answers]) for question in questions]), config)
    losses, hits, drifts = [], [], []
    for done, question in enumerate(questions, start=1):
        logits = predictions(candidate, question, plan)
        losses.append(negative_log_likelihood(logits, question.answers))
        hits.append(logits.argmax(dim=1).cpu() == question.answers)
        if not torch.isfinite(losses[-1]).all():
            raise ModelError(
                f"{_name(model)} answers window {done} with NaN or Inf: its weights are damaged, or {candidate.dtype} "
                "is too narrow for it; try --dtype float32"
            )
        if original is not None:
            drifts.append(drift(predictions(original, question), logits))
        if progress is not None:
            progress(done, len(questions))
    whole = concatenate(drifts) if drifts else None
    return Evaluation(
        perplexity=float(torch.cat(losses).mean().exp()),
        accuracy=float(torch.cat(hits).double().mean()),
        task="masked" if masked else "next",
        tokens=len(questions) * window,
        predicted=sum(len(hit) for hit in hits),
        window=window,
        kl_mean=None if whole is None else whole.mean,
        kl_p99=None if whole is None else whole.quantile,
        top1_agreement=None if whole is None else whole.top1_agreement,
        model=_name(model),
        recipe=None if recipe is None else Recipe.load(recipe).name,
        against=None if against is None else _name(against),
        kv_cache=None if plan is None else str(plan.format),
        bos=bos,
        seed=seed if masked else None,
        dtype=str(candidate.dtype).removeprefix("torch."),
        seconds=time.monotonic() - started,
    )


def _questions(
    text: str | Path, tokenizer: Any, window: int, limit: int | None, *, masked: bool, bos: bool, seed: int
) -> list[Question]:
    """What is asked, window by window."""
    if masked:
        if bos:
            raise CalibrationError("an encoder's windows begin as its tokenizer begins a text: leave --bos out")
        masking = masking_of(tokenizer)
        return masked_questions(text_windows(text, tokenizer, window, limit, masking.frame), masking, seed)
    if bos and tokenizer.bos_token_id is None:
        raise CalibrationError("this tokenizer has no BOS token to begin windows with: evaluate without --bos")
    frame = Frame((tokenizer.bos_token_id,)) if bos else NO_FRAME
    return next_token_questions(text_windows(text, tokenizer, window, limit, frame), frame)


def text_windows(
    text: str | Path, tokenizer: Any, window: int, limit: int | None = None, frame: Frame = NO_FRAME
) -> Int64[Tensor, "windows text"]:
    """The text's tokens in whole windows, the first `limit` of them, each with room for the frame that will be around.

    CalibrationError where there is not one.
    """
    fresh = window - len(frame)
    if window < 2 or fresh < 1 or (limit is not None and limit < 1):
        raise CalibrationError(
            f"{limit} windows of {window} tokens predict nothing: ask for 1 of {max(2, 1 + len(frame))} tokens at least"
        )
    body, is_file = _body(text)
    ids = first_tokens(body, tokenizer, None if limit is None else limit * fresh)
    count = len(ids) // fresh
    if count == 0:
        hint = "" if is_file else " (it is taken as the text itself: there is no file of that name)"
        raise CalibrationError(
            f"the text{hint} has {len(ids)} tokens and one window needs {fresh}: give a longer text or a "
            "smaller --window"
        )
    return ids[: count * fresh].view(count, fresh)


def predictions(model: Any, question: Question, plan: CachePlan | None = None) -> Float[Tensor, "predicted vocabulary"]:
    """The logits for what is asked. `plan`: the cache through which every token sees its past."""
    cached = {} if fills_masks(model) else {"use_cache": False}
    with nullcontext() if plan is None else seen_through_cache(model, plan):
        return model(input_ids=question.shown[None, :].to(model.device), **cached).logits[0, question.places]


def _body(text: str | Path) -> tuple[str, bool]:
    """What is to be read, and whether it comes from a file."""
    if isinstance(text, Path):
        return read_text(text.expanduser()), True
    if "\n" not in text and len(text) < LONGEST_FILE_NAME and Path(text).expanduser().exists():
        return read_text(Path(text).expanduser()), True
    return text, False


def _check_comparable(model: Any, tokenizer: Any, original: Any, other: Any) -> None:
    if fills_masks(model) is not fills_masks(original):
        raise ModelError("one of the models fills masks and the other predicts the next token: they cannot be compared")
    sizes = model.config.get_text_config().vocab_size, original.config.get_text_config().vocab_size
    if sizes[0] != sizes[1]:
        raise ModelError(f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens: they cannot be compared")
    if tokenizer is not other and tokenizer.get_vocab() != other.get_vocab():
        raise ModelError("the models' tokenizers number their tokens differently: they cannot be compared")


def _name(model: Model) -> str:
    return str(model) if isinstance(model, str | Path) else model[0].name_or_path or type(model[0]).__name__
