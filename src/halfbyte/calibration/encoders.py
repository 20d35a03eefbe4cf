"""What an encoder reads: a text between the special tokens of its tokenizer, some of its tokens hidden.

Calibration and evaluation hide alike, as a masked model was trained (BERT, arXiv 1810.04805, section 3.1): in every
window `HIDDEN_SHARE` of the text becomes the mask token. The other replacements (80/10/10) belong to training.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte.calibration.text import longest_sequence
from halfbyte.errors import CalibrationError

HIDDEN_SHARE = 0.15
PROBE = "a"  # any text: what stands around its tokens is the frame


@dataclass(frozen=True, slots=True)
class Frame:
    """The special tokens before and after a text: `[CLS]` and `[SEP]` for BERT."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, ids: Int64[Tensor, "*rows text"]) -> Int64[Tensor, "*rows framed"]:
        """Each row with the special tokens around it."""
        before, after = (
            torch.tensor(end, dtype=ids.dtype).expand(*ids.shape[:-1], -1) for end in (self.before, self.after)
        )
        return torch.cat([before, ids, after], dim=-1)


@dataclass(frozen=True, slots=True)
class Masking:
    """How a text becomes what an encoder reads."""

    frame: Frame
    mask: int  # the token that stands for a hidden one
    special: tuple[int, ...]  # tokens that are never hidden, unknown words among them

    def hide(
        self, text: Int64[Tensor, "text"], dice: torch.Generator
    ) -> tuple[Int64[Tensor, "framed"], Int64[Tensor, "hidden"]]:
        """The framed text with some tokens hidden, and their places in it, ascending.

        How many are hidden depends on the length alone, which of them on `dice`. CalibrationError where the text has
        no ordinary token.
        """
        framed = self.frame.around(text)
        ordinary = ~torch.isin(framed, torch.tensor(self.special))
        if not ordinary.any():
            raise CalibrationError(
                f"a window of {len(text)} tokens holds nothing but special and unknown ones: give a text that the "
                "tokenizer has words for"
            )
        few = min(max(1, round(HIDDEN_SHARE * len(text))), int(ordinary.sum()))
        order = torch.rand(len(framed), generator=dice).masked_fill(~ordinary, -1)
        places = order.topk(few).indices.sort().values
        return framed.index_fill(0, places, self.mask), places


def fills_masks(model: Any) -> bool:
    """Whether a transformers model is an encoder that says what a mask hides, and not a decoder that writes on."""
    return type(model).__name__.endswith("ForMaskedLM")


def masking_of(tokenizer: Any) -> Masking:
    """How this tokenizer's encoder reads. CalibrationError where it has no mask token or frames texts unclearly."""
    if tokenizer.mask_token_id is None:
        raise CalibrationError(
            "the model fills masks and its tokenizer has no mask token: use the tokenizer in the model's own folder"
        )
    return Masking(frame_of(tokenizer), tokenizer.mask_token_id, tuple(sorted(tokenizer.all_special_ids)))


def frame_of(tokenizer: Any) -> Frame:
    """The special tokens that the tokenizer puts around a text when it is asked to."""
    framed, bare = (tuple(tokenizer(PROBE, add_special_tokens=special)["input_ids"]) for special in (True, False))
    for start in range(len(framed) - len(bare) + 1):
        end = start + len(bare)
        if bare and framed[start:end] == bare:
            return Frame(framed[:start], framed[end:])
    raise CalibrationError(
        f"the tokenizer spells {PROBE!r} {list(bare)} alone and {list(framed)} with special tokens, so what it puts "
        "around a text cannot be told: use the tokenizer in the model's own folder"
    )


def longest_window(config: Any, tokenizer: Any) -> int | None:
    """The tokens that an encoder reads at once: its positions, or fewer where its tokenizer says so. None: no limit.

    RoBERTa's configuration counts two positions that no token can take; its tokenizer does not.
    """
    limits = [longest_sequence(config), getattr(tokenizer, "model_max_length", None)]
    return min((int(limit) for limit in limits if limit is not None), default=None)


def check_window(window: int, config: Any, tokenizer: Any, remedy: str) -> None:
    """CalibrationError, ending in `remedy`, where an encoder cannot read so many tokens at once."""
    limit = longest_window(config, tokenizer)
    if limit is not None and window > limit:
        raise CalibrationError(
            f"sequences of {window} tokens are longer than the {limit} that this encoder reads at once: {remedy}"
        )
