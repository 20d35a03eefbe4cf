"""One decoder block of Llama-2-7B's shape, quantized by halfbyte and by llm-compressor in the same run.

    python benchmarks/one_block.py --folder /tmp/one-block --json one_block.json

needs a GPU and `pip install llmcompressor`. Both read the same folder, calibrate on the same 128 x 2048 random tokens
and write a compressed-tensors checkpoint; seconds include reading and writing.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.calibration.data import calibration_tokens
from halfbyte.pipeline import quantize
from llama2_7b import make_model

SAMPLES, LENGTH = 128, 2048


def peer(folder: Path, output: Path, modifiers: list[Any]) -> None:
    """llm-compressor on the tokens that halfbyte's `random` source gives."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = calibration_tokens("random", tokenizer, samples=SAMPLES, length=LENGTH, model=model).samples
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * LENGTH} for row in tokens]
    oneshot(
        model=model, dataset=Dataset.from_list(rows), recipe=modifiers, max_seq_length=LENGTH,
        num_calibration_samples=SAMPLES,
    )  # fmt: skip
    model.save_pretrained(output, save_compressed=True)


def timed(name: str, work: Callable[[], Any]) -> dict[str, Any]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    try:
        work()
    except Exception as cause:  # noqa: BLE001 - a peer that fails is a row of the table, not the end of the others
        return {"name": name, "failed": f"{type(cause).__name__}: {cause}"[:300]}
    torch.cuda.synchronize()
    seconds = round(time.perf_counter() - start, 2)
    return {"name": name, "seconds": seconds, "peak_device_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder, output = options.folder, options.folder.with_name("one-block-out")
    make_model(folder, layers=1, hidden=4096, inner=11008, heads=32)

    def ours(recipe: str) -> Callable[[], Any]:
        return lambda: quantize(
            folder, recipe, output, calibration="random", samples=SAMPLES, length=LENGTH, overwrite=True
        )

    linear = {"targets": "Linear", "scheme": "W4A16", "ignore": ["lm_head"]}
    rounding = QuantizationModifier(targets=["Linear"], scheme="W4A16", ignore=["lm_head"])
    rows = []
    for name, work in (
        ("warm-up", ours("gptq-w4a16")),
        ("halfbyte gptq-w4a16", ours("gptq-w4a16")),
        ("halfbyte awq-w4a16", ours("awq-w4a16")),
        ("llm-compressor GPTQ W4A16", lambda: peer(folder, output, [GPTQModifier(**linear)])),
        ("llm-compressor AWQ W4A16", lambda: peer(folder, output, [AWQModifier(), rounding])),
    ):
        rows.append(timed(name, work))
        print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(output, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
