"""Which inputs are outliers, in which layers and for how many tokens, and what the model loses without them.

    python benchmarks/emergence.py --models ref-llama-22m ref-llama-22m-outliers --text test.txt \
        --json docs/measurements/emergence.json --page docs/llm-int8.md

After Dettmers et al., LLM.int8(), arXiv 2208.07339, section 4. A dimension of the hidden states is an outlier dimension
where some magnitude reaches the threshold in a quarter of the norm outputs at least, and at 6 % of all (token, norm)
places. The six that reach it at most places are set to zero wherever a linear or router reads a norm, then six others
drawn by chance.
"""

import argparse
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import halfbyte
from halfbyte.calibration.walk import linears, watching
from halfbyte.evaluation.perplexity import evaluate
from halfbyte.models.fold import find_links
from halfbyte.models.heads import head_counts
from halfbyte.models.linearize import linearize
from halfbyte.models.tables import ARCHITECTURES
from halfbyte.runtime.load import load
from page import tell

LAYERS, TOKENS = 0.25, 0.06  # shares that make a dimension an outlier dimension
DRAWS = 3
SILENCED = 6  # dimensions that are set to zero


class Counter:
    """What one input of a block holds: per dimension the tokens that reach the threshold, and its largest magnitude."""

    def __init__(self, threshold: float) -> None:
        self.threshold, self.tokens, self.loud_tokens = threshold, 0, 0
        self.reached = self.largest = torch.zeros(())

    def add(self, inputs: Tensor) -> None:
        magnitudes = inputs.flatten(0, -2).abs()
        loud = magnitudes >= self.threshold
        self.tokens += len(loud)
        self.loud_tokens += int(loud.any(dim=1).sum())
        self.reached = self.reached + loud.sum(dim=0)
        self.largest = torch.maximum(self.largest, magnitudes.amax(dim=0))


def norm_readers(model: Any) -> dict[str, list[nn.Module]]:
    """Name of each norm with readers -> the modules that read it, over all blocks. Linearizes the blocks in place."""
    table = ARCHITECTURES[model.config.model_type]
    found = {}
    for index, block in enumerate(model.get_submodule(table.blocks).children()):
        linearize(block)
        for link in find_links(block, table, *head_counts(model.config)):
            if not isinstance(link.writer, nn.Linear):
                found[f"{index}.{link.writer_name}"] = list(link.readers.values())
    return found


def other_linears(model: Any, readers: Mapping[str, list[nn.Module]]) -> dict[str, nn.Module]:
    """The linears of the blocks that read no norm."""
    known = {id(module) for modules in readers.values() for module in modules}
    blocks = model.get_submodule(ARCHITECTURES[model.config.model_type].blocks).children()
    return {
        f"{index}.{name}": linear
        for index, block in enumerate(blocks)
        for name, linear in linears(block).items()
        if id(linear) not in known
    }


