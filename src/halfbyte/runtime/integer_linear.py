"""IntegerLinear: an nn.Linear that multiplies codes by codes, for weights and inputs of at most 8 bits.

The twin of QuantizedLinear (runtime/linear.py) for layers whose inputs are quantized too: its buffers are the tensors of
the checkpoint, and `prepare` chooses what runs. Each call quantizes its tokens, multiplies integers, and scales:

    weight                                    input                                runs
    one symmetric scale per output            one scale per token, or for all      kernels/w8a8
    likewise                                  with an outlier split                kernels/llm_int8
    4 bits in groups of 128 on a Hopper GPU   one scale per token, or for all      kernels/w4a8/tensor_cores.py
    integer scales in groups or per output    likewise                             kernels/w4a8_integer
    groups, zero points; words on a GPU       any                                  kernels/w4a8
    any other with an outlier split           likewise                             kernels/w4a8, and the columns in float32

See products.py and outliers.py. Which of the two a pair of formats gets is decided in runtime/replacement.py.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn

from halfbyte.errors import CheckpointError, WeightError
from halfbyte.kernels import w4a8
from halfbyte.kernels.w4a8 import tensor_cores
from halfbyte.kernels.w4a8_integer import row_sums
from halfbyte.kernels.w8a8 import MAX_INS_WITH_ZEROS
from halfbyte.layouts import integer_scales
from halfbyte.layouts.inputs import SUFFIXES, read_inputs, write_inputs
from halfbyte.layouts.layout import resolved
from halfbyte.numerics.quantized import QuantizedModule
from halfbyte.packing import int32_words
from halfbyte.runtime.codes import encode
from halfbyte.runtime.integer_scales import IntegerProduct, check_certificate
from halfbyte.runtime.linear import LAYOUT, UNPREPARED
from halfbyte.runtime.outliers import MixedProduct, SplitProduct
from halfbyte.runtime.products import GroupedProduct, PlainProduct, Product, TensorCoreProduct, for_tensor_cores
from halfbyte.runtime.rooms import input_room, weight_room
from halfbyte.scheme import ActivationFormat, WeightFormat

TENSORS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", *SUFFIXES)
TENSORS += integer_scales.SUFFIXES


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
        self.product: Product | None = None  # of codes; None: not prepared, or with an outlier split
        self._split: MixedProduct | SplitProduct | None = None
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
        self.product = self._split = None
        self.kernel = UNPREPARED
        return self

    def prepare(self, dtype: torch.dtype) -> "IntegerLinear":
        """Get ready to run on activations of `dtype` where the buffers are now. Edits in place.

        Moving or casting the module afterwards (`to`, `half`, `cuda`) prepares it again.
        """
        self._unprepare()
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
        scales, zeros = scales.expand(self.out_features, groups).contiguous(), self._signed_zeros()
        tensors = {name: getattr(self, name) for name in SUFFIXES if getattr(self, name) is not None}
        self._inputs, _ = read_inputs(tensors, self.activations, self.out_features, self.in_features)
        if self.weight_amplifier is not None and self.weight_reach is not None:
            check_certificate(self._signed_codes(), self.weight_scale, self.weight_reach, zeros, self.activations)
        if self.activations.outliers is None:
            self.product = self._chosen_product(scales, zeros)
            self.kernel = self.product.name
        else:
            self._split = self._chosen_split(scales, zeros)
            self.kernel = self._split.name
        return self

    def _unprepare(self) -> None:
        """Back to the tensors of the checkpoint. Edits in place."""
        self.weight_packed = self.stored_words()
        self.product = self._split = None

    def stored_words(self) -> Int32[Tensor, "out words"] | None:
        """The packed words of the checkpoint, where the weight is stored so."""
        if isinstance(self.product, TensorCoreProduct):
            return tensor_cores.checkpoint_words(self.product.weight)
        return self.weight_packed

    def _signed_zeros(self) -> Tensor | None:
        """Zero points of the weight as w4a8 reads them, int8 [out, groups]."""
        points, bits = self.weight_zero_point, self.format.bits
        if points is None or self.format.stored == "bytes":
            return points
        unsigned = int32_words.unpack_zero_points(points, bits, self.out_features)
        return (unsigned.short() - 2 ** (bits - 1)).to(torch.int8)

    def _signed_codes(self) -> Int8[Tensor, "out in"]:
        """The codes as they are stored, or unpacked."""
        if self.weight is not None:
            return self.weight
        assert self.weight_packed is not None
        return w4a8.signed_codes(self.weight_packed, self.format.bits, self.in_features)

    def _chosen_product(self, scales: Float[Tensor, "out groups"], zeros: Tensor | None) -> Product:
        """What multiplies codes by this weight on this device."""
        inputs, groups = self.activations, scales.shape[1]
        if zeros is None and (fast := self._on_tensor_cores()):
            assert self.weight_packed is not None
            self.weight_packed = self.weight_packed.new_empty(0)  # one copy of the weight is enough
            return fast
        if self.weight_amplifier is not None and inputs.granularity != "group":
            group = self.in_features // groups
            sums = None if inputs.symmetric else row_sums(self._signed_codes(), self.weight_scale, zeros)
            factors = 1 / self.weight_amplifier
            return IntegerProduct(
                self._as_read(group), self.format.bits, self.weight_scale.contiguous(), factors, zeros, sums, group
            )
        fits = inputs.granularity != "group" and self.in_features <= MAX_INS_WITH_ZEROS
        if zeros is None and groups == 1 and fits and not self._readable_words:
            codes = self._signed_codes()
            sums = None if inputs.symmetric else codes.sum(dim=1, dtype=torch.int32)
            return PlainProduct(codes, scales[:, 0], sums, self._dtype.dtype)
        run = w4a8.run_size(self.in_features, self.in_features // (inputs.group_size or self.in_features), groups)
        return GroupedProduct(self._as_read(run), scales, zeros, self.format.bits, run)

    def _on_tensor_cores(self) -> TensorCoreProduct | None:
        """The product for a Hopper GPU, where the weight and its inputs are what its kernels take."""
        inputs, scales, amplifier = self.activations, self.weight_scale, self.weight_amplifier
        if self.weight_packed is None or scales.dim() == 1 or not inputs.symmetric or inputs.granularity == "group":
            return None
        kind, factors = "float", torch.ones(len(scales), device=scales.device)
        if amplifier is not None and self.weight_reach is not None:
            if int(self.weight_reach.max()) * tensor_cores.LARGEST_INPUT >= 2**31:
                return None
            narrow = self.format.scale.kind == "integer" and self.format.scale.product == "int8"
            kind = "weight" if narrow else "integer"
            factors = 1 / amplifier
        return for_tensor_cores(self.weight_packed, scales, factors, kind, self.format.bits, self._dtype.dtype)

    @property
    def _readable_words(self) -> bool:
        """Whether the kernel of this device unpacks words itself."""
        return self.weight_packed is not None and self.weight_scale.is_cuda and self.format.bits in w4a8.TRITON_BITS

    def _as_read(self, run: int) -> Tensor:
        """The weight as the grouped kernels of this device read it."""
        if self._readable_words and self.weight_packed is not None:
            return self.weight_packed
        codes = self._signed_codes()
        return codes if codes.is_cuda or self.weight is not None else w4a8.runs_of(codes, run)

    def _chosen_split(self, scales: Float[Tensor, "out groups"], zeros: Tensor | None) -> MixedProduct | SplitProduct:
        """What multiplies codes, and apart from them the columns that are outliers."""
        codes, kept = self._signed_codes(), self.outlier_weight
        if zeros is None and scales.shape[1] == 1:
            return MixedProduct.of(codes, scales[:, 0], self._inputs, kept, self._dtype)
        return SplitProduct(codes, scales, zeros, self._inputs, kept)

    def forward(self, x: Float[Tensor, "*leading in"]) -> Float[Tensor, "*leading out"]:
        """WeightError for activations of another dtype than the module was prepared for."""
        if x.dtype != self._dtype.dtype or self.kernel == UNPREPARED:
            raise WeightError(
                f"the activations are {x.dtype} and this linear is prepared for "
                f"{'nothing' if self.kernel == UNPREPARED else self._dtype.dtype}: load the model with this dtype, or "
                "call prepare"
            )
        rows = x.reshape(-1, self.in_features)
        if not len(rows):
            y = x.new_empty(0, self.out_features)
        elif self.product is not None:
            y = self.product(encode(rows, self._inputs), rows.dtype, self.bias)
        else:
            assert self._split is not None
            y = self._split(rows, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.format}, {self.activations}, "
            f"kernel={self.kernel}"
        )

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.product, TensorCoreProduct):
            destination[prefix + "weight_packed"] = tensor_cores.checkpoint_words(self.product.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IntegerLinear":
        """What `to` and its like call. Scales keep their stored type, as a cast would round them."""
        self._unprepare()
        scales, input_scale, ready = self.weight_scale, self.input_scale, self.kernel != UNPREPARED
        amplifier = self.weight_amplifier
        super()._apply(fn, recurse)
        self._dtype = fn(self._dtype)
        if not scales.is_meta:
            self.weight_scale = scales.to(self.weight_scale.device)
            self.weight_amplifier = None if amplifier is None else amplifier.to(self.weight_scale.device)
            self.input_scale = None if input_scale is None else input_scale.to(self.weight_scale.device)
        return self.prepare(self._dtype.dtype) if ready else self
