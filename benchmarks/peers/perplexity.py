"""Token perplexity of any Hugging Face model directory, with transformers alone: a witness that shares no code of ours.

The text is tokenised once without special tokens and cut into non-overlapping windows; each window is scored in one
float32 forward pass, its first token is not predicted, and nothing is put in front of it. The last line printed is
one JSON object; `perplexity` is exp of the mean negative log-likelihood (nats) of all predicted tokens.

Weight-only compressed-tensors checkpoints are turned back into dense weights while loading. Those that also quantize
activations keep their layers, so that transformers rounds the activations as well.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig


def loading_options(directory: Path) -> dict[str, Any]:
    """What `from_pretrained` must be told to get dense weights out of this directory, if they are stored packed."""
    stored = getattr(AutoConfig.from_pretrained(directory), "quantization_config", None)
    if stored is None or stored["quant_method"] != "compressed-tensors":
        return {}
    rounds_activations = any(group.get("input_activations") for group in stored["config_groups"].values())
    return {} if rounds_activations else {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def load(directory: Path) -> torch.nn.Module:
    """The model in float32; SystemExit when a tensor of the model has not come from the checkpoint."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **loading_options(directory)
    )
    model, found = loaded  # a pair, which the annotation of from_pretrained does not say
    absent = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if absent:
        raise SystemExit(
            f"{directory} does not fill {len(absent)} tensors of the model, {absent[0]} the first of them: they would "
            "be random. Does transformers know this checkpoint's quant_method?"
        )
    return model.eval()


@torch.inference_mode()
def negative_log_likelihood(model: torch.nn.Module, window: torch.Tensor) -> float:
    """Summed over the predicted tokens of int64 [window], in nats."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("model", type=Path, help="model directory in the Hugging Face layout")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--limit-windows", type=int, default=16)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)

    text = arguments.text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = tokens[: len(tokens) // arguments.window * arguments.window].view(-1, arguments.window)
    windows = windows[: arguments.limit_windows]
    if not len(windows):
        raise SystemExit(f"{arguments.text} has {len(tokens)} tokens, fewer than one window of {arguments.window}")

    model = load(arguments.model)
    start = time.perf_counter()
    total = sum(negative_log_likelihood(model, window) for window in windows)
    predicted = len(windows) * (arguments.window - 1)
    report = {
        "model": str(arguments.model),
        "perplexity": round(math.exp(total / predicted), 4),
        "mean_nll": total / predicted,
        "predicted_tokens": predicted,
        "windows": len(windows),
        "window": arguments.window,
        "seconds": round(time.perf_counter() - start, 2),
        "transformers": transformers.__version__,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
