"""halfbyte inspect and halfbyte export: what is done with a finished checkpoint's folder."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.terminal import fail, out, write_json


class Format(StrEnum):
    """The layouts that other programs read."""

    COMPRESSED_TENSORS = "compressed-tensors"
    GPTQ = "gptq"
    AWQ = "awq"


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's folder.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Say what a checkpoint holds, whether it is intact, and which kernels would run it here.

    Ends with exit code 1 where something is missing, damaged, or not what its configuration says.

    \b
    halfbyte inspect model-w4
    """
    # PyTorch takes seconds to import, which the help must not wait for.
    from halfbyte.cli import tables
    from halfbyte.layouts.inspect import inspect as run
    from halfbyte.runtime.choice import kernels_here

    found = run(folder)
    if not found.problems:
        found = replace(found, kernels=kernels_here(folder, trust_remote_code=trust_remote_code))
    if json:
        write_json(found.as_dict(), Path("-"))
    else:
        out.print(tables.inspection(found))
    if found.problems:
        fail(f"{folder} has {len(found.problems)} problems: download it again, or quantize again")


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized checkpoint's folder.")],
    format: Annotated[Format, typer.Option("--format", "-f", help="The layout to write.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The new folder.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")] = False,
) -> None:
    """Write a quantized checkpoint in another layout: the same codes and scales, bit for bit.

    What the layout cannot hold exactly is refused before anything is written.

    \b
    halfbyte export model-w4 --format gptq --output model-w4-gptq
    halfbyte export model-w4 --format awq --output model-w4-awq
    """
    # PyTorch takes seconds to import, which the help must not wait for.
    from halfbyte.layouts.convert import export as run

    out.print(f"{run(folder, format.value, output, overwrite)} is ready", soft_wrap=True)
