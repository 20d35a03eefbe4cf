"""QuantizedLinear: an nn.Linear whose weight stays packed while it runs.

Its buffers are the tensors of a compressed-tensors checkpoint (layouts/compressed_tensors.py) with their names, shapes
and types, so a file is read into them as it is. `prepare` chooses what runs, once for a device and a dtype of
activations, and `kernel` says it:

    CPU, bfloat16             torch int4pack / int8pack for a few tokens, where the format suits them; decode for more
    CPU, float32 and float16  decode: torch's kernels gain next to nothing there and need a second copy of the weight
    Hopper, 4 bits, 16-bit    the words in another order (kernels/w4a16/tensor_cores.py): stream for a few tokens, blocks
                              for more; `weight_packed` is empty meanwhile
    CUDA, 4 and 8 bits        triton gemv for a few tokens, triton tiles for more
    anything else             decode: the weight in the activations' dtype, then torch's matmul
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.errors import CheckpointError, WeightError
from halfbyte.kernels.w4a16 import GEMV_TOKENS, cpu, route, tensor_cores, wna16_matmul
from halfbyte.kernels.w4a16.prepared import TensorCoreWeight
from halfbyte.kernels.w4a16.tilings import stream_tokens
from halfbyte.layouts.compressed_tensors import OWN
from halfbyte.layouts.layout import resolved
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.packing import int32_words
from halfbyte.runtime.rooms import weight_room
from halfbyte.scheme import WeightFormat

LAYOUT = OWN
TENSORS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
MANY_TOKENS = 2**20
UNPREPARED = "none: not prepared"


class QuantizedLinear(nn.Module):
    """y = x · Wᵀ + bias for x of any leading shape, in the dtype of x (float32, float16 or bfloat16)."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, format: WeightFormat, *, bias: bool, device: str | None = None
    ) -> None:
        """Room for a weight of this format, for `fill` or a loader, and then `prepare`."""
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        room = weight_room(out_features, in_features, format, device)
        for name in TENSORS:
            self.register_buffer(name, room.get(name))
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)
        self._activations = torch.empty(0, device=device)  # of the dtype to expect; what casts the module casts it too
        self._prepared: cpu.PreparedWeight | TensorCoreWeight | None = None
        self.kernel = UNPREPARED

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Float[Tensor, "out"] | None = None) -> "QuantizedLinear":
        """A linear on the weight's device that still has to be prepared. FormatError where it cannot be packed."""
        out, columns = weight.codes.shape
        linear = cls(columns, out, weight.format, bias=bias is not None)
        return linear.fill(LAYOUT.write(weight), bias).to(weight.codes.device)

    def fill(self, tensors: Mapping[str, Tensor], bias: Float[Tensor, "out"] | None = None) -> "QuantizedLinear":
        """Take the tensors of a checkpoint. CheckpointError where they are not of this format and shape."""
        shape = LAYOUT.shape(tensors, self.format)
        if shape != (self.out_features, self.in_features):
            raise CheckpointError(
                f"the stored weight is {shape[0]}x{shape[1]} and the model asks for {self.out_features}x"
                f"{self.in_features}: config.json and the tensors do not belong together"
            )
        for name in TENSORS:
            setattr(self, name, tensors[name] if getattr(self, name) is not None else None)
        self._prepared = None
        self.bias = bias
        self.format = resolved(self.format, self.weight_scale.dtype)
        self._activations = torch.empty(0, device=self.weight_packed.device)
        self.kernel = UNPREPARED
        return self

    def prepare(self, dtype: torch.dtype) -> "QuantizedLinear":
        """Get ready to run on activations of `dtype` where the buffers are now. Edits in place.

        Moving or casting the module afterwards (`to`, `half`, `cuda`) prepares it again.
        """
        self._unprepare()
        self._activations = torch.empty(0, device=self.weight_packed.device, dtype=dtype)
        if self.bias is not None:
            self.bias = self.bias.to(dtype)
        if self.weight_packed.is_meta:
            return self
        bits, groups = self.format.bits, 1 if self.weight_scale.dim() == 1 else self.weight_scale.shape[1]
        self.group_size = self.in_features // groups
        self._scales = self.weight_scale.view(-1, groups).expand(self.out_features, groups)
        points = self.weight_zero_point
        self._points = None if points is None else int32_words.unpack_zero_points(points, bits, self.out_features)
        if self._torch_pays():
            self._prepared = cpu.prepare(*self._weight, bits, self.group_size, dtype)
        elif self._tensor_cores_fit():
            self._prepared = tensor_cores.prepare(*self._weight, bits, self.group_size, dtype)
            self.weight_packed = self.weight_packed.new_empty(0)  # one copy of the weight is enough
        few, many, limit = self._runs(1), self._runs(MANY_TOKENS), self._few_tokens()
        self.kernel = few if few == many else f"{few} up to {limit} tokens, {many} for more"
        return self

    @property
    def _weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.weight_packed, self._scales, self._points

    def _torch_pays(self) -> bool:
        """Whether torch's CPU kernels can run this weight, for more than one token and so worth a copy of it."""
        if self.weight_packed.device.type != "cpu" or self.format.bits not in (4, 8):
            return False
        kind = cpu.Int4Weight if self.format.bits == 4 else cpu.Int8Weight
        sizes = self.out_features, self.in_features, self.format.bits, self.group_size, self._points is None
        return cpu.PAYS_UP_TO[kind, self._activations.dtype] > 1 and cpu.obstacle(*sizes) is None

    def _tensor_cores_fit(self) -> bool:
        """Whether the GPU is one that the tensor-core kernels are made for, and the weight too."""
        sizes = self.out_features, self.in_features, self.format.bits, self.group_size
        fits = tensor_cores.obstacle(*sizes, self._activations.dtype) is None
        return fits and tensor_cores.runs_on(self.weight_packed.device)

    def _unprepare(self) -> None:
        """Back to the words of the checkpoint. Edits in place."""
        if isinstance(self._prepared, TensorCoreWeight):
            self.weight_packed = tensor_cores.checkpoint_words(self._prepared)
        self._prepared = None

    def stored(self) -> QuantizedWeight:
        """The weight as codes on its grid."""
        words = self.weight_packed
        if isinstance(self._prepared, TensorCoreWeight):
            words = tensor_cores.checkpoint_words(self._prepared)
        tensors = {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}
        return LAYOUT.read(tensors | {"weight_packed": words}, self.format)

    def _few_tokens(self) -> int:
        if self._prepared is None:
            return GEMV_TOKENS
        if isinstance(self._prepared, TensorCoreWeight):
            return stream_tokens(self.out_features, self.in_features, self.group_size, self._points is None)
        return cpu.PAYS_UP_TO[type(self._prepared), self._activations.dtype]

    def _runs(self, tokens: int) -> str:
        """The kernel for so many tokens."""
        if isinstance(self._prepared, TensorCoreWeight):
            return "stream" if tokens <= self._few_tokens() else "blocks"
        if self._prepared is not None and cpu.pays(self._prepared, self._activations.dtype, tokens):
            return f"torch int{self.format.bits}pack"
        groups, device = self._scales.shape[1], self.weight_packed.device.type
        runs = route(device, tokens, groups, self.format.bits, self.group_size)
        return runs if runs == "decode" else f"triton {runs}"

    def forward(self, x: Float[Tensor, "*leading in"]) -> Float[Tensor, "*leading out"]:
        """WeightError for activations of another dtype than the module was prepared for."""
        if x.dtype != self._activations.dtype or self.kernel == UNPREPARED:
            raise WeightError(
                f"the activations are {x.dtype} and this linear is prepared for "
                f"{'nothing' if self.kernel == UNPREPARED else self._activations.dtype}: load the model with this "
                "dtype, or call prepare"
            )
        rows = x.reshape(-1, self.in_features)
        if isinstance(self._prepared, TensorCoreWeight):
            y = tensor_cores.matmul(rows, self._prepared, self.bias)
        elif self._prepared is not None and len(rows) > 0 and cpu.pays(self._prepared, x.dtype, len(rows)):
            y = cpu.matmul(rows, self._prepared, self.bias)
        else:
            y = wna16_matmul(rows, *self._weight, self.format.bits, self.group_size, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}, kernel={self.kernel}"

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self._prepared, TensorCoreWeight):
            destination[prefix + "weight_packed"] = tensor_cores.checkpoint_words(self._prepared)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """What `to` and its like call. Scales keep their stored type, as a cast would round them."""
        self._unprepare()
        scales, ready = self.weight_scale, self.kernel != UNPREPARED
        super()._apply(fn, recurse)
        self._activations = fn(self._activations)
        if not scales.is_meta:
            self.weight_scale = scales.to(self.weight_packed.device)
        return self.prepare(self._activations.dtype) if ready else self