@contextmanager
def without(dimensions: Iterable[int], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let these modules read zeros in place of these dimensions."""
    columns = torch.tensor(sorted(dimensions), dtype=torch.int64)

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0].index_fill(-1, columns.to(args[0].device), 0), *args[1:]

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def study(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One model: count, then measure it whole, without its outlier dimensions, and without others."""
    pair = load(folder, device=options.device, dtype=torch.float32)
    readers = norm_readers(pair[0])

    def perplexity() -> float:
        return evaluate(pair, text=options.text, window=1024, limit_windows=options.windows).perplexity

    watched = {name: modules[0] for name, modules in readers.items()} | other_linears(pair[0], readers)
    counters = {name: Counter(options.threshold) for name in watched}
    with torch.no_grad(), watching(watched, lambda name, inputs: counters[name].add(inputs)):
        whole = perplexity()
    norms = [counters[name] for name in readers]
    in_layers = torch.stack([counter.reached > 0 for counter in norms]).float().mean(dim=0)
    at_tokens = torch.stack([counter.reached / counter.tokens for counter in norms]).mean(dim=0)
    outliers = ((in_layers >= LAYERS) & (at_tokens >= TOKENS)).nonzero().flatten().tolist()
    silenced = at_tokens.argsort(descending=True)[:SILENCED].tolist()
    others = [dimension for dimension in range(len(in_layers)) if dimension not in silenced]
    modules = [module for found in readers.values() for module in found]
    drawn = []
    for draw in range(DRAWS):
        chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(draw))[: len(silenced)].tolist()
        with without([others[place] for place in chosen], modules):
            drawn.append(perplexity())
    with without(silenced, modules):
        without_loudest = perplexity()
    return {
        "model": folder.name, "outlier_dimensions": outliers, "hidden": len(in_layers),
        "silenced": {
            str(d): {"layers": round(float(in_layers[d]), 4), "tokens": round(float(at_tokens[d]), 4)} for d in silenced
        },
        "perplexity": whole, "without_silenced": without_loudest, "without_as_many_others": drawn,
        "inputs": [row(name, counter) for name, counter in counters.items()],
    }  # fmt: skip


def row(name: str, counter: Counter) -> dict[str, Any]:
    """One input of one block: the dimensions that reach the threshold, and the share of tokens at which any does."""
    block, _, inputs = name.partition(".")
    dimensions = (counter.reached > 0).nonzero().flatten()
    return {
        "block": int(block), "input": inputs, "width": len(counter.reached), "dimensions": len(dimensions),
        "loudest": counter.largest.argsort(descending=True)[:8].tolist(), "largest": round(float(counter.largest.max()), 2),
        "tokens_share": round(counter.loud_tokens / counter.tokens, 4),
        "entries_share": round(float(counter.reached.sum()) / counter.tokens / len(counter.reached), 6),
    }  # fmt: skip


def tables(models: list[dict[str, Any]]) -> str:
    """Markdown: where the threshold is reached, a line per block; and what silencing costs, a line per model."""
    inputs = list(dict.fromkeys(row["input"] for row in models[0]["inputs"]))
    head = [f"{kind}`{name}`" for kind in ("", "outliers: ")[: len(models)] for name in inputs]
    lines = ["| block | " + " | ".join(head) + " |", "|" + "---|" * (1 + len(head))]
    found = [{(row["block"], row["input"]): row for row in model["inputs"]} for model in models]
    for block in dict.fromkeys(row["block"] for row in models[0]["inputs"]):
        rows = [rows[block, name] for rows in found for name in inputs]
        cells = [f"{row['dimensions']}, {row['tokens_share']:.0%}" if row["dimensions"] else "–" for row in rows]
        lines.append(f"| {block} | " + " | ".join(cells) + " |")
    lines += ["", "| model | the loudest dimensions | ppl | without them | without as many others |", "|" + "---|" * 5]
    for model in models:
        others = model["without_as_many_others"]
        lines.append(
            f"| `{model['model']}` | {', '.join(model['silenced'])} | {model['perplexity']:.1f} | "
            f"{model['without_silenced']:.1f} | {min(others):.1f} to {max(others):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=[])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--threshold", type=float, default=6.0)
    parser.add_argument("--windows", type=int, default=16, help="of 1024 tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--render", type=Path, help="measure nothing, take what this earlier --json holds")
    parser.add_argument("--page", type=Path, help="put the tables between the markers of this page")
    options = parser.parse_args()
    found = json.loads(options.render.read_text())["models"] if options.render else []
    for folder in options.models:
        found.append(study(folder, options))
        print(json.dumps({key: value for key, value in found[-1].items() if key != "inputs"}), flush=True)
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu"
    record = {
        "device": device, "threshold": options.threshold, "tokens": options.windows * 1024,
        "versions": {
            "halfbyte": halfbyte.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "models": found,
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    tell(tables(found), options.page, "emergence")


if __name__ == "__main__":
    main()
