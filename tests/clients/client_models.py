"""The models that clients read, quantized, and what we ourselves say about them."""

import shutil
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.demo_text import documentation_split
from halfbyte.demonstration import MODEL
from halfbyte.layouts.convert import export
from halfbyte.pipeline import quantize
from halfbyte.recipe import Recipe

RECIPE = "gptq-w4a16"
PYTHON = (
    "The import statement", "If the iterator is exhausted, the", "A class definition is an", "Raised when the",
    "The format string must", "An assignment statement evaluates", "The following example shows", "Return a copy of the",
)  # fmt: skip
WIKI = (
    "The history of the city begins in", "In mathematics, a group is", "She was born in London and",
    "The river flows through the", "During the Second World War, the", "The species is found in",
    " = = Early life = =\n", "The album was released in 1997 and reached",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, the text it is calibrated on, the text it is judged on, and how it is quantized."""

    name: str
    folder: Path
    calibration: Path
    text: str
    prompts: tuple[str, ...]
    samples: int
    length: int


@dataclass(frozen=True, slots=True)
class Kind:
    """What may be expected of a client that reads a model."""

    perplexity_gap: float  # relative, between transformers and us
    mixture: bool = False


MODELS = {
    "demo": Kind(1e-5),
    "ref-llama-22m": Kind(1e-5),
    # transformers rounds the weights of fused experts to bfloat16
    "ref-mixtral-15m": Kind(1e-3, mixture=True),
}


def subject(name: str, reference: Path, texts: Path) -> Subject:
    """A model of MODELS: the package's own, or one of the folder of reference models."""
    if name == "demo":
        training, held_out = documentation_split()
        (texts / "calibration.txt").write_text(training, encoding="utf-8")
        return Subject(name, MODEL, texts / "calibration.txt", held_out, PYTHON, samples=8, length=128)
    wiki = reference / "data/wiki"
    text = (wiki / "test.txt").read_text(encoding="utf-8") if wiki.is_dir() else ""
    return Subject(name, reference / "models" / name, wiki / "calib.txt", text, WIKI, samples=32, length=512)


def quantized(model: Subject, layout: str, folder: Path) -> Path:
    """The checkpoint of a model in a layout, made in `folder` unless it is there."""
    first, output = folder / f"{model.name}-compressed-tensors", folder / f"{model.name}-{layout}"
    if not first.exists():
        # the rarest experts of a small mixture see few of so few tokens
        recipe = Recipe.load(Recipe.load(RECIPE).model_dump(mode="json") | {"starved": "round"})
        quantize(
            model.folder, recipe, first, calibration=model.calibration, samples=model.samples, length=model.length,
            device="cpu",
        )  # fmt: skip
    return output if output.exists() else export(first, layout, output)


INPUTS = {"per token": {"granularity": "token"}, "static": {"granularity": "tensor", "dynamic": False}}


def eight_bits(model: Subject, inputs: str, output: Path, *, head: bool = False) -> Path:
    """A checkpoint of 8-bit weights with inputs quantized as one of INPUTS, and likewise its head."""
    weights = {"bits": 8, "convention": "odyssey", "granularity": {"kind": "channel"}}
    scheme = {"weights": weights, "activations": INPUTS[inputs], "head": weights if head else None}
    recipe = {"scheme": scheme, "steps": [{"method": "rtn"}]}
    quantize(
        model.folder, recipe, output, calibration=model.calibration, samples=model.samples, length=model.length,
        device="cpu",
    )  # fmt: skip
    return output


def damaged(checkpoint: Path, output: Path) -> Path:
    """A copy in which every row of one projection of the first block has the scales of the row before it."""
    shutil.copytree(checkpoint, output)
    (shard,) = output.glob("model-00001-*")
    tensors = load_file(shard)
    name = "model.layers.0.self_attn.o_proj.weight_scale"
    tensors[name] = tensors[name].roll(1, dims=0)
    save_file(tensors, shard, metadata={"format": "pt"})
    return output


@torch.no_grad()
def continued(model: Any, prompt: list[int], count: int) -> list[int]:
    """The `count` likeliest tokens one after the other, end of text or not; the whole text every time, no cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def predicted(model: Any, prompt: list[int], written: list[int]) -> Tensor:
    """Our log-probabilities, [written, vocabulary], for every token that somebody wrote after a prompt."""
    logits = model(input_ids=torch.tensor([prompt + written]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


def agreement(model: Any, completion: dict[str, Any]) -> dict[str, Any]:
    """How one of vLLM's completions compares with ours."""
    prompt, theirs = completion["prompt_ids"], completion["generated_ids"]
    ours = continued(model, prompt, len(theirs))
    expected = predicted(model, prompt, theirs)
    chosen = expected.gather(1, torch.tensor(theirs)[:, None])[:, 0]
    pairs = zip(ours, theirs, strict=True)
    return {
        "before_first_difference": sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)),
        "likeliest_after_the_same_text": int((expected.argmax(-1) == torch.tensor(theirs)).sum()),
        "largest_logprob_gap": float((chosen - torch.tensor(completion["logprobs"])).abs().max()),
        "farthest_from_our_choice": float((expected.max(-1).values - chosen).max()),
    }
