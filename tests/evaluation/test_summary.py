from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from halfbyte.evaluation.chart import HEIGHT, WIDTH, chart, scale
from halfbyte.evaluation.summary import Spread, grouped, kind, short, span, spread
from halfbyte.evaluation.units import decibels, duration, percent, size
from sample_report import sample_report


@dataclass(frozen=True)
class Module:
    path: str
    format: str = "int4"


def numbers_of(text):
    """The inverse of span."""
    ends = [run.split("-") for run in text.split(",")]
    return [number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)]


@given(st.sets(st.integers(0, 200), min_size=1))
def test_a_span_can_be_read_back(numbers):
    assert numbers_of(span(numbers)) == sorted(numbers)


def test_modules_that_differ_in_numbers_are_one_group():
    modules = [Module(f"model.layers.{block}.mlp.experts.{expert}.w1") for block in (0, 1, 2, 5) for expert in (0, 1)]
    groups = grouped([*modules, Module("model.layers.0.q")], lambda module: module.format)
    assert [(group.name, len(group.members)) for group in groups] == [
        ("model.layers.0-2,5.mlp.experts.0-1.w1", 8),
        ("model.layers.0.q", 1),
    ]


def test_modules_that_came_out_differently_are_two_groups():
    modules = [Module(f"layers.{block}.q", "int8" if block == 1 else "int4") for block in range(4)]
    assert [group.name for group in grouped(modules, lambda module: module.format)] == ["layers.0,2-3.q", "layers.1.q"]


def test_no_module_is_lost_by_grouping():
    modules = sample_report().modules
    groups = grouped(modules, lambda module: module.format)
    assert sorted(member.path for group in groups for member in group.members) == sorted(m.path for m in modules)


def test_short_names_begin_behind_the_block():
    assert kind("model.layers.3.mlp.experts.17.w1") == "model.layers.*.mlp.experts.*.w1"
    assert short("model.layers.*.mlp.experts.*.w1") == "mlp.experts.*.w1"
    assert short("model.layers.0-3,7.q_proj") == "q_proj"
    assert short("lm_head") == "lm_head"


def test_a_spread_is_of_what_was_measured():
    assert spread([30.0, None, 10.0, 20.0]) == Spread(worst=10.0, median=20.0)
    assert spread([None, None]) is None


@given(st.floats(-50, 150, allow_subnormal=False), st.floats(0, 200))
def test_an_axis_holds_its_values_with_few_ticks(lowest, height):
    highest = lowest + height
    low, high, step = scale(lowest, highest)
    assert low <= lowest
    assert highest <= high
    assert low < high
    assert len(range(low, high + 1, step)) <= 5


def test_every_point_lies_in_its_panel_and_worse_is_lower():
    made = chart(sample_report().modules)
    assert made is not None
    for panel in made.panels:
        assert all(0 <= point.x <= WIDTH and 0 <= point.y <= HEIGHT for point in panel.points)
        ordered = sorted(panel.points, key=lambda point: point.decibels)
        assert [point.y for point in ordered] == sorted((point.y for point in ordered), reverse=True)
    experts = made.panels[1]
    assert [point.path for point in experts.points] == [
        f"model.layers.{block}.mlp.experts.0.up_proj" for block in (0, 1)
    ]
    assert experts.weakest == experts.points[0]


def test_numbers_are_said_as_people_read_them():
    assert [size(count) for count in (0, 999, 1000, 44_583_944, 2.9e9, 4e12)] == [
        "0 B", "999 B", "1 kB", "44.6 MB", "2.9 GB", "4 TB",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0.25, 42, 119, 7260)] == ["0.25 s", "42 s", "2 min", "2 h 1 min"]
    assert [decibels(value) for value in (31.44, float("inf"), float("-inf"), None)] == ["31.4", "∞", "-∞", "–"]
    assert [percent(value) for value in (20.0, 40.0, float("inf"), None)] == ["10 %", "1 %", "0 %", "–"]
