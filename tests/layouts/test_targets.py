"""Patterns stand for exactly the paths they were made from."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.layouts.targets import patterns

BLOCKS = [f"model.layers.{block}.mlp.{name}" for block in range(12) for name in ("gate_proj", "up_proj", "down_proj")]
EXPERTS = [f"model.layers.{block}.mlp.experts.{expert}.up_proj" for block in range(3) for expert in range(4)]
OTHERS = ["lm_head", "score", "model.layers.0.mlp.gate", "vision.layers.1.mlp.up_proj", "blocks.0", "3.up_proj"]
ALL = BLOCKS + EXPERTS + OTHERS


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(ALL)))
def test_they_match_what_is_wanted_and_nothing_else(wanted):
    expressions, single = patterns(sorted(wanted), [path for path in ALL if path not in wanted])
    assert {path for path in ALL if path in single or any(re.match(e, path) for e in expressions)} == wanted


def test_a_whole_family_is_one_pattern():
    assert patterns(EXPERTS, BLOCKS) == ([r"(?:.*\.)?layers\.\d+\.mlp\.experts\.\d+\.up_proj$"], [])


def test_some_blocks_are_named_by_number():
    chosen = [path for path in BLOCKS if path.endswith("up_proj") and ".1" in path]
    assert patterns(chosen, set(BLOCKS) - set(chosen)) == ([r"(?:.*\.)?layers\.(?:1|10|11)\.mlp\.up_proj$"], [])


def test_part_of_a_block_is_named_in_full():
    assert patterns(EXPERTS[:2], EXPERTS[2:4]) == ([], EXPERTS[:2])


def test_a_client_may_rename_what_stands_before_the_blocks():
    (expression,), _ = patterns(BLOCKS, [])[0][:1], None
    assert re.match(expression, "model.language_model.layers.7.mlp.gate_proj")
