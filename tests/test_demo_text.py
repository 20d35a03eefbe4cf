"""The demo's two texts share nothing that a model could have learnt by heart."""

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.demo_text import HELD_OUT, MINIMUM_CHARACTERS, documentation_split, split_topics, telling
from halfbyte.errors import CalibrationError

QUOTED = "A paragraph of documentation that is long enough to betray where it was taken from, word for word."
OWN = "Another paragraph, said nowhere else in these topics, and with as many words as the one that is quoted."


def runs_of_words(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return {tuple(words[first : first + length]) for first in range(len(words) - length + 1)}


def test_the_two_parts_share_no_telling_paragraph() -> None:
    training, held_out = documentation_split()
    assert not telling(training) & telling(held_out)


def test_fewer_than_one_in_a_thousand_runs_of_twelve_words_of_the_held_out_text_are_in_the_training_text() -> None:
    training, held_out = (runs_of_words(text, 12) for text in documentation_split())
    assert len(training & held_out) < 0.001 * len(held_out)


def test_a_split_of_names_that_ignores_families_leaks() -> None:
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = set().union(*(runs_of_words(topics[name], 12) for name in names[::3]))
    training = set().union(*(runs_of_words(topics[name], 12) for name in names if name not in names[::3]))
    assert len(training & held_out) > 0.1 * len(held_out)


def test_both_parts_are_long_enough_to_calibrate_and_to_judge_on() -> None:
    training, held_out = documentation_split()
    assert len(held_out) >= MINIMUM_CHARACTERS >= 80_000
    assert len(training) >= 2 * len(held_out)


def test_the_split_is_the_same_every_time_and_in_any_order_of_the_topics() -> None:
    from pydoc_data.topics import topics

    assert documentation_split() == documentation_split() == split_topics(dict(reversed(topics.items())))


def test_this_python_has_every_held_out_topic() -> None:
    from pydoc_data.topics import topics

    assert set(topics) >= HELD_OUT


def test_no_two_topics_of_a_part_share_a_telling_paragraph() -> None:
    for text in documentation_split():
        topics = [telling(topic) for topic in text.split("\n\n\n")]
        assert sum(map(len, topics)) == len(telling(text)) > 100


def test_what_the_held_out_text_has_is_dropped_from_the_training_text_whatever_its_layout() -> None:
    wrapped = QUOTED.replace(" ", "\n   ")
    training, held_out = split_topics({"if": f"{OWN}\n\n{wrapped}\n", "lambda": QUOTED})
    assert QUOTED in held_out
    assert training.strip() == OWN


def test_a_topic_that_a_longer_one_of_its_part_holds_whole_is_left_out_with_its_heading() -> None:
    whole = f"{OWN}\n\nDynamic\n=======\n\n{QUOTED}"
    _, held_out = split_topics({"dynamic-features": f"Dynamic\n*******\n\n{QUOTED}", "execmodel": whole})
    assert held_out == whole + "\n"


def test_topics_that_quote_each_other_are_on_one_side() -> None:
    from pydoc_data.topics import topics

    quoted = {name: telling(text) for name, text in topics.items()}
    for name, words in quoted.items():
        for other, others in quoted.items():
            if len(words & others) > len(words) / 2:
                assert (name in HELD_OUT) == (other in HELD_OUT), (name, other)


def test_code_keeps_its_indentation() -> None:
    training, _ = split_topics({"for": f"{OWN}\n\n   for x in y:\n       print(x)\n"})
    assert "\n\n   for x in y:\n       print(x)\n" in training


paragraphs = st.lists(st.sampled_from([QUOTED, OWN, "short", QUOTED.upper(), f"  {OWN}"]), min_size=1).map("\n\n".join)


@given(st.dictionaries(st.sampled_from(["if", "for", "new topic", *sorted(HELD_OUT)]), paragraphs))
def test_no_topics_whatever_leak(topics: dict[str, str]) -> None:
    training, held_out = split_topics(topics)
    assert not telling(training) & telling(held_out)
    kept = telling(training) | telling(held_out)
    assert kept == frozenset().union(*(telling(text) for text in topics.values()))


def test_a_python_without_topics_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CalibrationError, match="whole standard library"):
        documentation_split()


def test_too_few_topics_are_refused_with_their_number_and_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data import topics

    monkeypatch.setattr(topics, "topics", {"lambda": OWN, "if": QUOTED})
    with pytest.raises(CalibrationError, match=rf"{len(OWN) + 1} characters.*{MINIMUM_CHARACTERS}"):
        documentation_split()
