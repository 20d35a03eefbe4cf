"""How fast whole models read and write on the GPU of this machine, quantized and not.

    python benchmarks/end_to_end.py --shape llama-2-7b --recipes rtn-w4a16 integer-scale-w4a8:int4 --json end_to_end.json

Weights are random. Every row is what `halfbyte bench` measures: prompts of 512 tokens, 128 new ones, decoding from a
CUDA graph with a static cache and layers that went through torch.compile, in bf16 and quantized alike. For the model in
bf16 transformers' own `generate` stands beside it. Behind a recipe's name and a colon stands the format of its cache. A
process for each recipe; they compile a batch side by side and then measure it in turns, so that all have to fit the GPU
at once: with large batches give fewer recipes.
"""

import argparse
import json
import multiprocessing as mp
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor

from halfbyte.runtime.bench import bench, opened_or_random, seconds

BF16 = ""
STOCK_TOKENS = 16


class Turn:
    """One process's turn to measure a batch: nobody begins before all are ready, none leaves before the last is done."""

    def __init__(self, barrier: Any, lock: Any) -> None:
        self.barrier, self.lock, self.taken = barrier, lock, 0

    def __enter__(self) -> None:
        self.barrier.wait()
        self.lock.acquire()

    def __exit__(self, *_exception: object) -> None:
        self.lock.release()
        self.barrier.wait()
        self.taken += 1


def work_on(name: str, options: argparse.Namespace, turn: Turn, rows: Any) -> None:
    """All batches of one recipe."""
    inductor.compile_threads = 2
    recipe, _, cache = name.partition(":")
    for done, batch in enumerate(options.batches):
        try:
            measured = bench(
                options.shape, recipe=recipe or None, batch=batch, context=options.context,
                new_tokens=options.new_tokens, layers=options.layers, fused=bool(recipe) and not options.apart,
                kv_cache=cache or None, turn=turn,
            )  # fmt: skip
            rows.put(asdict(measured) | {"recipe": name, "bound_seconds": measured.bound_seconds})
        except Exception:  # noqa: BLE001 - what fails is a row of the table, not the end of the others
            rows.put({"recipe": name, "batch": batch, "failed": traceback.format_exc()})
            if turn.taken == done:
                with turn:  # the others wait for it
                    pass
        torch.cuda.empty_cache()
    if name == BF16 and options.stock:
        rows.put(stock(options))
    rows.put(None)


def stock(options: argparse.Namespace) -> dict[str, Any]:
    """transformers' generate, as it is, on one prompt."""
    device = torch.device("cuda")
    model = opened_or_random(options.shape, None, options.layers, device, None)
    prompt = torch.randint(0, 1000, (1, options.context), device=device)

    def run(count: int) -> float:
        return seconds(
            lambda: model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False), device
        )

    run(2)
    first, all_of_them = run(1), run(STOCK_TOKENS + 1)
    return {"recipe": "transformers generate", "batch": 1, "step_seconds": (all_of_them - first) / STOCK_TOKENS}


def add(file: Path, shape: str, row: dict[str, Any]) -> None:
    """Put the row into the file, in the place of an older one of the same shape, recipe and batch."""
    found = json.loads(file.read_text())["rows"] if file.exists() else []
    row = {"model": shape, **row}
    is_same = lambda other: all(other[key] == row[key] for key in ("model", "recipe", "batch"))  # noqa: E731
    rows = [other for other in found if not is_same(other)] + [row]
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    file.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--recipes", nargs="*", default=["rtn-w4a16", "rtn-w8a8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, help="only so many")
    parser.add_argument("--apart", action="store_true", help="without fused layers")
    parser.add_argument("--stock", action="store_true", help="also transformers' generate")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    context = mp.get_context("spawn")
    queue, running = context.Queue(), [BF16, *options.recipes]
    turn = Turn(context.Barrier(len(running)), context.Lock())
    for recipe in running:
        context.Process(target=work_on, args=(recipe, options, turn, queue), daemon=True).start()
    rows, left, start = [], len(running), time.time()
    while left:
        row = queue.get()
        if row is None:
            left -= 1
            continue
        rows.append(row)
        told = {key: row.get(key) for key in ("recipe", "batch", "step_seconds", "bound_seconds", "prefill_seconds")}
        print(f"{time.time() - start:5.0f} s", json.dumps(told), row.get("failed", ""), flush=True)
        if options.json and "failed" not in row:
            add(options.json, options.shape, row)
    base = {row["batch"]: row for row in rows if row["recipe"] == BF16 and "failed" not in row}
    for row in rows:
        if "prefill_seconds" in row and row["batch"] in base:
            own = base[row["batch"]]
            print(f"{row['recipe'] or 'bf16':28s} {row['batch']:4d}  {1e3 * row['step_seconds']:8.3f} ms a step "
                  f"{own['step_seconds'] / row['step_seconds']:5.2f}x  prefill {1e3 * row['prefill_seconds']:8.2f} ms "
                  f"{own['prefill_seconds'] / row['prefill_seconds']:5.2f}x")  # fmt: skip


if __name__ == "__main__":
    main()
