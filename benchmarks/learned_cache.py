"""What learning brings to a cache's shifts and scales, block by block, on text that it did not learn from.

    python benchmarks/learned_cache.py --models ref-llama-22m-outliers --calibration calib.txt \
        --json docs/measurements/learned_cache.json

The mean absolute error of one float block's output that a 4-bit cache before RoPE makes, every token exact to itself: as the
cache is, with shifts and scales that the step wkv finds, and with those after --steps steps at each rate. 12 samples of 256
tokens to find and to learn from, 4 others to judge by (the search sees them too); float32 on a CPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.calibration.cache import observe_cache
from halfbyte.calibration.data import calibration_tokens
from halfbyte.calibration.past_only import BlockCache, LearnedSmoothing
from halfbyte.calibration.reconstruct import Learned, Reconstruction, Schedule, Targets
from halfbyte.calibration.walk import Stream, enter
from halfbyte.methods.wkv import WKV
from halfbyte.numerics.cache import NO_SMOOTHING, Smoothing
from halfbyte.runtime.cache_plan import named_format
from halfbyte.runtime.load import load

FORMAT = named_format("int4-prerope")
RATES = (5e-4, 2e-3, 1e-2)
LEARNED_FROM = 3  # batches of four samples


def lesson(
    block: nn.Module,
    index: int,
    stream: Stream,
    hidden: list[Tensor],
    cache: BlockCache,
    learned: LearnedSmoothing | None,
) -> Reconstruction:
    """The block through its cache against itself without one."""
    source = Stream(hidden, stream.calls, stream.unwrap, stream.device)
    return Reconstruction(
        block=block, index=index, parameters=lambda: dict(block.named_parameters()), inputs={}, source=source,
        targets=Targets(block, (), source, index), loss="mae",
        context=lambda each: cache.attending(each, None if learned is None else learned.smoothing()),
    )  # fmt: skip


def measure(block: nn.Module, index: int, layers: int, stream: Stream, steps: int) -> dict[str, Any]:
    """One row: the errors on the batches that nothing learned from."""
    held_out = stream.hidden[LEARNED_FROM:]

    def error(smoothing: Smoothing) -> float:
        return lesson(block, index, stream, held_out, BlockCache(FORMAT, index, layers, smoothing), None).mean_loss()

    found = WKV().smooth(observe_cache(block, stream, index), FORMAT, index, layers)
    row: dict[str, Any] = {"block": index, "steps": steps, "plain": error(NO_SMOOTHING), "searched": error(found)}
    for rate in RATES:
        learned = LearnedSmoothing.of(found)
        task = lesson(block, index, stream, stream.hidden[:LEARNED_FROM], BlockCache(FORMAT, index, layers), learned)
        task.learn([Learned(learned.tensors, rate)], Schedule(steps=steps))
        row[f"learned at {rate:g}"] = error(learned.settled())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--blocks", nargs="+", type=int, default=[0, 3])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows, device = [], torch.device("cpu")
    for path in options.models:
        model, tokenizer = load(path, device="cpu", dtype=torch.float32)
        model.requires_grad_(requires_grad=False)
        tokens = calibration_tokens(options.calibration, tokenizer, samples=16, length=256, seed=0, model=model)
        blocks = list(model.model.layers)
        stream = enter(model, blocks, tokens.batches(4), device, device)
        for index, block in enumerate(blocks):
            if index in options.blocks:
                rows.append({"model": path.name, **measure(block, index, len(blocks), stream, options.steps)})
                print(json.dumps(rows[-1]), flush=True)
            with torch.no_grad():
                stream.advance(block, index)
    options.json.write_text(json.dumps({"device": "cpu", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
