"""The demo's text: the language reference that every CPython carries (`help("for")` prints it), split for a fair test.

The model of the demo learnt the training topics of one CPython version and is judged on the held-out topics of
whatever version runs the demo. So the split is by topic name, and a name never changes sides. Two things would still
leak, and both are handled here:

- Topics quote each other: `compound` holds `for`, `if` and `try` word for word. Such families stay on one side, and a
  topic that a longer one of its side repeats is left out.
- Single paragraphs occur in unrelated topics: one that the held-out text has is dropped from the training text.
"""

import re
from collections.abc import Mapping

from halfbyte.errors import CalibrationError

# Every third family of the sorted topics. Frozen, because a topic added by a later CPython would shift such a count.
# fmt: off
HELD_OUT = frozenset({
    "assignment", "augassign", "atom-literals", "await", "bltin-code-objects", "bltin-type-objects", "calls",
    "debugger", "dynamic-features", "exceptions", "execmodel", "naming", "formatstrings", "imaginary", "lambda",
    "numbers", "pass", "shifting", "string-methods", "truth", "typesmethods", "unary",
})
# fmt: on
MINIMUM_CHARACTERS = 80_000
_TELLING = 60


def documentation_split() -> tuple[str, str]:
    """The running Python's documentation topics as (training text, held-out text).

    Raises CalibrationError where the distribution has stripped them or keeps too few of the held-out ones.
    """
    try:
        # Not at the top: 0.5 MB that only the demo reads, and a stripped Python must still run everything else.
        from pydoc_data.topics import topics
    except ModuleNotFoundError as missing:
        raise CalibrationError(
            "this Python has no pydoc_data.topics, the text of the demo: use one with the whole standard library"
        ) from missing
    training, held_out = split_topics(topics)
    if len(held_out) < MINIMUM_CHARACTERS:
        raise CalibrationError(
            f"this Python's held-out documentation topics have {len(held_out)} characters and the demo needs "
            f"{MINIMUM_CHARACTERS}: use a CPython whose `help('topics')` is complete"
        )
    return training, held_out


def split_topics(topics: Mapping[str, str]) -> tuple[str, str]:
    """(training text, held-out text) of `topics`, {name: text}: no telling paragraph is in both, or in two topics."""
    held_out = _joined({name: text for name, text in topics.items() if name in HELD_OUT}, frozenset())
    training = _joined({name: text for name, text in topics.items() if name not in HELD_OUT}, telling(held_out))
    return training, held_out


def telling(text: str) -> frozenset[str]:
    """The words of each paragraph of `text` that is long enough to give its source away; no layout, no punctuation."""
    words = (" ".join(re.findall(r"\w+", paragraph)) for paragraph in _paragraphs(text))
    return frozenset(line for line in words if len(line) >= _TELLING)


def _joined(topics: Mapping[str, str], known: frozenset[str]) -> str:
    """The topics by name, without the telling paragraphs that are in `known` or that a longer topic has already."""
    kept: dict[str, list[str]] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        new = telling(topics[name]) - known
        if new:  # else a longer topic holds this one whole: its short lines go with it
            kept[name] = [part for part in _paragraphs(topics[name]) if not telling(part) & known]
            known |= new
    return "\n\n\n".join("\n\n".join(kept[name]) for name in sorted(kept)) + "\n"


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]
