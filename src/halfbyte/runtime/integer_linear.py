"""IntegerLinear: an nn.Linear that multiplies codes by codes, for weights and inputs of at most 8 bits.

The twin of QuantizedLinear (runtime/linear.py) for layers whose inputs are quantized too: its buffers are the tensors of
the checkpoint, and `prepare` chooses what runs. Each call quantizes its tokens, multiplies integers, and scales:

    weight                                    input                                runs
    one symmetric scale per output            one scale per token, or for all      kernels/w8a8
    likewise                                  with an outlier split                kernels/llm_int8
    groups, zero points; words on a GPU       any                                  kernels/w4a8
    integer scales in groups or per output    one scale per token, or for all      kernels/w4a8_integer
    any other with an outlier split           likewise                             kernels/w4a8, and the columns in float32

Which of the two a pair of formats gets is decided in runtime/replacement.py.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from halfbyte.errors import CheckpointError, WeightError
from halfbyte.kernels import w4a8
from halfbyte.kernels.llm_int8 import llm_int8_matmul, outlier_scratch, static_outlier_matmul, static_outliers
from halfbyte.kernels.w8a8 import MAX_INS_WITH_ZEROS, int8_matmul, route
from halfbyte.kernels.w8a8.cpu import product_is_exact
from halfbyte.layouts import integer_scales
from halfbyte.layouts.inputs import SUFFIXES, read_inputs, write_inputs
from halfbyte.layouts.layout import resolved
from halfbyte.numerics.quantized import QuantizedModule
from halfbyte.packing import int32_words
from halfbyte.runtime.codes import encode, encode_split
from halfbyte.runtime.integer_scales import IntegerScales, certified
from halfbyte.runtime.linear import LAYOUT, UNPREPARED
from halfbyte.runtime.rooms import input_room, weight_room
from halfbyte.scheme import ActivationFormat, WeightFormat

TENSORS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", *SUFFIXES)
TENSORS += integer_scales.SUFFIXES

Route = Literal["w8a8", "w4a8", "w4a8_integer", "llm_int8", "split"]


class IntegerLinear(nn.Module):
    """y = x̂ · Ŵᵀ + bias, both rounded to their grids, for x of any leading shape, in the dtype of x.

    Outlier columns, where the input's format has a split, are multiplied as they are.
    """

    weight: Tensor | None
    weight_packed: Tensor | None
    weight_scale: Tensor
    weight_shape: Tensor | None
    weight_zero_point: Tensor | None
    weight_amplifier: Tensor | None
    weight_reach: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: WeightFormat,
        activations: ActivationFormat,
        *,
        bias: bool,
        outliers: int = 0,
        device: str | None = None,
    ) -> None:
        """Room for such a weight, for `fill` or a loader, and then `prepare`. `outliers`: columns of a static set."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.activations = format, activations
        room = weight_room(out_features, in_features, format, device)
        room |= input_room(out_features, in_features, activations, outliers, device)
        for name in TENSORS:
            self.register_buffer(name, room.get(name))
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)
        self._dtype = torch.empty(0, device=device)  # of the dtype to expect; what casts the module casts it too
        self.kernel = UNPREPARED

    @classmethod
    def from_module(cls, module: QuantizedModule, bias: Float[Tensor, "out"] | None = None) -> "IntegerLinear":
        """A linear on the weight's device that still has to be prepared. FormatError where it cannot be stored."""
        assert module.inputs is not None
        (out, columns), weight = module.weight.codes.shape, module.weight
        linear = cls(columns, out, weight.format, module.inputs.format, bias=bias is not None, device="meta")
        tensors = LAYOUT.write(weight) | write_inputs(module)
        return linear.fill(tensors, bias).to(weight.codes.device)

    def fill(self, tensors: Mapping[str, Tensor], bias: Float[Tensor, "out"] | None = None) -> "IntegerLinear":
        """Take the tensors of a checkpoint. CheckpointError where they are not of these formats and shapes."""
        shape = LAYOUT.shape(tensors, self.format)
        if shape != (self.out_features, self.in_features):
            raise CheckpointError(
                f"the stored weight is {shape[0]}x{shape[1]} and the model asks for {self.out_features}x"
                f"{self.in_features}: config.json and the tensors do not belong together"
            )
        read_inputs(tensors, self.activations, *shape)
        LAYOUT.read_grid(tensors, self.format)  # refuses scales that cannot be
        for name in TENSORS:
            if getattr(self, name) is not None:
                setattr(self, name, tensors[name])
        self.bias = None if bias is None else bias.detach()
        self.format = resolved(self.format, self.weight_scale.dtype)
        self._dtype = torch.empty(0, device=self.weight_scale.device)
        self.kernel = UNPREPARED
        return self

    def prepare(self, dtype: torch.dtype) -> "IntegerLinear":
        """Get ready to run on activations of `dtype` where the buffers are now. Edits in place.

        Moving or casting the module afterwards (`to`, `half`, `cuda`) prepares it again.
        """
        self._dtype = torch.empty(0, device=self.weight_scale.device, dtype=dtype)
        if self.bias is not None:
            self.bias = self.bias.to(dtype)
        if self.outlier_weight is not None:
            self.outlier_weight = self.outlier_weight.to(dtype)
        if self.weight_scale.is_meta:
            return self
        groups = 1 if self.weight_scale.dim() == 1 else self.weight_scale.shape[1]
        scales = self.weight_scale.float().view(-1, groups)
        if self.weight_amplifier is not None:
            scales = scales / self.weight_amplifier[:, None]
        self._scales = scales.expand(self.out_features, groups).contiguous()
        self._zeros = self._signed_zeros()
        tensors = {name: getattr(self, name) for name in SUFFIXES if getattr(self, name) is not None}
        self._inputs, _ = read_inputs(tensors, self.activations, self.out_features, self.in_features)
        self._route = self._chosen_route()
        input_groups = self.in_features // (self.activations.group_size or self.in_features)
        self._run = w4a8.run_size(self.in_features, input_groups, groups)
        self._codes = self._chosen_codes()
        self._integers = self._certified()
        self._sums = None
        if self._route in ("w8a8", "llm_int8") and not self.activations.symmetric:
            self._sums = self._codes.sum(dim=1, dtype=torch.int32)
        self._prepare_split(dtype)
        self.kernel = self._name()
        return self

    def _prepare_split(self, dtype: torch.dtype) -> None:
        """What the kernels want to know of outliers before they meet any."""
        listed, self._listed, self._scratch = self.outlier_columns, None, None
        self._columns = self.outlier_weight
        if listed is not None:
            self._columns = self._decoded(listed).to(dtype) if self.outlier_weight is None else self.outlier_weight
        if self._route == "llm_int8" and listed is not None and self._columns is not None:
            self._listed = static_outliers(listed, self._columns, self.in_features)
        elif self._route == "llm_int8" and self.weight_scale.is_cuda:
            self._scratch = outlier_scratch(self.in_features, self.weight_scale.device)

    def _signed_zeros(self) -> Tensor | None:
        """Zero points of the weight as w4a8 reads them, int8 [out, groups]."""
        points, bits = self.weight_zero_point, self.format.bits
        if points is None or self.format.stored == "bytes":
            return points
        unsigned = int32_words.unpack_zero_points(points, bits, self.out_features)
        return (unsigned.short() - 2 ** (bits - 1)).to(torch.int8)

    def _chosen_route(self) -> Route:
        plain = self._zeros is None and self._scales.shape[1] == 1
        if self.activations.outliers is not None:
            return "llm_int8" if plain else "split"
        if self.weight_amplifier is not None and self.activations.granularity != "group":
            return "w4a8_integer"
        words = self.weight_packed is not None and self._readable_words
        fits = self.activations.granularity != "group" and self.in_features <= MAX_INS_WITH_ZEROS
        return "w8a8" if plain and fits and not words else "w4a8"

    @property
    def _readable_words(self) -> bool:
        """Whether the kernel of this device unpacks words itself."""
        return self.weight_scale.is_cuda and self.format.bits in w4a8.TRITON_BITS

    def _chosen_codes(self) -> Tensor:
        """The weight as the kernel reads it: codes as they are stored, or unpacked once."""
        if self.weight is not None:
            return self.weight
        assert self.weight_packed is not None
        grouped = self._route in ("w4a8", "w4a8_integer")
        if grouped and self._readable_words:
            return self.weight_packed
        codes = w4a8.signed_codes(self.weight_packed, self.format.bits, self.in_features)
        if grouped and not codes.is_cuda:
            return w4a8.runs_of(codes, self._group if self._route == "w4a8_integer" else self._run)
        return codes

    @property
    def _group(self) -> int:
        return self.in_features // self._scales.shape[1]

    def _certified(self) -> IntegerScales | None:
        """Integer scales, whose certificate holds for the codes that are here. None: the scales are floats."""
        if self.weight_amplifier is None or self.weight_reach is None:
            return None
        codes = self.weight
        if codes is None:
            assert self.weight_packed is not None
            codes = w4a8.signed_codes(self.weight_packed, self.format.bits, self.in_features)
        return certified(
            codes, self.weight_scale, self.weight_amplifier, self.weight_reach, self._zeros, self.activations
        )

    def _decoded(self, columns: Int32[Tensor, "n"]) -> Float[Tensor, "out n"]:
        """Columns of the weight from their codes, in float32."""
        chosen = columns.long()
        group = chosen // (self.in_features // self._scales.shape[1])
        codes = self._codes[:, chosen].float()
        return (codes if self._zeros is None else codes - self._zeros[:, group]) * self._scales[:, group]

    def _name(self) -> str:
        """What runs, in words."""
        device, on = self.weight_scale.device, "triton"
        if device.type == "cpu":
            on = "torch int8" if product_is_exact() else "torch float"
        match self._route:
            case "w8a8" if device.type == "cuda":
                capability = torch.cuda.get_device_capability(device)
                return f"w8a8 triton {route('cuda', self._codes, self._codes, self._dtype.dtype, capability)}"
            case "w4a8":
                return f"w4a8 {on}, {self._run} inputs a run"
            case "w4a8_integer":
                return f"w4a8 integer scales {on}, groups of {self._group}"
            case "split":
                return f"w4a8 {on}, {self._run} inputs a run, and split columns"
            case other:
                return f"{other} {on}"

    def forward(self, x: Float[Tensor, "*leading in"]) -> Float[Tensor, "*leading out"]:
        """WeightError for activations of another dtype than the module was prepared for."""
        if x.dtype != self._dtype.dtype or self.kernel == UNPREPARED:
            raise WeightError(
                f"the activations are {x.dtype} and this linear is prepared for "
                f"{'nothing' if self.kernel == UNPREPARED else self._dtype.dtype}: load the model with this dtype, or "
                "call prepare"
            )
        rows = x.reshape(-1, self.in_features)
        y = self._product(rows) if len(rows) else x.new_empty(0, self.out_features)
        return y.view(*x.shape[:-1], self.out_features)

    def _product(self, rows: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        match self._route:
            case "w8a8":
                return self._plain_product(rows)
            case "w4a8":
                return self._grouped_product(rows)
            case "w4a8_integer":
                assert self._integers is not None
                found = encode(rows, self._inputs)
                return self._integers.times(found, self._codes, self.format.bits, self.bias, rows.dtype)
            case "llm_int8":
                return self._mixed_product(rows)
            case _:
                return self._split_product(rows)

    def _plain_product(self, rows: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        found = encode(rows, self._inputs)
        return int8_matmul(
            found.codes,
            found.scales.flatten(),
            self._codes,
            self._scales[:, 0],
            bias=self.bias,
            x_zeros=None if found.zeros is None else found.zeros.expand(len(rows), 1).flatten(),
            weight_sums=self._sums,
            dtype=rows.dtype,
        )

    def _grouped_product(self, rows: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        found = encode(rows, self._inputs)
        return w4a8.grouped_int8_matmul(
            found.codes,
            found.scales.expand(len(rows), -1),
            self._codes,
            self._scales,
            bits=self.format.bits,
            x_zeros=None if found.zeros is None else found.zeros.expand(len(rows), -1),
            weight_zeros=self._zeros,
            bias=self.bias,
            dtype=rows.dtype,
        )

    def _mixed_product(self, rows: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        split = self.activations.outliers
        assert split is not None
        scales, sums = self._scales[:, 0], self._sums
        if self._listed is not None:
            return static_outlier_matmul(rows, self._codes, scales, self._listed, self.bias, weight_sums=sums)
        return llm_int8_matmul(
            rows, self._codes, scales, split.threshold, self._columns, self.bias,
            weight_sums=sums, scratch=self._scratch,
        )  # fmt: skip

    def _split_product(self, rows: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        found, columns = encode_split(rows, self._inputs)
        y = w4a8.grouped_int8_matmul(
            found.codes,
            found.scales,
            self._codes,
            self._scales,
            x_zeros=found.zeros,
            weight_zeros=self._zeros,
            bias=self.bias,
        )
        if self._columns is None:
            weight = self._decoded(columns)
        elif self.outlier_columns is None:
            weight = self._columns[:, columns.long()]
        else:
            weight = self._columns
        return torch.addmm(y, rows[:, columns.long()].float(), weight.float().T).to(rows.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.format}, {self.activations}, "
            f"kernel={self.kernel}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IntegerLinear":
        """What `to` and its like call. Scales keep their stored type, as a cast would round them."""
        scales, input_scale, ready = self.weight_scale, self.input_scale, self.kernel != UNPREPARED
        amplifier = self.weight_amplifier
        super()._apply(fn, recurse)
        self._dtype = fn(self._dtype)
        if not scales.is_meta:
            self.weight_scale = scales.to(self.weight_scale.device)
            self.weight_amplifier = None if amplifier is None else amplifier.to(self.weight_scale.device)
            self.input_scale = None if input_scale is None else input_scale.to(self.weight_scale.device)
        return self.prepare(self._dtype.dtype) if ready else self
