"""Whether a model finds one number again that a long text hides: retrieval, which a blurred cache loses first.

Mohtashami and Jaggi, 2023, Landmark Attention — https://arxiv.org/abs/2305.16300, passkey retrieval

    task │ filler, over and over │ "The pass key is 52710." │ filler │ question        answered by greedy decoding
                 depth · filler of the text                                           through the cache

For models that follow such a text at all, which small ones do not: those have evaluation/long_context.py.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from halfbyte.calibration.encoders import fills_masks
from halfbyte.calibration.text import longest_sequence
from halfbyte.errors import CalibrationError, ModelError
from halfbyte.runtime.cache_decode import generating
from halfbyte.runtime.cache_plan import chosen_plan
from halfbyte.runtime.load import Pair
from halfbyte.scheme import CacheFormat

TASK = "A pass key is hidden somewhere in the text below. Find it and keep it in mind: you will be asked for it."
FILLER = " The road goes on past wide green fields. A cart comes by, and after a while another one."
HIDDEN = " The pass key is {key}. Keep it in mind: {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"
DIGITS = 5
SHORTEST, LIMIT = 256, 32768  # tokens, by default; LIMIT for a model that states none
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Passkey:
    """What was found."""

    shares: dict[int, dict[float, float]]  # of the keys that were found again, by tokens of the text and by depth
    keys: int  # asked for at each length and depth
    kv_cache: str | None

    @property
    def mean(self) -> float:
        """The share over all lengths and depths."""
        return sum(sum(row.values()) / len(row) for row in self.shares.values()) / len(self.shares)

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as plain values."""
        return asdict(self) | {"mean": self.mean}


@torch.no_grad()
def passkey(
    model: Pair,
    *,
    kv_cache: str | CacheFormat | None = None,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    keys: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Passkey:
    """The share of hidden numbers that the model names, in texts of so many tokens, at each depth.

    `lengths`: answers included, by default doubling up to the model's limit; `depths`: 0 is right after the task, 1 right
    before the question. `kv_cache`: as in `generate`. `progress` is told (texts read, in all). CalibrationError where a
    length leaves the model's positions or holds no filler; ModelError for encoders.
    """
    network, tokenizer = model
    if fills_masks(network):
        raise ModelError(f"{type(network).__name__} fills masks: it cannot be asked")
    limit = longest_sequence(network.config) or LIMIT
    chosen = tuple(lengths or doubling(limit))
    if not chosen or max(chosen) > limit:
        raise CalibrationError(
            f"texts of {list(chosen)} tokens do not fit the model's {limit} positions: choose shorter ones"
        )
    draw, plan, done = random.Random(seed), chosen_plan(network, kv_cache), 0
    shares: dict[int, dict[float, float]] = {}
    with generating(network, plan):
        for length in chosen:
            found = dict.fromkeys(depths, 0)
            for depth in depths:
                for _ in range(keys):
                    key = "".join(draw.choices("123456789", k=DIGITS))
                    found[depth] += answer(model, prompt(tokenizer, key, length, depth)).startswith(key)
                    done += 1
                    if progress is not None:
                        progress(done, len(chosen) * len(depths) * keys)
            shares[length] = {depth: count / keys for depth, count in found.items()}
    return Passkey(shares, keys, None if plan is None else str(plan.format))


def doubling(limit: int) -> list[int]:
    """Lengths from the shortest on, doubling, and the limit."""
    lengths = [SHORTEST]
    while lengths[-1] * 2 < limit:
        lengths.append(lengths[-1] * 2)
    return [length for length in lengths if length < limit] + [limit]


def prompt(tokenizer: Any, key: str, length: int, depth: float) -> str:
    """The longest text that fits `length` tokens with its answer, the key at a depth between 0 and 1.

    CalibrationError where no filler fits.
    """
    ends = TASK + HIDDEN.format(key=key) + QUESTION
    room = length - tokens(tokenizer, ends) - tokens(tokenizer, " " + key)
    fillers = room // max(tokens(tokenizer, FILLER * 9) - tokens(tokenizer, FILLER * 8), 1)
    while fillers > 0:
        before = round(depth * fillers)
        text = TASK + FILLER * before + HIDDEN.format(key=key) + FILLER * (fillers - before) + QUESTION
        if tokens(tokenizer, text) + tokens(tokenizer, " " + key) <= length:
            return text
        fillers -= 1
    raise CalibrationError(f"a text of {length} tokens has no room to hide a pass key in: choose a longer one")


def tokens(tokenizer: Any, text: str) -> int:
    """How many there are, with those that the tokenizer adds."""
    return len(tokenizer(text)["input_ids"])


def answer(model: Pair, text: str) -> str:
    """What the model writes next, as many tokens as a key takes."""
    network, tokenizer = model
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(network.device)
    count = max(tokens(tokenizer, " " + "9" * DIGITS), 1)
    ending = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    written = network.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=ending)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
