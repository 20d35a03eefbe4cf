"""halfbyte generate."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.evaluate import Dtype
from halfbyte.cli.quantize import Device
from halfbyte.cli.terminal import hush_transformers, write_json


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's folder, or its name on the Hugging Face hub.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What the model continues.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", metavar="NAME|FILE", help="Quantize while loading, by a recipe that needs no data."
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            "--kv-cache",
            metavar="FORMAT",
            help="Keep past keys and values in a quantized cache: int4, int8-g64, k8v4-w64, kivi, ...; float for none, "
            "and nothing for what the checkpoint says.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 64,
    sample: Annotated[
        bool,
        typer.Option("--sample/--greedy", help="Draw from the distribution, or always take the likeliest token."),
    ] = False,
    seed: Annotated[int, typer.Option(help="With --sample, the same seed draws the same text.")] = 0,
    device: Annotated[Device, typer.Option(help="auto is the GPU where there is one.")] = Device.AUTO,
    dtype: Annotated[
        Dtype, typer.Option(help="auto is float32 on the CPU and the checkpoint's own type on a GPU.")
    ] = Dtype.AUTO,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Let a model, quantized or not, continue a text.

    \b
    halfbyte generate model-w4 --prompt "The capital of France is"
    halfbyte generate model-w4 --prompt "Once upon a time" --sample --seed 1
    halfbyte generate org/model -r rtn-w4a16 --prompt "Once upon a time"
    halfbyte generate org/model --kv-cache int4 --prompt "Once upon a time"
    """
    # PyTorch and transformers take seconds to import, which the help must not wait for.
    import torch

    from halfbyte.runtime.generate import generate as run

    hush_transformers()
    text = run(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        sample=sample,
        seed=seed,
        recipe=recipe,
        kv_cache=kv_cache,
        device=device.value,
        dtype=None if dtype is Dtype.AUTO else getattr(torch, dtype.value),
    )
    if json:
        write_json({"prompt": prompt, "text": text}, Path("-"))
    else:
        typer.echo(f"{prompt}{text}")
