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
from torch import nn

from halfbyte.block import BlockQuantizer, ModuleRecord
from halfbyte.calibration.data import Calibration, calibration_tokens
from halfbyte.calibration.walk import Stream, enter
from halfbyte.checkpoint import block_tensors, fingerprint, finish, hash_source, restore_block, write_rest
from halfbyte.errors import CalibrationError
from halfbyte.evaluation.report import Report
from halfbyte.layouts.folder import OutputFolder
from halfbyte.machine import measured_flops, peak_memory_used, pick_device, pick_dtype, resident_memory, start_measuring
from halfbyte.models.load import (
    Skeleton,
    WeightFiles,
    locate,
    materialize,
    materialize_outer,
    outer_modules,
    release,
    skeleton,
)  # fmt: skip
from halfbyte.plan import Plan, Workload, estimate_seconds, layout_name, peak_memory, plan_modules
from halfbyte.recipe import Recipe
from halfbyte.runtime.load import load_model, load_tokenizer

Progress = Callable[[int, int, str], None]
"""Called with blocks done, blocks in all, and what is being done."""

TOKENS_PER_PASS = {"cpu": 8192, "cuda": 16384}


def silent(_done: int, _total: int, _what: str) -> None:
    """No progress shown."""


class Run:
    """Everything that is known before the first block is touched."""

    def __init__(
        self,
        model: str | Path,
        recipe: Recipe | str | Path | Mapping[str, Any],
        *,
        calibration: str | Path | None = None,
        samples: int = 128,
        length: int = 2048,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.recipe = Recipe.load(recipe)
        self.device = pick_device(device)
        folder = locate(model)
        self.files = WeightFiles(folder)
        self.skeleton: Skeleton = skeleton(folder, trust_remote_code=trust_remote_code, refuse_quantized=True)
        self.modules = plan_modules(self.skeleton, self.files, self.recipe)
        self.stored_dtype = self.files.dtype(self.skeleton.stored_name(f"{self.modules[0].path}.weight", self.files))
        self.dtype = pick_dtype(dtype, self.device, self.stored_dtype)
        self.observed = self.recipe.needs_data or calibration is not None
        self.source, self.samples, self.length, self.seed = calibration, samples, length, seed
        self.files.close()
        self.base_memory = resident_memory()

    def plan(self, *, with_time: bool = False) -> Plan:
        """What the run would do. `with_time` measures this machine for a fraction of a second."""
        text = self.skeleton.config.get_text_config()
        hidden = int(getattr(text, "hidden_size", 0) or getattr(text, "n_embd", 0))
        work = Workload(
            samples=self.samples,
            length=self.length,
            batch=min(self.samples, max(1, TOKENS_PER_PASS[self.device.type] // self.length)),
            hidden=hidden,
            itemsize=self.dtype.itemsize,
            streams=int(self.observed) * (2 if self.recipe.rounding.needs_drift else 1),
            on_host=self.device.type == "cpu",
            base=self.base_memory,
            outer=sum(self.files.nbytes(name) for name in self.files)
            - sum(module.bytes_before for module in self.modules),
        )
        before = sum(self.files.nbytes(name) for name in self.files)
        after = before + sum(module.bytes_after - module.bytes_before for module in self.modules)
        host, device = peak_memory(self.skeleton, self.modules, work)
        seconds = estimate_seconds(self.modules, work, measured_flops(self.device), self.recipe) if with_time else None
        return Plan(self.modules, layout_name(self.skeleton), before, after, host, device, seconds)

    def calibrate(self) -> Calibration | None:
        """The calibration tokens, where the recipe or the user wants any."""
        if not self.observed:
            return None
        if self.source is None:
            raise CalibrationError(
                f"recipe {self.recipe.name!r} looks at activations and needs calibration text: give a text file, a data "
                "set such as c4, `random` (random tokens) or `self` (the model writes its own)"
            )
        return calibration_tokens(
            self.source,
            load_tokenizer(self.skeleton.folder),
            samples=self.samples,
            length=self.length,
            seed=self.seed,
            model=self.float_model() if str(self.source) == "self" else self.skeleton.model,
        )

    def float_model(self) -> nn.Module:
        """The whole unquantized model, for text that it writes itself."""
        return load_model(self.skeleton.folder, device=self.device.type, dtype=self.dtype)

    def streams(self, calibration: Calibration | None) -> tuple[Stream | None, Stream | None]:
        """The calibration set at the door of the first block, and a second time for the float model if it is needed."""
        if calibration is None:
            return None, None
        self.read_block(0)
        materialize_outer(self.skeleton, self.files, self.device, self.dtype)
        home = self.home(calibration)
        batches = calibration.batches(max(1, TOKENS_PER_PASS[self.device.type] // self.length))
        stream = enter(self.skeleton.model, list(self.skeleton.blocks), batches, self.device, home)
        for _, module in outer_modules(self.skeleton):
            release(module, recurse=False)
        release(self.skeleton.blocks[0])
        return stream, stream.copy() if self.recipe.rounding.needs_drift else None

    def home(self, calibration: Calibration) -> torch.device:
        """Hidden states wait on the device while they take less than a quarter of its memory, else in the host's."""
        if self.device.type != "cuda":
            return self.device
        text = self.skeleton.config.get_text_config()
        size = sum(len(sample) for sample in calibration.samples) * int(text.hidden_size) * self.dtype.itemsize
        return self.device if 4 * size < torch.cuda.mem_get_info(self.device)[1] else torch.device("cpu")

    def read_block(self, index: int) -> nn.Module:
        """Block `index` with its weights."""
        block = self.skeleton.blocks[index]
        prefix = f"{self.skeleton.blocks_name}.{index}"
        materialize(self.skeleton, self.files, list(block.named_modules(prefix=prefix)), self.device, self.dtype)
        self.files.close()
        return block


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
        quantizer = BlockQuantizer(run.skeleton, run.recipe, run.stored_dtype, *run.streams(tokens))
        records: list[ModuleRecord] = []
        for index in range(blocks):
            name = f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"
            prefix = f"{run.skeleton.blocks_name}.{index}."
            formats = plan.formats(prefix)
            if name in folder.finished:
                if quantizer.stream is not None:
                    block = run.read_block(index)
                    original = copy.deepcopy(block) if quantizer.float_stream else None
                    restore_block(run.skeleton, folder.folder / name, index, block, formats)
                    quantizer.step_over(index, block, original)
                records += [ModuleRecord.from_json(record) for record in folder.finished[name]["record"]]
            else:
                block = run.read_block(index)
                quantized, new = quantizer.quantize(index, block, formats)
                tensors = block_tensors(run.skeleton, run.files, index, block, quantized)
                folder.write_tensors(name, tensors, [asdict(record) for record in new])
                records += new
            release(run.skeleton.blocks[index])
            progress(index + 1, blocks, f"block {index + 1} of {blocks}")
        write_rest(run.skeleton, run.files, folder, f"model-{blocks + 1:05d}-of-{blocks + 1:05d}.safetensors")
        folder.flush()
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
