"""What a model is asked: the next token of a window, or what stands behind its masks."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte.calibration.encoders import Frame, Masking


@dataclass(frozen=True, slots=True)
class Question:
    """A window as the model reads it, where its predictions count, and what would be right there."""

    shown: Int64[Tensor, "window"]
    places: slice | Int64[Tensor, "predicted"]
    answers: Int64[Tensor, "predicted"]


def next_token_questions(texts: Int64[Tensor, "windows text"], frame: Frame) -> list[Question]:
    """Each text after its frame: of every token but the first."""
    return [Question(window, slice(0, -1), window[1:]) for window in frame.around(texts)]


def masked_questions(texts: Int64[Tensor, "windows text"], masking: Masking, seed: int) -> list[Question]:
    """Each text in its frame: of the tokens that the seed hides. The first are hidden alike, however many follow."""
    dice = torch.Generator().manual_seed(seed)
    found = []
    for text in texts:
        shown, places = masking.hide(text, dice)
        found.append(Question(shown, places, masking.frame.around(text)[places]))
    return found
