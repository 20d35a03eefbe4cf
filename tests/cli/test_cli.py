import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from halfbyte.cli import app
from halfbyte.cli.terminal import TimeLeft
from halfbyte.layouts import inspect as inspection
from tiny_models import tiny
from tiny_tokenizer import prose, tiny_tokenizer

COMMANDS = ("quantize", "evaluate", "generate", "inspect", "export", "recipes", "demo")
RECIPE = """
name: tiny
scheme: {weights: {bits: 4, granularity: {kind: group, size: 16}}}
steps: [{method: rtn}]
"""


def run(*words, wide=True):
    return CliRunner().invoke(
        app, [str(word) for word in words], env={"COLUMNS": "200" if wide else "80", "NO_COLOR": "1"}
    )


def one_line(result):
    """The single line of stderr, without colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", result.stderr).strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(prose(400))
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def quantized(model):
    output = model.parent / "quantized"
    result = run("quantize", model, "-r", model / "tiny.yaml", "-o", output, "--json", model.parent / "report.json")
    assert result.exit_code == 0, result.output
    return output, result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert [line for line in result.output.splitlines() if line.strip().startswith(f"halfbyte {command}")]


def test_the_help_lists_every_command_and_fits_a_narrow_terminal():
    result = run("--help", wide=False)
    assert all(command in result.output for command in COMMANDS)
    assert max(map(len, result.output.splitlines())) <= 80


def test_the_help_does_not_wait_for_pytorch():
    code = "import sys, halfbyte.cli; print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_version_is_the_packages():
    result = run("--version")
    assert re.fullmatch(r"halfbyte \d+\.\d+\S*\n", result.output)


def test_a_bare_command_shows_the_help():
    assert "Commands" in run().output


def test_an_unknown_recipe_is_one_line_with_a_suggestion(model):
    result = run("quantize", model, "--recipe", "gtpq-w4a16", "--output", model / "x")
    assert result.exit_code == 1
    assert "did you mean 'gptq-w4a16'?" in one_line(result)


def test_a_missing_model_is_one_line(tmp_path):
    result = run("quantize", tmp_path / "nowhere", "--recipe", "rtn-w4a16", "--output", tmp_path / "x")
    assert result.exit_code == 1
    assert "is not a folder" in one_line(result)


@pytest.mark.parametrize(
    "words",
    [
        ["quantise"],
        ["quantize", "MODEL"],
        ["quantize", "MODEL", "--recipe", "rtn-w4a16"],
        ["quantize", "MODEL", "--recipe", "rtn-w4a16", "--output", "x", "--samples", "0"],
        ["quantize", "MODEL", "--recipe", "rtn-w4a16", "--output", "x", "--device", "tpu"],
        ["evaluate", "MODEL"],
        ["export", "MODEL", "--format", "gguf", "--output", "x"],
        ["generate", "MODEL"],
    ],
    ids=" ".join,
)
def test_a_misspelt_command_line_exits_with_2(words, model):
    result = run(*(model if word == "MODEL" else word for word in words))
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_dry_run_writes_nothing_and_says_everything(model, tmp_path):
    file = tmp_path / "plan.json"
    result = run("quantize", model, "-r", model / "tiny.yaml", "-o", tmp_path / "out", "--dry-run", "--json", file)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    plan = json.loads(file.read_text())
    assert len(plan["modules"]) == 14
    assert plan["modules"][0]["path"] == "model.layers.0.self_attn.q_proj"
    assert plan["modules"][0]["format"] == "int4 sym g16"
    assert plan["modules"][0]["format_fields"]["bits"] == 4
    assert plan["bytes_after"] < plan["bytes_before"]
    assert plan["peak_host"] > 0
    assert plan["seconds"] >= 0
    for told in ("model.layers.0-1.self_attn.q_proj", "on disk", "memory", "time", "nothing was written"):
        assert told in result.output


def test_a_dash_sends_json_to_stdout_and_the_table_beside_it(model):
    result = run("quantize", model, "-r", model / "tiny.yaml", "--dry-run", "--json", "-")
    assert json.loads(result.stdout)["layout"] == "compressed-tensors"
    assert "on disk" in result.stderr


def test_a_json_file_that_cannot_be_written_is_one_line(model, tmp_path):
    file = tmp_path / "no" / "such" / "folder.json"
    result = run("quantize", model, "-r", model / "tiny.yaml", "--dry-run", "--json", file)
    assert result.exit_code == 1
    assert "cannot be written" in one_line(result)


def test_quantizing_ends_with_the_table_and_the_reports(quantized):
    folder, told = quantized
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert path in told
    assert "int4 sym g16" in told
    assert "block 2 of 2" in told
    assert str(folder / "report.html") in told
    assert {"report.html", "report.json", "README.md", "recipe.yaml", "config.json"} <= {
        f.name for f in folder.iterdir()
    }
    report = json.loads((folder.parent / "report.json").read_text())
    assert report == json.loads((folder / "report.json").read_text())
    assert report["provenance"]["versions"]["halfbyte"]
    assert 4 < report["bits_per_weight"] < 9  # tiny groups carry much scale


def test_an_interrupted_run_says_how_to_go_on(model, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("halfbyte.pipeline.quantize", interrupted)
    result = run("quantize", model, "-r", model / "tiny.yaml", "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert "--resume" in one_line(result)


def test_evaluating_gives_the_promised_keys(model, quantized):
    result = run(
        "evaluate", quantized[0], "--against", model, "--text", model / "text.txt", "--window", 32,
        "--limit-windows", 2, "--device", "cpu", "--dtype", "float32", "--no-bos", "--json", "-",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {"perplexity", "tokens", "window", "kl_mean", "kl_p99", "top1_agreement"} <= found.keys()
    assert (found["tokens"], found["window"], found["bos"]) == (64, 32, False)
    assert found["kl_mean"] > 0
    assert "perplexity" in result.stderr


def test_generating_continues_the_prompt(model):
    result = run("generate", model, "--prompt", "the rain", "--max-new-tokens", 3, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout).keys() == {"prompt", "text"}
    plain = run("generate", model, "--prompt", "the rain", "--max-new-tokens", 3, "--device", "cpu")
    assert plain.stdout.startswith("the rain")


def test_a_recipe_quantizes_while_loading(model, quantized):
    options = ["--text", model / "text.txt", "--window", 32, "--limit-windows", 2, "--device", "cpu", "--json", "-"]
    found, written = (
        json.loads(run("evaluate", *words, *options).stdout)
        for words in ((model, "-r", model / "tiny.yaml"), (quantized[0],))
    )
    assert (found["recipe"], written["recipe"]) == ("tiny", None)
    assert found["perplexity"] == written["perplexity"]
    prompt = ["--prompt", "the rain", "--max-new-tokens", 3, "--device", "cpu"]
    texts = [run("generate", *words, *prompt).stdout for words in ((model, "-r", model / "tiny.yaml"), (quantized[0],))]
    assert texts[0] == texts[1] != ""
    refused = run("generate", model, "-r", "gptq-w4a16", *prompt)
    assert refused.exit_code == 1
    assert "needs calibration text" in one_line(refused)


def test_inspecting_says_what_is_there_and_fails_on_damage(quantized, tmp_path):
    whole = run("inspect", quantized[0])
    assert whole.exit_code == 0, whole.output
    assert "int4 sym g16" in whole.output
    assert "intact" in whole.output
    fields = json.loads(run("inspect", quantized[0], "--json").output)
    assert fields["layout"] == "compressed-tensors"
    assert sum(fields["kernels"].values()) == len(fields["modules"]) == 14
    shard = next(quantized[0].glob("*.safetensors"))
    for file in quantized[0].iterdir():
        damaged = file.read_bytes()
        (tmp_path / file.name).write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]) if file == shard else damaged)
    broken = run("inspect", tmp_path)
    assert broken.exit_code == 1
    assert f"problem: {shard.name}" in broken.stdout
    assert "intact" not in broken.stdout


def test_recipes_are_listed_and_one_is_shown_so_that_it_can_be_used():
    listed = run("recipes")
    assert "gptq-w4a16" in listed.output
    assert "rtn-w8a16" in [recipe["name"] for recipe in json.loads(run("recipes", "--json").output)]
    shown = run("recipes", "gptq-w4a16")
    assert shown.output.startswith("name: gptq-w4a16\n")
    assert json.loads(run("recipes", "gptq-w4a16", "--json").output)["scheme"]["weights"]["bits"] == 4
    assert run("recipes", "gptq").exit_code == 1


def test_exporting_refuses_in_one_line_what_cannot_be_said(model, tmp_path):
    result = run("export", model, "--format", "gptq", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "is not quantized" in one_line(result)


def test_a_mistake_of_ours_keeps_its_traceback(model, monkeypatch):
    def broken(folder):
        raise ZeroDivisionError

    monkeypatch.setattr(inspection, "inspect", broken)
    assert isinstance(run("inspect", model).exception, ZeroDivisionError)


def test_the_time_left_is_at_the_mean_speed(monkeypatch):
    now = iter([100.0, 130.0, 130.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    left = TimeLeft()
    assert left(2, 8) == ""  # two were finished before this run
    assert left(5, 8) == ", 30 s left"
    assert left(8, 8) == ""
