"""Greedy completions of a checkpoint by transformers, in the layout of vllm_complete.py, to compare the two.

Runs in any environment with transformers; halfbyte is not imported. Prompts are a JSON list whose entries are strings
or lists of token ids; strings are tokenised without special tokens. `--against FILE` reads a report of
vllm_complete.py for the same prompts and prints how many tokens agree, prompt by prompt, up to the first difference.
"""

import argparse
import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from perplexity import load
from transformers import AutoTokenizer


@torch.inference_mode()
def complete(model: torch.nn.Module, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """`max_tokens` greedy tokens after `prompt`, with their log-probabilities; end-of-text does not stop it."""
    tokens, logprobs = list(prompt), []
    for _ in range(max_tokens):
        # the whole text every time: slow, and with no cache that could be wrong
        last = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float().log_softmax(-1)
        tokens.append(int(last.argmax()))
        logprobs.append(float(last.max()))
    return {"prompt_ids": prompt, "generated_ids": tokens[len(prompt) :], "logprobs": logprobs}


def agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[int, float]:
    """Tokens before the first difference, and the largest gap of log-probability (nats) among those tokens."""
    if ours["prompt_ids"] != theirs["prompt_ids"]:
        raise SystemExit("the two reports are about different prompts: give both scripts the same file")
    pairs = zip(ours["generated_ids"], theirs["generated_ids"], strict=True)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    gaps = [abs(a - b) for a, b in zip(ours["logprobs"][:common], theirs["logprobs"][:common], strict=True)]
    return common, max(gaps, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON list of strings or lists of token ids")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--against", type=Path, action="append", default=[], help="report of vllm_complete.py")
    arguments = parser.parse_args()

    model = load(arguments.model).to(getattr(torch, arguments.dtype))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = [
        tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
        for prompt in json.loads(arguments.prompts.read_text(encoding="utf-8"))
    ]
    completions = [complete(model, prompt, arguments.max_tokens) for prompt in prompts]
    report = {"completions": completions, "dtype": arguments.dtype}
    arguments.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    for path in arguments.against:
        other = json.loads(path.read_text(encoding="utf-8"))
        pairs = [agreement(ours, theirs) for ours, theirs in zip(completions, other["completions"], strict=True)]
        summary = {
            "against": str(path),
            "tokens_before_first_difference": [common for common, _ in pairs],
            "out_of": arguments.max_tokens,
            "largest_logprob_gap": max(gap for _, gap in pairs),
        }
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
