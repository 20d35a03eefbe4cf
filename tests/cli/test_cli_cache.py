"""The cache on the command line: measured through it, generated through it, refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from halfbyte.cli import app
from tiny_models import tiny
from tiny_tokenizer import prose, tiny_tokenizer


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cached-cli") / "tiny-llama"
    tiny("llama", max_position_embeddings=256).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(prose(600))
    return folder


def test_evaluate_measures_through_the_cache(model, tmp_path):
    options = ("--text", model / "text.txt", "--window", 24, "--limit-windows", 2, "--device", "cpu")
    through = run(
        "evaluate",
        model,
        *options,
        "--kv-cache",
        "int4",
        "--long-context",
        "--passkey",
        "--json",
        tmp_path / "int4.json",
    )
    assert through.exit_code == 0, through.output
    assert "cache k4 v4 asym g128" in through.output
    assert "worst head" in through.output
    measured = json.loads((tmp_path / "int4.json").read_text())
    assert measured["kv_cache"] == "k4 v4 asym g128"
    assert list(measured["long_context"]["losses"]) == ["64", "128", "192"]
    assert measured["long_context"]["worst_head"] > 0
    assert "pass keys found again" in through.output
    assert measured["passkey"]["shares"]["256"] == dict.fromkeys(["0.0", "0.25", "0.5", "0.75", "1.0"], 0.0)


def test_generate_keeps_its_past_in_the_cache(model):
    result = run(
        "generate", model, "--prompt", "the", "--kv-cache", "k8v4-s1-w2", "--max-new-tokens", 4, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output


def test_a_format_that_is_none_is_refused_with_what_there_is(model):
    result = run("generate", model, "--prompt", "the", "--kv-cache", "fp4", "--device", "cpu")
    assert result.exit_code == 1
    assert "write int2 .. int8" in result.stderr
