"""transformers reads our own checkpoints: after `import halfbyte.huggingface`, `from_pretrained` does.

Only for `quant_method: halfbyte`; compressed-tensors, GPTQ and AWQ folders have readers in transformers already, and
`halfbyte.load` reads all of them. transformers finds no quantizer by itself: without the import it warns and leaves the
layers randomly initialised. Mixtures of experts are refused, because transformers fuses their experts.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.errors import CheckpointError, ModelError
from halfbyte.layouts.cache import SUFFIXES, cache_format
from halfbyte.layouts.embeddings import embedding_formats
from halfbyte.layouts.rotations import online_inputs
from halfbyte.models.linearize import is_transposed
from halfbyte.models.load import WeightFiles
from halfbyte.models.names import outer_name
from halfbyte.models.tables import architecture_of
from halfbyte.runtime.cache_plan import attach_cache, stored_plan
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.linear import LAYOUT, QuantizedLinear
from halfbyte.runtime.load import OWN_METHOD, Formats
from halfbyte.runtime.online import add_rotations
from halfbyte.runtime.replacement import Replacement, linear_for


@register_quantization_config(OWN_METHOD)
class HalfbyteConfig(QuantizationConfigMixin):
    """`quantization_config` as it stands in config.json."""

    def __init__(self, **entries: Any) -> None:
        self.quant_method: Any = OWN_METHOD
        self.__dict__.update(entries)


@register_quantizer(OWN_METHOD)
class HalfbyteQuantizer(HfQuantizer):
    """Puts what `linear_for` chooses in the place of every layer that the configuration calls quantized."""

    requires_calibration = True  # transformers refuses to make such a model from an unquantized one

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        """`save_pretrained` writes what was read; scales become float32."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, *, checkpoint_files: list[str] | None = None, **_options: Any
    ) -> None:
        if any(parameter.dim() == 3 for parameter in model.parameters()):
            raise ModelError(
                f"{type(model).__name__} has fused experts, which transformers would not fill from packed ones: use "
                "halfbyte.load"
            )
        linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
        config = self.quantization_config.to_dict()
        if embedding_formats(config):
            raise ModelError(
                "the checkpoint has tables of embeddings in 8 bits, which transformers would tie to its head: use halfbyte.load"
            )
        formats, activations = LAYOUT.formats(config, list(linears)), LAYOUT.activations(config, list(linears))
        if not formats and cache_format(config) is None:
            raise CheckpointError("quantization_config selects none of the model's linear layers: mend config.json")
        stored = _stored(model, checkpoint_files)
        for name, format in formats.items():
            outliers = stored.get(f"{name}.outlier_columns".removeprefix(model.base_model_prefix + "."), (0,))
            model.set_submodule(name, _room(linears[name], (format, activations.get(name)), *outliers))
            # transformers would draw random weights for it, and GPT-2 does so from the module around it; other modules
            # around it may have to compute buffers that no file holds, such as GPT-J's sines
            around: Any = model.get_submodule(name.rpartition(".")[0])
            around._is_hf_initialized = is_transposed(linears[name]) or not around._non_persistent_buffers_set
            model.get_submodule(name)._is_hf_initialized = True
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {rf"\.{suffix}$" for suffix in SUFFIXES}
        self.checkpoint_files = checkpoint_files
        if checkpoint_files:
            _check_files(model, formats, stored, Path(checkpoint_files[0]).parent)

    def _process_model_after_weight_loading(self, model: Any, **_options: Any) -> None:
        linears = {
            name: module
            for name, module in model.named_modules()
            if _is_linear(module) or isinstance(module, QuantizedLinear | IntegerLinear)
        }
        for module in linears.values():
            if isinstance(module, QuantizedLinear | IntegerLinear):
                module.prepare(model.dtype)
        config = self.quantization_config.to_dict()
        add_rotations(model, online_inputs(config, list(linears)))
        if self.checkpoint_files:
            paths = [Path(file) for file in self.checkpoint_files]
            files = WeightFiles(paths[0].parent, [path.name for path in paths])
            attach_cache(model, stored_plan(model, config, str, files))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def _room(linear: Any, formats: Formats, outliers: int) -> Replacement:
    out, columns = linear.weight.T.shape if is_transposed(linear) else linear.weight.shape
    return linear_for(*formats, columns, out, bias=linear.bias is not None, outliers=outliers, device="meta")


def _stored(model: Any, checkpoint_files: list[str] | None) -> dict[str, tuple[int, ...]]:
    """Tensors of the files by the model's names, without the base model's prefix, and their shapes."""
    if not checkpoint_files:
        return {}
    paths, table = [Path(file) for file in checkpoint_files], architecture_of(model.config.model_type)
    files = WeightFiles(paths[0].parent, [path.name for path in paths])
    names = {name: name if table is None else outer_name(table, name) for name in files}
    return {here.removeprefix(model.base_model_prefix + "."): files.shape(name) for name, here in names.items()}


def _check_files(model: Any, names: Iterable[str], stored: Iterable[str], folder: Path) -> None:
    """CheckpointError unless the files hold the tensors of these quantized layers and of no others.

    transformers itself only warns, and makes up what is missing.
    """
    expected = {
        f"{name}.{key}".removeprefix(model.base_model_prefix + ".")
        for name in names
        for key, buffer in model.get_submodule(name).named_buffers()
        if key != "bias"
    }
    there = {name for name in stored if name.rpartition(".")[2] in LAYOUT.suffixes or name in expected}
    if there != expected:
        some = sorted(there ^ expected)[0]
        raise CheckpointError(
            f"{folder}: {some} is {'not in the files' if some in expected else 'of no quantized layer'}, so "
            "config.json and the files do not belong together"
        )
