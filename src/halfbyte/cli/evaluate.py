"""halfbyte evaluate."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.quantize import Device
from halfbyte.cli.terminal import console_beside, hush_transformers, progress, write_json


class Dtype(StrEnum):
    """What to compute in; auto is float32 on the CPU and the checkpoint's own type on a GPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's folder, or its name on the Hugging Face hub.")
    ],
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text that the model was not calibrated on.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", metavar="NAME|FILE", help="Quantize while loading, by a recipe that needs no data."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="The model as it was: measure the drift from it."),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            "--kv-cache",
            metavar="FORMAT",
            help="Let every token see its past as a quantized cache shows it: int4, int8-g64, k8v4-w64, kivi, ...; "
            "float for none, and nothing for what the checkpoint says.",
        ),
    ] = None,
    long_context: Annotated[
        bool,
        typer.Option(
            "--long-context",
            help="Also repeat passages at growing distances: the loss on the second copy, and the head that the cache "
            "hurts most.",
        ),
    ] = False,
    passkey: Annotated[
        bool,
        typer.Option("--passkey", help="Also hide numbers in long texts and ask for them; for models that can answer."),
    ] = False,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens that the model reads at a time: 2048, as in papers, or all that an encoder can read.",
            show_default=False,
        ),
    ] = None,
    limit_windows: Annotated[int | None, typer.Option(min=1, help="Only the first so many windows.")] = None,
    device: Annotated[Device, typer.Option(help="auto is the GPU where there is one.")] = Device.AUTO,
    dtype: Annotated[
        Dtype, typer.Option(help="auto is float32 on the CPU and the checkpoint's own type on a GPU.")
    ] = Dtype.AUTO,
    bos: Annotated[bool, typer.Option(help="Begin each window with the BOS token.")] = False,
    seed: Annotated[int, typer.Option(help="Chooses the tokens that are hidden from an encoder, and pass keys.")] = 0,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write what was measured as JSON; - is stdout.")
    ] = None,
) -> None:
    """Measure a model's perplexity, and with --against how far quantization has moved it.

    Perplexity is per token, over windows that do not overlap. Of an encoder
    (BERT): the share of hidden tokens that it finds. Against the original, on
    the same tokens: mean and 99 % quantile of the KL divergence, and how often
    both models hold the same token most likely.

    \b
    halfbyte evaluate model-w4 --text held-out.txt
    halfbyte evaluate model-w4 --against org/model --text held-out.txt
    halfbyte evaluate org/model -r rtn-w4a16 --against org/model --text held-out.txt
    halfbyte evaluate org/model --kv-cache int4 --text held-out.txt --long-context
    halfbyte evaluate bert-w8a8 --against org/bert --text held-out.txt
    """
    # PyTorch and transformers take seconds to import, which the help must not wait for.
    import torch

    from halfbyte.cli import tables
    from halfbyte.evaluation.long_context import long_context as measure_far
    from halfbyte.evaluation.passkey import passkey as hide_and_ask
    from halfbyte.evaluation.perplexity import evaluate as run
    from halfbyte.runtime.load import opened

    hush_transformers()
    computed = None if dtype is Dtype.AUTO else getattr(torch, dtype.value)
    with progress() as step:
        measured = run(
            model,
            recipe=recipe,
            against=against,
            kv_cache=kv_cache,
            text=text,
            window=window,
            limit_windows=limit_windows,
            device=device.value,
            dtype=computed,
            bos=bos,
            seed=seed,
            progress=lambda done, total: step(done, total, f"window {done} of {total}"),
        )
    far = asked = None
    if long_context or passkey:
        pair = opened(model, recipe=recipe, device=device.value, dtype=computed)
    if long_context:
        with progress() as step:
            far = measure_far(
                pair,
                text=text,
                kv_cache=kv_cache,
                progress=lambda done, total: step(done, total, f"sequence {done} of {total}"),
            )
    if passkey:
        with progress() as step:
            asked = hide_and_ask(
                pair,
                kv_cache=kv_cache,
                seed=seed,
                progress=lambda done, total: step(done, total, f"text {done} of {total}"),
            )
    if json is not None:
        more = {"long_context": far, "passkey": asked}
        write_json(measured.to_json() | {key: each.to_json() for key, each in more.items() if each is not None}, json)
    console_beside(json).print(tables.evaluation(measured))
    if far is not None:
        console_beside(json).print(tables.second_copies(far))
    if asked is not None:
        console_beside(json).print(tables.pass_keys(asked))
