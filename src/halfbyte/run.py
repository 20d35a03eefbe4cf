"""What a run knows before the first block is touched: model, recipe, device, and where its tokens come from."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.calibration.data import Calibration, calibration_tokens
from halfbyte.calibration.online import rotate_inputs
from halfbyte.calibration.walk import Stream, enter
from halfbyte.errors import CalibrationError
from halfbyte.layouts.compressed_tensors import OWN
from halfbyte.layouts.embeddings import write_embedding
from halfbyte.machine import measured_flops, pick_device, pick_dtype, resident_memory
from halfbyte.models.load import (
    Skeleton,
    WeightFiles,
    locate,
    materialize,
    materialize_outer,
    outer_modules,
    release,
    skeleton,
)
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.numerics.rows import round_rows, rows_snr
from halfbyte.plan import (
    ModulePlan,
    Plan,
    Workload,
    estimate_seconds,
    layout_name,
    peak_memory,
    plan_head,
    plan_modules,
    plan_rotations,
    plan_tables,
    saved_bytes,
)
from halfbyte.recipe import Recipe
from halfbyte.record import ModuleRecord
from halfbyte.runtime.load import load_model, load_tokenizer

TOKENS_PER_PASS = {"cpu": 8192, "cuda": 16384}


class Run:
    """One model, one recipe. Everything is checked here that can be checked without reading weights."""

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
        self.rotations = plan_rotations(self.skeleton, self.files, self.recipe)
        rotate_inputs(self.skeleton.model, self.rotations.inputs)
        self.tables = plan_tables(self.skeleton, self.recipe)
        self.head = plan_head(self.skeleton, self.files, self.recipe)
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
        linears = self.modules if self.head is None else (*self.modules, self.head)
        work = Workload(
            samples=self.samples,
            length=self.length,
            batch=min(self.samples, self.samples_per_pass),
            hidden=hidden,
            itemsize=self.dtype.itemsize,
            streams=int(self.observed) * (2 if self.recipe.needs_float_stream else 1),
            on_host=self.device.type == "cpu",
            base=self.base_memory,
            outer=sum(self.files.nbytes(name) for name in self.files)
            - sum(module.bytes_before for module in self.modules)
            + (self.rotations.untied if self.head is None else self.head.bytes_after),
            rotated=self.recipe.rotation is not None,
        )
        before = sum(self.files.nbytes(name) for name in self.files)
        after = (
            before
            + sum(module.bytes_after - module.bytes_before for module in linears)
            + self.rotations.untied
            - sum(saved_bytes(self.skeleton, self.files, path, format) for path, format in self.tables.items())
        )
        host, device = peak_memory(self.skeleton, self.modules, work)
        seconds = estimate_seconds(self.modules, work, measured_flops(self.device), self.recipe) if with_time else None
        layout = layout_name(self.skeleton, linears, self.rotations, self.recipe.scheme.cache, self.tables)
        return Plan(self.modules, layout, before, after, host, device, seconds, self.rotations, self.tables, self.head)

    @property
    def samples_per_pass(self) -> int:
        """How many calibration samples pass at a time: what the device takes, or less where a refinement asks for it."""
        wanted = [step.tokens_per_step for step in self.recipe.refinements]
        return max(1, min([TOKENS_PER_PASS[self.device.type], *wanted]) // self.length)

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
        for path, value in self.outside().items():
            module, _, key = path.rpartition(".")
            turned = nn.Parameter(value.to(self.device, self.dtype), requires_grad=False)
            self.skeleton.model.get_submodule(module)._parameters[key] = turned
        home = self.home(calibration)
        batches = calibration.batches(self.samples_per_pass)
        stream = enter(self.skeleton.model, list(self.skeleton.blocks), batches, self.device, home)
        for _, module in outer_modules(self.skeleton):
            release(module, recurse=False)
        release(self.skeleton.blocks[0])
        return stream, stream.copy() if self.recipe.needs_float_stream else None

    def home(self, calibration: Calibration) -> torch.device:
        """Hidden states wait on the device while they take less than a quarter of its memory, else in the host's."""
        if self.device.type != "cuda":
            return self.device
        text = self.skeleton.config.get_text_config()
        size = sum(len(sample) for sample in calibration.samples) * int(text.hidden_size) * self.dtype.itemsize
        return self.device if 4 * size < torch.cuda.mem_get_info(self.device)[1] else torch.device("cpu")

    def read_block(self, index: int) -> nn.Module:
        """Block `index` with its weights, in the coordinates of the recipe; as it is, where it was read and not released."""
        block, rotation = self.skeleton.blocks[index], self.recipe.rotation
        if not any(parameter.is_meta for parameter in block.parameters()):
            return block
        modules = list(block.named_modules(prefix=f"{self.skeleton.blocks_name}.{index}"))
        materialize(self.skeleton, self.files, modules, self.device, torch.float64 if rotation else self.dtype)
        self.files.close()
        if rotation is not None:
            rotation.rotate_block(self.skeleton, block)
            for tensor in (*block.parameters(), *block.buffers()):
                if tensor.dtype == torch.float64:
                    tensor.data = tensor.data.to(self.dtype)
        return block

    def outside(self) -> dict[str, Tensor]:
        """What the recipe changes outside the blocks: path of a parameter -> the value that the model computes with."""
        rotated = self._rotated()
        return rotated | {f"{path}.weight": table.decode() for path, table in self._rounded(rotated).items()}

    def outside_as_stored(self) -> tuple[dict[str, Tensor | None], list[ModuleRecord]]:
        """What the recipe changes outside the blocks as tensors of the checkpoint, and what is told of it.

        Tables and a head in 8 bits are codes and scales. None: the source's tensor is left out.
        """
        rotated = self._rotated()
        stored: dict[str, Tensor | None] = {**rotated}
        for path, table in self._rounded(rotated).items():
            stored |= {f"{path}.{name}": tensor for name, tensor in write_embedding(table).items()}
        if self.head is None:
            return stored, []
        head, record = self._rounded_head(self.head, rotated)
        return stored | {f"{self.head.path}.weight": None} | head, [record]

    def _rotated(self) -> dict[str, Tensor]:
        if self.recipe.rotation is None:
            return {}
        return self.recipe.rotation.rotate_outside(self.skeleton, self._read_outside)

    def _rounded(self, rotated: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
        """Tables of embeddings, each row to its nearest codes."""
        return {
            path: round_rows(self._value(f"{path}.weight", rotated), format) for path, format in self.tables.items()
        }

    def _rounded_head(self, plan: ModulePlan, rotated: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ModuleRecord]:
        """The head, each row to its nearest codes, after the rotation where there is one."""
        start, name, format, inputs = time.perf_counter(), f"{plan.path}.weight", plan.format, plan.activations
        assert format is not None
        weight = self._value(name, rotated)
        rounded = round_rows(weight, format)
        turned = self.recipe.rotation if name in rotated else None
        record = ModuleRecord(
            path=plan.path,
            format=str(format) + (f", {inputs}" if inputs else ""),
            method="rtn" if turned is None else f"{turned.method} → rtn",
            activations=inputs.model_dump(mode="json") if inputs else None,
            shape=plan.shape,
            weight_snr=rows_snr(weight, rounded),
            output_snr=None,
            tokens=0,
            seconds=time.perf_counter() - start,
        )
        return {f"{plan.path}.{suffix}": tensor for suffix, tensor in OWN.write(rounded).items()}, record

    def _value(self, path: str, rotated: Mapping[str, Tensor]) -> Tensor:
        return rotated[path] if path in rotated else self._read_outside(path)

    def _read_outside(self, path: str) -> Tensor:
        return self.files.read(self.skeleton.shared_name(path, self.files)).to(self.device)
