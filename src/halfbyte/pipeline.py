"""The journey: model → calibration → transform → quantize → pack → checkpoint. Read this first.

One block is in memory at a time. What a finished block leaves is a safetensors file and a line in the journal, so a
run that is stopped goes on from there with the same result to the byte.
"""

import copy
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from halfbyte.block import BlockQuantizer
from halfbyte.checkpoint import (
    block_tensors,
    cache_tensors,
    fingerprint,
    finish,
    hash_source,
    restore_block,
    write_rest,
)
from halfbyte.evaluation.report import Report
from halfbyte.layouts.folder import OutputFolder
from halfbyte.machine import peak_memory_used, start_measuring
from halfbyte.models.load import release
from halfbyte.plan import Plan
from halfbyte.recipe import Recipe
from halfbyte.record import ModuleRecord
from halfbyte.run import Run

Progress = Callable[[int, int, str], None]
"""Called with blocks done, blocks in all, and what is being done."""


def silent(_done: int, _total: int, _what: str) -> None:
    """No progress shown."""


def dry_run(model: str | Path, recipe: Recipe | str | Path | Mapping[str, Any], **options: Any) -> Plan:
    """What `quantize` would do with the same arguments: formats, bytes, peak memory and time. Writes nothing."""
    return Run(model, recipe, **options).plan(with_time=True)


@torch.no_grad()
def quantize(
    model: str | Path,
    recipe: Recipe | str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    calibration: str | Path | None = None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Report:
    """Quantize a Hugging Face model (folder or hub name) by a recipe into a new folder, and say what it cost.

    `calibration`: a text file, a data set's name, "random" or "self"; recipes that need no data do without. `samples`
    of `length` tokens. `dtype` is what calibration passes are computed in: the model's own where the device multiplies
    it fast (GPUs; bfloat16 on a CPU with AMX), float32 elsewhere. Raises the errors of halfbyte.errors; what was
    finished before stays, and `resume` goes on.
    """
    start = time.perf_counter()
    start_measuring()
    run = Run(
        model, recipe, calibration=calibration, samples=samples, length=length, seed=seed, device=device,
        dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    plan = run.plan()
    tokens = run.calibrate()
    blocks = len(run.skeleton.blocks)
    mark = fingerprint(run.files, run.recipe, tokens, run.device, run.dtype, seed)
    with (
        OutputFolder(Path(output), mark, size=plan.bytes_after, resume=resume, overwrite=overwrite) as folder,
        ThreadPoolExecutor(max_workers=4) as pool,
    ):
        hashes = hash_source(run.files, pool)
        progress(0, blocks, "embedding")
        streams = run.streams(tokens)
        quantizer = BlockQuantizer(run.skeleton, run.recipe, run.stored_dtype, *streams, read=run.read_block)
        records: list[ModuleRecord] = []
        for index in range(blocks):
            name = f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"
            prefix = f"{run.skeleton.blocks_name}.{index}."
            formats, activations = plan.formats(prefix), plan.activations(prefix)
            if name in folder.finished:
                old = [ModuleRecord.from_json(record) for record in folder.finished[name]["record"]]
                if quantizer.stream is not None:
                    chosen = {
                        record.path.removeprefix(prefix): record.input_format
                        for record in old
                        if record.input_format is not None
                    }
                    block = run.read_block(index)
                    original = copy.deepcopy(block) if quantizer.float_stream else None
                    inputs = restore_block(run.skeleton, folder.folder / name, index, block, formats, chosen)
                    quantizer.step_over(index, block, original, inputs)
                records += old
            else:
                block = run.read_block(index)
                quantized, new = quantizer.quantize(index, block, formats, activations)
                tensors = block_tensors(run.skeleton, run.files, index, block, quantized)
                tensors |= cache_tensors(run.skeleton, index, block, quantizer.smoothing.get(index))
                folder.write_tensors(name, tensors, [asdict(record) for record in new])
                records += new
            release(run.skeleton.blocks[index])
            progress(index + 1, blocks, f"block {index + 1} of {blocks}")
        rest = f"model-{blocks + 1:05d}-of-{blocks + 1:05d}.safetensors"
        write_rest(run.skeleton, run.files, folder, rest, run.outside_as_stored)
        folder.flush()
        records += [ModuleRecord.from_json(record) for record in folder.finished[rest]["record"]]
        host, used = peak_memory_used(run.device)
        report = Report(
            model=str(model),
            recipe=run.recipe.model_dump(mode="json"),
            modules=tuple(records),
            unquantized=tuple(module.path for module in plan if module.format is None),
            bytes_before=plan.bytes_before,
            bytes_after=sum(entry["size"] for entry in folder.finished.values()),
            seconds=time.perf_counter() - start,
            peak_host=host,
            peak_device=used,
            provenance=mark | {"source": {name: future.result() for name, future in hashes.items()}},
        )
        return finish(run.skeleton, folder, plan, run.recipe, report)
