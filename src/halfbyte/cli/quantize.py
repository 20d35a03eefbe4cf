"""halfbyte quantize."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.terminal import INTERRUPTED, console_beside, fail, hush_transformers, progress, write_json


class Device(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    """What calibration passes are computed in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's folder, or its name on the Hugging Face hub.")
    ],
    recipe: Annotated[str, typer.Option("--recipe", "-r", metavar="NAME|FILE", help="See: halfbyte recipes.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The new model's folder.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET|random|self",
            help="What the model reads while it is observed: text or .jsonl file, c4, pile, wikitext2, random tokens, "
            "or text that the model writes itself. Recipes that only round need none.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens in each of them.")] = 2048,
    seed: Annotated[int, typer.Option(help="Chooses the samples.")] = 0,
    device: Annotated[Device, typer.Option(help="auto is the GPU where there is one.")] = Device.AUTO,
    dtype: Annotated[
        DType,
        typer.Option(help="Of the calibration passes; auto is the model's own where the device multiplies it fast."),
    ] = DType.AUTO,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and what it takes in memory, disk and time.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report (or the plan) as JSON; - is stdout.")
    ] = None,
) -> None:
    """Quantize a model by a recipe into a new folder, which transformers and vLLM can load.

    Every finished block is on the disk, so a run that was stopped goes on with
    --resume. The folder appears under its name when all of it is there, with a
    report of what each layer lost (report.html) and a model card (README.md).

    \b
    What it would do, and what it takes in memory, disk and time:
    halfbyte quantize org/model -r gptq-w4a16 --dry-run

    \b
    With a data set; with a text and a recipe of your own; without data:
    halfbyte quantize org/model -r gptq-w4a16 --calibration c4 -o model-w4
    halfbyte quantize ./model -r mine.yaml --calibration mine.txt -o model-mine
    halfbyte quantize ./model -r rtn-w8a16 -o model-w8
    """
    # PyTorch and transformers take seconds to import, which the help must not wait for.
    from halfbyte.cli import tables
    from halfbyte.pipeline import dry_run as planned
    from halfbyte.pipeline import quantize as run

    if dry_run:
        plan = planned(
            model, recipe, calibration=calibration, samples=samples, length=length, seed=seed, device=device.value,
            dtype=dtype.value, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if json is not None:
            write_json(tables.plan_json(plan), json)
        console_beside(json).print(tables.plan(plan))
        return
    if output is None:
        raise typer.BadParameter("is needed, except with --dry-run", param_hint="--output")
    hush_transformers()
    try:
        with progress() as step:
            report = run(
                model, recipe, output, calibration=calibration, samples=samples, length=length, seed=seed,
                device=device.value, dtype=dtype.value, resume=resume, overwrite=overwrite, trust_remote_code=trust_remote_code,
                progress=step,
            )  # fmt: skip
    except KeyboardInterrupt:
        fail(
            f"stopped: the finished blocks are kept in {output}.unfinished, and the same command with --resume goes on "
            "from there",
            INTERRUPTED,
        )
    if json is not None:
        write_json(report.to_json(), json)
    console = console_beside(json)
    console.print(tables.report(report))
    console.print(f"{output} is ready; what every layer lost is in {output / 'report.html'}", soft_wrap=True)
