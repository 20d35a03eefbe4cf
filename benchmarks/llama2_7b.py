"""How long a Llama-2-7B-shaped model takes: random weights made here, 128 x 2048 random tokens, reading and writing included.

    python benchmarks/llama2_7b.py --folder /tmp/llama2-7b --recipes gptq-w4a16 awq-w4a16 --json result.json

needs a GPU with 24 GB and 20 GB of disk. `--phases` says where the time goes (it waits for the GPU at every phase,
which costs a little).
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import halfbyte
from halfbyte import block, pipeline, run
from halfbyte.calibration.walk import Stream

SHARDS = 4


def make_model(folder: Path, layers: int, hidden: int, inner: int, heads: int) -> None:
    """Random bfloat16 weights N(0, 0.02) in Hugging Face layout, with the demo model's tokenizer."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    demo = Path(halfbyte.__file__).parent / "demo_model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * 0.02).bfloat16().cpu()

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    outer = {"model.embed_tokens.weight": matrix(32000, hidden), "model.norm.weight": ones(),
             "lm_head.weight": matrix(32000, hidden)}  # fmt: skip
    index = {}
    for shard in range(SHARDS):
        tensors = dict(outer) if shard == 0 else {}
        for layer in range(shard * layers // SHARDS, (shard + 1) * layers // SHARDS):
            prefix = f"model.layers.{layer}."
            tensors |= {f"{prefix}self_attn.{name}_proj.weight": matrix(hidden, hidden) for name in "qkvo"}
            tensors |= {f"{prefix}mlp.{name}_proj.weight": matrix(inner, hidden) for name in ("gate", "up")}
            tensors[f"{prefix}mlp.down_proj.weight"] = matrix(hidden, inner)
            tensors |= {f"{prefix}{name}_layernorm.weight": ones() for name in ("input", "post_attention")}
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


class Phases:
    """Seconds by phase, measured around functions with the GPU idle at both ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, label: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, name, timed)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=["gptq-w4a16", "awq-w4a16"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--phases", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    if not (options.folder / "config.json").is_file():
        make_model(options.folder, options.layers, options.hidden, options.inner, options.heads)
    print(f"model ready in {time.perf_counter() - start:.0f} s", flush=True)
    phases = Phases()
    if options.phases:
        phases.wrap(block, "observe", "observe (forward passes, Gram matrices)")
        phases.wrap(block, "shared_inputs", "shared inputs")
        phases.wrap(Stream, "advance", "advance (forward passes)")
        phases.wrap(block.BlockQuantizer, "_round", "round and measure")
        phases.wrap(run.Run, "read_block", "read a block")
        phases.wrap(pipeline, "block_tensors", "pack")
        phases.wrap(run, "enter", "enter")
        phases.wrap(pipeline, "fingerprint", "fingerprint")
        phases.wrap(pipeline, "write_rest", "write the rest")
        phases.wrap(pipeline.OutputFolder, "flush", "wait for the disk")
    rows = []
    for recipe in options.recipes:
        phases.seconds.clear()
        output = options.folder.with_name(f"{options.folder.name}-{recipe}")
        report = pipeline.quantize(
            options.folder, recipe, output, calibration="random", samples=options.samples, length=options.length, overwrite=True,
        )  # fmt: skip
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        rows.append(
            {"recipe": recipe, "device": device, "shape": f"{options.layers} blocks, {options.hidden}/{options.inner}",
             "calibration": f"{options.samples} x {options.length}", "seconds": round(report.seconds, 1),
             "peak_device_gb": round(report.peak_device / 1e9, 2), "peak_host_gb": round(report.peak_host / 1e9, 2),
             "gb_before": round(report.bytes_before / 1e9, 2), "gb_after": round(report.bytes_after / 1e9, 2),
             "phases": {label: round(seconds, 1) for label, seconds in phases.seconds.items()}}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(output)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
