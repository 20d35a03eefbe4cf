"""halfbyte bench."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.evaluate import Dtype
from halfbyte.cli.quantize import Device
from halfbyte.cli.terminal import console_beside, hush_transformers, write_json


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|SHAPE", help="A model's folder or hub name; or a shape with random weights, as llama-2-7b."
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", metavar="NAME|FILE", help="Quantize while loading; a shape takes any recipe."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode after it.")] = 128,
    layers: Annotated[int | None, typer.Option(min=1, help="Only so many layers of a shape.")] = None,
    fused: Annotated[bool, typer.Option("--fused", help="Join what stands between products.")] = False,
    compiled: Annotated[bool, typer.Option("--compiled/--eager", help="torch.compile the rest, on a GPU.")] = True,
    kv_cache: Annotated[
        str | None,
        typer.Option("--kv-cache", metavar="FORMAT", help="Keep past keys and values so: int4, k8v4, float."),
    ] = None,
    device: Annotated[Device, typer.Option(help="auto is the GPU where there is one.")] = Device.AUTO,
    dtype: Annotated[
        Dtype, typer.Option(help="auto is float32 on the CPU and the checkpoint's own type on a GPU.")
    ] = Dtype.AUTO,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write what was measured as JSON; - is stdout.")
    ] = None,
) -> None:
    """Measure how fast a model reads and writes here: tokens a second, memory, kernels, and what bounds them.

    \b
    halfbyte bench model-w4 --batch 16 --context 2048
    halfbyte bench llama-3-8b -r rtn-w4a16
    """
    # PyTorch and transformers take seconds to import, which the help must not wait for.
    import torch

    from halfbyte.cli import tables
    from halfbyte.runtime.bench import bench as run

    hush_transformers()
    measured = run(
        model,
        recipe=recipe,
        batch=batch,
        context=context,
        new_tokens=new_tokens,
        layers=layers,
        fused=fused,
        compiled=compiled,
        kv_cache=kv_cache,
        device=device.value,
        dtype=None if dtype is Dtype.AUTO else getattr(torch, dtype.value),
    )
    if json is not None:
        write_json(asdict(measured) | {"bound_seconds": measured.bound_seconds}, json)
    console_beside(json).print(tables.speed(measured))
