"""Which kernels a step of decoding launches on the GPU of this machine, and what a layer of it takes.

    python benchmarks/step_trace.py --recipes none integer-scale-w4a8 integer-scale-w4a8:int4 --json step_trace.json

The first layers of a known shape with random weights, their steps recorded as one CUDA graph as in `halfbyte bench`; behind
a colon the format of the cache. A layer's time is the distance from one layer to the next in a trace of one replay; steps
are timed without it.
"""

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from halfbyte.runtime.bench import opened_or_random, seconds
from halfbyte.runtime.cache_plan import attach_cache, chosen_plan
from halfbyte.runtime.decoder import Decoder
from halfbyte.runtime.fused import fuse

CONTEXT, NEW_TOKENS = 512, 128
DEVICE = torch.device("cuda")


def kernels(work: Callable[[], Any]) -> list[tuple[float, float, str]]:
    """Start and duration in µs, and name, of every kernel that `work` launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        torch.cuda.synchronize()
    events: Any = trace.events()
    found = [event for event in events if event.device_type.name == "CUDA"]
    return sorted((e.time_range.start, e.time_range.end - e.time_range.start, e.name) for e in found)


def layer_time(found: list[tuple[float, float, str]], layers: int) -> float:
    """µs from a layer to the next: the median distance between launches of the longest kernel that each layer has once."""
    names = [name for _, _, name in found]
    _, once = max((taken, name) for _, taken, name in found if names.count(name) == layers)
    starts = [start for start, _, name in found if name == once]
    return median(after - before for before, after in pairwise(starts))


@torch.no_grad()
def measure(model: Any, recipe: str, batch: int, layers: int) -> dict[str, Any]:
    """One row; the kernels of one layer are printed."""
    decoder = Decoder(model, batch, CONTEXT + NEW_TOKENS).record(CONTEXT)
    prompts = torch.randint(0, 1000, (batch, CONTEXT), device=DEVICE)
    steps = []
    for _ in range(3):
        decoder.prefill(prompts)
        torch.cuda.synchronize()
        steps.append(seconds(lambda: [decoder.step() for _ in range(NEW_TOKENS - 1)], DEVICE) / (NEW_TOKENS - 1))
    decoder.prefill(prompts)
    found = kernels(decoder.step)
    for start, taken, name in found:
        print(f"{start - found[0][0]:8.1f} {taken:6.1f} {name[:100]}")
    row = {"recipe": recipe, "batch": batch, "layers": layers, "step_us": 1e6 * min(steps)}
    return row | {"layer_us": layer_time(found, layers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--recipes", nargs="+", default=["none", "rtn-w4a16", "integer-scale-w4a8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.recipes:
        recipe, _, cache = name.removeprefix("none").partition(":")
        model = opened_or_random(options.shape, recipe or None, options.layers, DEVICE, None)
        if recipe:
            fuse(model)
        attach_cache(model, chosen_plan(model, cache or None))
        for batch in options.batches:
            rows.append(measure(model, name, batch, options.layers))
            print(json.dumps(rows[-1]), flush=True)
        del model
    if options.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "shape": options.shape}
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
