"""An encoder on the whole journey: quantized, saved, read again, and computing what calibration computed."""

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from closeness import relative_error
from halfbyte.calibration.walk import quantizing_inputs
from halfbyte.checkpoint import restore_block
from halfbyte.evaluation.perplexity import evaluate
from halfbyte.pipeline import quantize
from halfbyte.recipe import Recipe
from halfbyte.run import Run
from halfbyte.runtime.load import load
from tiny_encoder import encoder_tokenizer, save_encoder
from tiny_models import tiny, tokens

EIGHT: dict[str, Any] = {"bits": 8, "convention": "odyssey", "granularity": {"kind": "channel"}}
FOUR: dict[str, Any] = {"bits": 4, "convention": "gptq", "granularity": {"kind": "group", "size": 8}}
FEED_FORWARD = ("*.intermediate.dense", "*[0-9].output.dense")
CLOSE = 5e-4  # a sum in another order may move an input across a border between two codes
LKD: dict[str, Any] = {"method": "lkd", "steps": 8, "tokens_per_step": 128}


def recipe(
    *steps: dict[str, Any], weights: dict[str, Any] = EIGHT, feed_forward: dict[str, Any] | None = None
) -> Recipe:
    overrides = {} if feed_forward is None else dict.fromkeys(FEED_FORWARD, feed_forward)
    scheme = {"weights": weights, "activations": {}}
    return Recipe.load({"scheme": scheme, "steps": list(steps), "overrides": overrides, "minimum_tokens": 1})


W8A8 = recipe({"method": "rtn"})
ZEROQUANT = recipe(
    {"method": "rtn"},
    weights={"bits": 8, "convention": "deepspeed", "granularity": {"kind": "count", "count": 16}},
)
W48A8 = recipe({"method": "rtn"}, feed_forward=FOUR)
DISTILLED = recipe({"method": "gptq"}, LKD, feed_forward=FOUR)


def run(source: Path, output: Path, what: Recipe, calibration: str = "") -> Any:
    text = calibration or source / "text.txt"
    return quantize(source, what, output, calibration=text, samples=12, length=32, device="cpu", dtype="float32")


@torch.no_grad()
def simulated(source: Path, output: Path, what: Recipe, report: Any, ids: torch.Tensor) -> torch.Tensor:
    """The float model with the weights that are stored, and its linears' inputs rounded as calibration rounds them."""
    model, journey = load(source, device="cpu")[0], Run(source, what, device="cpu")
    with ExitStack() as inputs:
        for index, block in enumerate(model.bert.encoder.layer):
            prefix = f"bert.encoder.layer.{index}."
            shard = next(output.glob(f"model-{index + 1:05d}-of-*.safetensors"))
            seen = {
                record.path.removeprefix(prefix): record.input_format
                for record in report.modules
                if record.path.startswith(prefix)
            }
            found = restore_block(journey.skeleton, shard, index, block, journey.plan().formats(prefix), seen)
            inputs.enter_context(quantizing_inputs(block, found))
        return model(input_ids=ids).logits


@pytest.mark.parametrize("what", [W8A8, ZEROQUANT, DISTILLED], ids=["w8a8", "zeroquant", "w4/8a8-lkd"])
def test_a_quantized_bert_computes_what_its_calibration_computed(what, tmp_path):
    source = save_encoder(tmp_path / "bert")
    report = run(source, tmp_path / "out", what)
    assert len(report.modules) == 12
    assert all("a8 per token" in record.format for record in report.modules)
    model, tokenizer = load(tmp_path / "out", device="cpu")
    assert type(model).__name__ == "BertForMaskedLM"
    assert tokenizer.mask_token == encoder_tokenizer().mask_token
    ids = tokens(3, 40)
    expected = simulated(source, tmp_path / "out", what, report, ids)
    assert relative_error(model(input_ids=ids).logits, expected) < CLOSE
    distance = relative_error(expected, tiny("bert")(input_ids=ids).logits)
    assert 1e-3 < distance < (0.2 if what is DISTILLED else 0.05)


def test_evaluation_tells_what_quantization_moved(tmp_path):
    source = save_encoder(tmp_path / "bert")
    found = []
    for name, what in {"eight": W8A8, "four": W48A8}.items():
        run(source, tmp_path / name, what)
        found.append(
            evaluate(
                tmp_path / name, against=source, text=source / "text.txt", window=40, limit_windows=8, device="cpu"
            )
        )
    assert all(one.task == "masked" for one in found)
    assert 0 < found[0].kl_mean < found[1].kl_mean / 10
    assert found[1].top1_agreement <= found[0].top1_agreement <= 1


@pytest.mark.parametrize("calibration", ["", "random"], ids=["text", "random"])
def test_distillation_brings_an_encoder_nearer_to_its_original(calibration, tmp_path):
    source = save_encoder(tmp_path / "bert")
    drifts = []
    for name, steps in {"rtn": [], "lkd": [LKD | {"steps": 30}]}.items():
        run(source, tmp_path / name, recipe({"method": "rtn"}, *steps, feed_forward=FOUR), calibration)
        measured = evaluate(
            tmp_path / name, against=source, text=source / "text.txt", window=32, limit_windows=12, device="cpu"
        )
        drifts.append(measured.kl_mean)
    assert drifts[1] < 0.9 * drifts[0]


def without_rounded_inputs(
    source: Path, output: Path, report: Any, ids: torch.Tensor, monkeypatch: Any
) -> torch.Tensor:
    monkeypatch.setattr("test_encoder_pipeline.quantizing_inputs", lambda block, inputs: nullcontext())
    return simulated(source, output, W8A8, report, ids)


def with_blocks_exchanged(source: Path, output: Path, report: Any, ids: torch.Tensor, monkeypatch: Any) -> torch.Tensor:
    model, _ = load(output, device="cpu")
    blocks = model.bert.encoder.layer
    blocks[0], blocks[1] = blocks[1], blocks[0]
    return model(input_ids=ids).logits


@pytest.mark.parametrize("bug", [without_rounded_inputs, with_blocks_exchanged])
def test_the_comparison_with_calibration_notices(bug, tmp_path, monkeypatch):
    source, ids = save_encoder(tmp_path / "bert"), tokens(3, 40)
    report = run(source, tmp_path / "out", W8A8)
    model, _ = load(tmp_path / "out", device="cpu")
    wrong = bug(source, tmp_path / "out", report, ids, monkeypatch)
    assert relative_error(model(input_ids=ids).logits, wrong) > CLOSE
