"""Quantize a model directory with llm-compressor, so that our numbers can be set beside a peer's.

Run with the python of the `llmc` environment (`make_environment.sh llmc DIR`); halfbyte is not imported. Calibration
is the protocol of our own quality tables: the text is tokenised once, without special tokens, and its first
`samples` x `length` tokens are cut into contiguous windows. Weights are symmetric integers in groups of 128, the
head stays as it is, arithmetic is float32 on the CPU. The last line printed is one JSON object; `seconds` is the
`oneshot` call alone, without imports, loading, tokenising or saving; on a busy machine look at `cpu_seconds`, which is
what `seconds` would be with the cores to itself as long as OMP_NUM_THREADS is 1.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmcompressor
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

WEIGHTS_OF_ALL_LINEARS: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}

# kind: the recipe, and whether it looks at calibration data
KINDS: dict[str, tuple[Callable[[], list[Any]], bool]] = {
    "rtn-w4a16": (lambda: [QuantizationModifier(scheme="W4A16", **WEIGHTS_OF_ALL_LINEARS)], False),
    "gptq-w4a16": (lambda: [GPTQModifier(scheme="W4A16", **WEIGHTS_OF_ALL_LINEARS)], True),
    "gptq-w4a16-no-actorder": (
        lambda: [GPTQModifier(scheme="W4A16", actorder=None, **WEIGHTS_OF_ALL_LINEARS)],
        True,
    ),
    "gptq-w3a16": (lambda: [GPTQModifier(scheme="W3A16", **WEIGHTS_OF_ALL_LINEARS)], True),
    "smoothquant-w8a8": (
        lambda: [
            SmoothQuantModifier(smoothing_strength=0.8),
            QuantizationModifier(scheme="W8A8", **WEIGHTS_OF_ALL_LINEARS),
        ],
        True,
    ),
    "smoothquant-gptq-w8a8": (
        lambda: [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(scheme="W8A8", **WEIGHTS_OF_ALL_LINEARS)],
        True,
    ),
    "awq-w4a16": (lambda: [AWQModifier(), QuantizationModifier(scheme="W4A16", **WEIGHTS_OF_ALL_LINEARS)], True),
}


def calibration_windows(tokenizer: Any, text: str, samples: int, length: int) -> torch.Tensor:
    """The first `samples` x `length` tokens of `text` as int64 [samples, length]; ValueError if it has fewer."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < samples * length:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens, {samples} x {length} = {samples * length} are wanted: "
            "give a longer text, or lower --samples or --length"
        )
    return torch.tensor(tokens[: samples * length]).view(samples, length)


def quantize(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize, save to `arguments.output` and return what is worth reporting."""
    recipe, needs_data = KINDS[arguments.kind]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    data: dict[str, Any] = {}
    if needs_data:
        if arguments.calibration is None:
            raise SystemExit(f"{arguments.kind} learns from data: give --calibration TEXT_FILE")
        text = arguments.calibration.read_text(encoding="utf-8")
        windows = calibration_windows(tokenizer, text, arguments.samples, arguments.length)
        rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows.tolist()]
        data = {
            "dataset": Dataset.from_list(rows),
            "max_seq_length": arguments.length,
            "num_calibration_samples": arguments.samples,
            "shuffle_calibration_samples": False,
        }

    start, cpu_start = time.perf_counter(), time.process_time()
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe(), **data)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start

    model.save_pretrained(arguments.output, save_compressed=True)
    tokenizer.save_pretrained(arguments.output)
    return {
        "kind": arguments.kind,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "samples": arguments.samples if needs_data else 0,
        "length": arguments.length if needs_data else 0,
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "llmcompressor": llmcompressor.__version__,
        "torch": torch.__version__,
        "output": str(arguments.output),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--model", type=Path, required=True, help="model directory in the Hugging Face layout")
    parser.add_argument("--output", type=Path, required=True, help="directory for the compressed-tensors checkpoint")
    parser.add_argument("--calibration", type=Path, help="text file; not needed by rtn")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens in a calibration window")
    arguments = parser.parse_args()

    # AWQ's cache pins memory whenever torch was built with any accelerator API, and then finds none to pin for
    IntermediatesCache.pin_memory = lambda *_, **__: None
    print(json.dumps(quantize(arguments)))


if __name__ == "__main__":
    main()
