"""Text from a loaded model: transformers' generate, with the choices that make an answer repeatable."""

from pathlib import Path

import torch

from halfbyte.calibration.encoders import fills_masks
from halfbyte.calibration.text import longest_sequence
from halfbyte.errors import ModelError
from halfbyte.runtime.cache_decode import generating
from halfbyte.runtime.cache_plan import chosen_plan
from halfbyte.runtime.load import AnyRecipe, Pair, opened
from halfbyte.scheme import CacheFormat


@torch.no_grad()
def generate(
    model: str | Path | Pair,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sample: bool = False,
    seed: int = 0,
    recipe: AnyRecipe | None = None,
    kv_cache: str | CacheFormat | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
) -> str:
    """What the model writes after the prompt, up to its end-of-text token or `max_new_tokens`.

    The likeliest token every time, or with `sample` one drawn from the model's distribution; the same `seed` draws the
    same text. `model` is a folder, a hub name, or a loaded (model, tokenizer) pair, for which `device` and `dtype` mean
    nothing; with `recipe` a folder is quantized while it is loaded, as `load` does it. `kv_cache`: the format of past
    keys and values, by value or name (runtime/cache_plan.py); "float" for none, None for the checkpoint's. ModelError
    where the prompt is empty or leaves the model's positions, or the model is an encoder.
    """
    network, tokenizer = opened(model, recipe=recipe, device=device, dtype=dtype)
    if fills_masks(network):
        raise ModelError(
            f"{type(network).__name__} fills masks and writes no text: call the model itself on a text with "
            f"{tokenizer.mask_token or 'a mask'} in it, or measure it with halfbyte.evaluate"
        )
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(network.device)
    length = inputs["input_ids"].shape[1]
    limit = longest_sequence(network.config)
    if length == 0:
        raise ModelError("the prompt is empty, and this tokenizer adds no BOS token: give at least one word")
    if limit is not None and length + max_new_tokens > limit:
        raise ModelError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones are more than the model's {limit} positions: "
            "shorten one of them"
        )
    ending = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # top_k 0 and the like: a folder's generation_config.json may narrow the distribution, which nobody asked for here
    choice = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    devices = [network.device] if network.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), generating(network, chosen_plan(network, kv_cache)):
        torch.manual_seed(seed)
        written = network.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=ending, **choice)
    return tokenizer.decode(written[0, length:], skip_special_tokens=True)
