"""The documents say what is so: examples load, links lead somewhere, tables hold the measured numbers."""

import importlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from halfbyte.cli import app
from halfbyte.errors import RecipeError
from halfbyte.kernels.w4a8 import tilings as w4a8_tilings
from halfbyte.numerics import ranges
from halfbyte.recipe import Recipe, shipped

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
DOCS = [page for page in PAGES if page.parent.name == "docs"]
COMMAND_LINE: Any = typer.main.get_command(app)

MODELS = {"": "ref-llama-22m", "outliers: ": "ref-llama-22m-outliers"}
QUALITY: dict[str, Callable[[dict[str, Any]], str]] = {
    "bits/weight": lambda row: f"{row['bits_per_weight']:.2f}",
    "perplexity": lambda row: f"{row['perplexity']:.2f}",
    "KL": lambda row: f"{row['kl_mean']:.4f}",
    "top-1": lambda row: f"{100 * row['top1_agreement']:.1f} %",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def every_block(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in DOCS
        for number, block in enumerate(blocks(page, language))
    ]


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Every table as rows of column name -> cell."""
    for found in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found.splitlines()]
        yield [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def measured(name: str) -> Any:
    return json.loads((ROOT / "docs" / "measurements" / name).read_text())


def wrong_quality_cells(text: str) -> list[str]:
    """Cells that are not the figures of quality.json, in tables with a column `perplexity`."""
    figures = {(row["model"], row["recipe"]): row for row in measured("quality.json")["rows"]}
    wrong = []
    for rows in tables(text):
        for row in rows if rows and "perplexity" in rows[0] else []:
            recipe = row["recipe"].strip("`")
            for column, cell in row.items():
                if column == "recipe":
                    continue
                prefix = "outliers: " if column.startswith("outliers: ") else ""
                right = QUALITY[column.removeprefix(prefix)](figures[MODELS[prefix], recipe])
                if cell != right:
                    wrong.append(f"{recipe}, {column}: {cell} instead of {right}")
    return wrong


def dead_links(page: Path, text: str) -> list[str]:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return [link for link in links if "://" not in link and not (page.parent / link).exists()]


def unknown_commands(text: str) -> list[str]:
    """`halfbyte` commands with words or options that the command line does not take."""
    wrong = []
    for line in text.splitlines():
        program, *words = shlex.split(line)
        if program != "halfbyte":
            continue
        command = COMMAND_LINE.commands.get(words[0])
        known = {name for param in command.params for name in param.opts} if command else set()
        if command is None or not {word for word in words if word.startswith("-")} <= known:
            wrong.append(line)
    return wrong


@pytest.mark.parametrize(("block", "suffix"), [
    *[pytest.param(*block.values, ".yaml", id=block.id) for block in every_block("yaml")],
    *[pytest.param(*block.values, ".toml", id=block.id) for block in every_block("toml")],
])  # fmt: skip
def test_the_recipes_in_the_documents_load(block, suffix, tmp_path):
    (tmp_path / f"recipe{suffix}").write_text(block)
    recipe = Recipe.load(tmp_path / f"recipe{suffix}")
    assert recipe.format_of("model.layers.1.self_attn.v_proj") is not None


@pytest.mark.parametrize("block", every_block("python"))
def test_the_python_in_the_documents_runs(block):
    exec(compile(block, "the document", "exec"), {})


def test_the_anatomy_shows_every_field_of_a_recipe():
    (anatomy,) = blocks(ROOT / "docs" / "recipes.md", "yaml")
    assert all(re.search(rf"^{field}:", anatomy, re.MULTILINE) for field in Recipe.model_fields)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_named_and_measured(name):
    assert f"`{name}`" in (ROOT / "docs" / "recipes.md").read_text()
    rows = {row["model"] for row in measured("quality.json")["rows"] if row["recipe"] == name}
    assert rows == set(MODELS.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    assert not dead_links(page, page.read_text())


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_command_is_one_that_the_program_takes(page):
    assert not [wrong for block in blocks(page, "console") for wrong in unknown_commands(block)]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_benchmark_that_is_named_is_there(page):
    named = re.findall(r"\bbenchmarks/\w+\.py", page.read_text())
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("page", ["rtn.md", "gptq.md", "awq.md", "evaluation.md"])
def test_the_tables_of_recipes_hold_the_measured_figures(page):
    text = (ROOT / "docs" / page).read_text()
    assert any(rows and "perplexity" in rows[0] for rows in tables(text))
    assert not wrong_quality_cells(text)


@pytest.mark.parametrize("page", ["rtn.md", "gptq.md", "awq.md", "evaluation.md"])
def test_figures_in_sentences_are_measured_ones(page):
    told = set(re.findall(r"(?<![\d.])(?:0\.\d{4}|\d\d\.\d\d)(?![\d.])", (ROOT / "docs" / page).read_text()))
    rows = measured("quality.json")["rows"]
    ours = {QUALITY[figure](row) for figure in ("perplexity", "KL", "bits/weight") for row in rows}
    beside = measured("llm_compressor.json")["rows"]
    theirs = {f"{found:.2f}" for row in beside for found in (row["perplexity"], *row.get("halfbyte", {}).values())}
    assert told <= ours | theirs


@pytest.mark.parametrize(("page", "files"), [
    ("omniquant.md", ["reconstruction.json", "quality.json"]),
    ("reconstruction.md", ["reconstruction.json", "kv_cache.json", "quality.json"]),
    ("quarot.md", ["w4a4kv4.json", "quality.json"]),
    ("wkvquant.md", ["kv_cache.json", "quality.json", "reconstruction.json"]),
])  # fmt: skip
def test_perplexities_and_second_copies_are_measured_ones(page, files):
    rows = [row for name in files for row in measured(name)["rows"]]
    figures = {
        f"{row[key]:.2f}" for row in rows for key in row if key.startswith("perplexity") and row[key] is not None
    }
    figures |= {f"{row['second_copy']:.3f}" for row in rows if row.get("second_copy") is not None}
    told = re.findall(r"(?<![\d.])(?:\d\d\.\d\d|[1-9]\.\d{3})(?!\.?\d)", (ROOT / "docs" / page).read_text())
    assert told
    assert set(told) <= figures


def test_the_table_of_heads_holds_the_measured_figures():
    rows = {(row["blocks"], row["head"], row["model"]): row for row in measured("head.json")["rows"]}
    page = (ROOT / "docs" / "head.md").read_text().partition("<!-- head: begin -->")[2]
    header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    models = [cell.removesuffix(": perplexity") for cell in header if cell.endswith(": perplexity")]
    found = {
        (blocks, head, model): (cells[2 * place], cells[2 * place + 1])
        for blocks, head, *cells in lines
        for place, model in enumerate(models)
    }
    assert found == {key: (f"{row['perplexity']:.3f}", f"{row['kl_mean']:.5f}") for key, row in rows.items()}


def test_the_range_searches_are_as_the_page_says():
    text = (ROOT / "docs" / "rtn.md").read_text()
    assert f"of {ranges.MSE_STEPS} ranges, from the whole one down towards {ranges.SMALLEST_SHRINK} of it" in text
    assert f"of {ranges.CLIP_STEPS} ranges down towards {ranges.SMALLEST_CLIP}" in text


def test_the_tables_of_4_bit_products_hold_the_measured_times_of_what_they_launch():
    (w4a16,) = [
        rows for rows in tables((ROOT / "docs" / "speed.md").read_text()) if {"out × in", "4096"} <= rows[0].keys()
    ]
    (w4a8,) = [rows for rows in tables((ROOT / "docs" / "w4a8.md").read_text()) if {"kind", "1024"} <= rows[0].keys()]
    columns = {"`fp8`": "fp8", "w4a16": "w4a16"} | {
        f"`{kind}`": f"{kind}_scales" for kind in ("float", "integer", "weight")
    }
    times = {(f"{row['outs']} × {row['ins']}", row["tokens"]): row for row in measured("w4a8_h200.json")["rows"]}
    for told in [*w4a8, *(row | {"kind": "w4a16"} for row in w4a16)]:
        for (shape, tokens), row in times.items():
            if shape == told["out × in"]:
                taken = row[columns[told["kind"]]]
                assert told[str(tokens)] == f"{taken:.1f} ({row['cublas'] / taken:.2f})"
    assert len(times) == 50
    assert len(w4a8) == 4 * len(w4a16) == 20
    for (_, tokens), row in times.items():
        for kind, tiling in row["tilings"].items():
            assert tiling == repr(w4a8_tilings.choose(kind, tokens, row["outs"], row["ins"], 128))


def test_the_plot_of_w4a8_is_drawn_from_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cliff = importlib.import_module("performance_cliff")
    assert cliff.drawn(measured("w4a8_h200.json")["rows"]) == (ROOT / "docs" / "w4a8.svg").read_text()


def test_the_table_of_whole_models_holds_the_measured_steps():
    (found,) = [rows for rows in tables((ROOT / "docs" / "bench.md").read_text()) if "batch" in rows[0]]
    columns = {
        "`rtn-w4a16`": "rtn-w4a16",
        "`integer-scale-w4a8`": "integer-scale-w4a8",
        "and `--kv-cache int4`": "integer-scale-w4a8:int4",
    }
    steps: dict[tuple[str, str, int], float] = {}
    for row in measured("end_to_end_h200.json")["rows"]:  # of two runs the first
        steps.setdefault((row["model"], row["recipe"], row["batch"]), 1e3 * row["step_seconds"])
    for row in found:
        model, batch = row["model"].lower(), int(row["batch"])
        bf16 = steps[model, "bf16", batch]
        assert row["bf16"] == f"{bf16:.2f}"
        for column, recipe in columns.items():
            if row[column] != "–":
                taken = steps[model, recipe, batch]
                assert row[column] == f"{taken:.2f} ({bf16 / taken:.2f})"
    assert len(found) == 6


def test_the_table_of_a_memory_budget_holds_what_was_measured():
    (found,) = [rows for rows in tables((ROOT / "docs" / "bench.md").read_text()) if "weights and cache" in rows[0]]
    runs = {(row["variant"], row["context"]): row for row in measured("cache_memory_h200.json")["rows"]}
    for row, variant in zip(found, ("bf16", "kv4", "w4a8kv4", "w4kv4-pre"), strict=True):
        for context in (2048, 32768):
            assert row[f"{context} tokens: sequences"] == str(runs[variant, context]["batch"])
            assert row[f"{context}: tokens/s"] == f"{runs[variant, context]['tokens_per_second']:.0f}"


def test_the_tables_of_experts_hold_the_measured_times():
    shapes = measured("experts_h200.json")["shapes"]
    told = [rows for rows in tables((ROOT / "docs" / "experts.md").read_text()) if "tokens" in rows[0]]
    kinds = ("float", "integer", "weight")
    for rows, peer, shape in zip(told, ("loop", "grouped"), ("mixtral-8x7b", "qwen3-30b-a3b"), strict=True):
        expected = []
        for row in shapes[shape]["rows"]:
            best = min(row[f"{kind}_scales"] for kind in kinds)
            assert row[peer] == min(row[other] for other in ("loop", "grouped", "transformers", "transformers_eager"))
            cells = {"tokens": str(row["tokens"]), "bf16": f"{row[peer]:.1f}", "W4A16": f"{row['w4a16']:.1f}"}
            cells |= {f"`{kind}`": f"{row[f'{kind}_scales']:.1f}" for kind in kinds}
            cells |= {"bf16 / best": f"{row[peer] / best:.2f}", "W4A16 / best": f"{row['w4a16'] / best:.2f}"}
            expected.append(cells | {"bound": f"{row['bound']:.1f}"})
        assert rows == expected


def test_the_tables_of_runs_hold_the_measured_times():
    text = (ROOT / "docs" / "speed.md").read_text()
    (phases,) = [{row.pop("seconds"): row for row in rows} for rows in tables(text) if "`gptq-w4a16`" in rows[0]]
    for run in measured("llama2_7b_h200.json"):
        told = {name: float(row[f"`{run['recipe']}`"]) for name, row in phases.items()}
        assert told["**whole run**"] == run["seconds"]
        assert told["peak memory on the GPU, GB"] == run["peak_device_gb"]
        assert told["peak memory on the host, GB"] == run["peak_host_gb"]
        assert all(told.get(phase, 0.0) == seconds for phase, seconds in run["phases"].items())
    (beside,) = [{row["run"]: float(row["seconds"]) for row in rows} for rows in tables(text) if "run" in rows[0]]
    rows = {row["name"]: row["seconds"] for row in measured("one_block_h200.json")["rows"] if row["name"] != "warm-up"}
    assert beside == rows


@pytest.mark.parametrize(
    "page", [*DOCS, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_a_page_is_short(page):
    assert len(page.read_text().splitlines()) <= 100


def test_the_gates_notice_a_wrong_number_link_command_and_recipe():
    right = (ROOT / "docs" / "gptq.md").read_text()
    assert wrong_quality_cells(right.replace("0.0484", "0.0384"))
    assert dead_links(ROOT / "docs" / "x.md", "see [this](nowhere.md) and [that](../README.md)") == ["nowhere.md"]
    assert len(unknown_commands("halfbyte quantise x\nhalfbyte quantize x -r y --sample 1\nhalfbyte recipes")) == 2
    with pytest.raises(RecipeError):
        Recipe.load({"steps": [{"method": "gptq", "range": "mse"}]})
