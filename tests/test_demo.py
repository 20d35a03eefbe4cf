import json
import math

import pytest

from halfbyte.demonstration import demo
from halfbyte.errors import OutputError
from halfbyte.recipe import Recipe
from tiny_models import tiny
from tiny_tokenizer import tiny_tokenizer

RECIPES = [
    Recipe.load({"name": name, "scheme": {"weights": format}, "steps": [{"method": method}]})
    for name, method, format in [
        ("coarse", "rtn", {"bits": 3, "granularity": {"kind": "channel"}}),
        ("fine", "gptq", {"bits": 8, "granularity": {"kind": "group", "size": 16}}),
    ]
]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    model = tiny("llama")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    steps = []
    result = demo(
        folder / "out", recipes=RECIPES, model=folder / "model", samples=8, windows=2, window=32, device="cpu",
        progress=lambda done, total, what: steps.append((done, total)),
    )  # fmt: skip
    return result, steps


def test_the_demo_compares_every_recipe_with_the_original(shown):
    result, _ = shown
    assert [row.recipe for row in result.rows] == ["original", "coarse", "fine"]
    original, coarse, fine = result.rows
    assert original.kl_mean is None
    assert math.isfinite(original.perplexity)
    assert original.bits_per_weight == 32  # the tiny model is float32
    assert coarse.bits_per_weight < fine.bits_per_weight < 32
    assert coarse.bytes < fine.bytes < original.bytes
    assert coarse.kl_mean > fine.kl_mean > 0
    assert coarse.top1_agreement <= fine.top1_agreement <= 1


def test_the_demo_leaves_its_models_and_reports(shown):
    result, _ = shown
    assert json.loads((result.folder / "demo.json").read_text()) == json.loads(json.dumps(result.to_json()))
    page = (result.folder / "report.html").read_text()
    for recipe in ("coarse", "fine"):
        assert f'href="{recipe}/report.html"' in page
        assert (result.folder / recipe / "report.html").is_file()
    assert "2 windows of 32 tokens" in page


def test_the_demo_reports_its_steps_in_order(shown):
    _, steps = shown
    assert steps == [(done, 5) for done in range(6)]


def test_a_second_demo_replaces_the_first_and_nothing_else(shown, tmp_path):
    result, _ = shown
    again = demo(
        result.folder, recipes=RECIPES[:1], model=result.folder.parent / "model", samples=8, windows=2, window=32
    )
    assert len(again.rows) == 2
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no earlier demo"):
        demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
