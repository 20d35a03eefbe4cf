"""Experts of a mixture that run together: one op for all tokens and experts, in place of a linear at a time.

`join_experts` takes the experts' prepared weights, which are in the order of a Hopper GPU's tensor cores already, lays them
side by side, and lets the linears go. The result is that of the experts one by one, to the rounding of its dtype; but the
host never waits to hear how many tokens an expert has, so that steps can be recorded and compiled.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from halfbyte.errors import WeightError
from halfbyte.kernels.experts import ExpertWeight, gated_experts, join, join_halves, obstacle
from halfbyte.kernels.experts.prepared import GROUP_STEP
from halfbyte.kernels.w4a8.prepared import PreparedWeight
from halfbyte.kernels.w4a16.prepared import TensorCoreWeight
from halfbyte.models.linearize import Expert, ExpertList
from halfbyte.runtime.fused_layers import SILU
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.runtime.online import rotation_of
from halfbyte.runtime.products import TensorCoreProduct

PARTS = ("words", "pairs", "row_scales", "counters")


class JoinedExperts(nn.Module):
    """The signature and the result of the ExpertList it replaces. `kernel` says what runs."""

    def __init__(self, up: ExpertWeight, down: ExpertWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, self.dtype = up.experts, dtype
        self._weights = {"up": up, "down": down}
        for name, weight in self._weights.items():
            for part in PARTS:
                self.register_buffer(f"{name}_{part}", getattr(weight, part))
        tokens = "w4a16" if up.kind == "half" else f"w4a8 {up.kind} scales"
        self.kernel = f"{tokens}, {up.experts} experts together, groups of {up.group_size}"

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """WeightError for activations of another dtype than the experts were prepared for."""
        if hidden_states.dtype != self.dtype:
            raise WeightError(
                f"the activations are {hidden_states.dtype} and these experts are prepared for {self.dtype}: load the "
                "model with this dtype"
            )
        return gated_experts(hidden_states, top_k_index, top_k_weights, self._weights["up"], self._weights["down"])

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}"

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:  # noqa: ARG002
        raise WeightError(
            f"{prefix.removesuffix('.')} holds experts laid out for running, not the checkpoint's tensors: copy the folder "
            "that the model was loaded from, or load it on a CPU to save it"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "JoinedExperts":  # noqa: ARG002 - torch's
        """Move, and keep the dtypes: a cast would round scales."""
        for name, weight in self._weights.items():
            parts = {part: getattr(weight, part) for part in PARTS}
            moved = {part: tensor.to(fn(tensor[:0]).device) for part, tensor in parts.items()}
            for part, tensor in moved.items():
                setattr(self, f"{name}_{part}", tensor)
            self._weights[name] = replace(weight, **moved)
        return self


def join_experts(model: nn.Module) -> int:
    """Let the experts of each mixture run together where they can; how many mixtures that were. Edits in place.

    They can where all of a mixture's experts gate with SiLU, and their linears are prepared for a Hopper GPU in 4 bits and
    one format, symmetric, in groups of 128 or a multiple, with inputs as they come or of 8 bits per token.
    """
    joined = 0
    for path, module in list(model.named_modules()):
        if isinstance(module, ExpertList):
            together = _together([part for part in module if isinstance(part, Expert)])
            if together is not None:
                model.set_submodule(path, together)
                joined += 1
    return joined


def _together(experts: Sequence[Expert]) -> JoinedExperts | None:
    """The experts as one module, or None where one of them, or their difference, does not allow it."""
    linears: list[nn.Module] = []
    for expert in experts:
        linears += [expert.gate_proj, expert.up_proj, expert.down_proj]
    if any(type(expert.act_fn).__name__ not in SILU for expert in experts):
        return None
    if any(_obstacle(linear) for linear in linears):
        return None
    halves = [part for linear in linears if (part := _halves(linear)) is not None]
    eights = [part for linear in linears if (part := _eight_bits(linear)) is not None]
    places = range(0, len(linears), 3)
    if len(halves) == len(linears) and len({(part.group_size, part.scales.dtype) for part in halves}) == 1:
        up = join_halves([halves[at : at + 2] for at in places])
        return JoinedExperts(up, join_halves([halves[at + 2 : at + 3] for at in places]), halves[0].scales.dtype)
    if len(eights) == len(linears) and len({(part.kind, part.group_size) for part in eights}) == 1:
        up = join([eights[at : at + 2] for at in places])
        first = linears[0]
        assert isinstance(first, IntegerLinear)
        return JoinedExperts(up, join([eights[at + 2 : at + 3] for at in places]), first._dtype.dtype)
    return None


def _obstacle(linear: nn.Module) -> bool:
    """Whether a linear is none of ours, or has what the kernels for experts have no place for."""
    if not isinstance(linear, QuantizedLinear | IntegerLinear):
        return True
    return linear.bias is not None or rotation_of(linear) is not None or obstacle(linear.out_features) is not None


def _halves(linear: nn.Module) -> TensorCoreWeight | None:
    """The prepared weight of a linear that reads its input as it comes, if it is one for these kernels."""
    weight = linear._prepared if isinstance(linear, QuantizedLinear) else None
    if not isinstance(weight, TensorCoreWeight) or weight.offsets is not None or weight.group_size % GROUP_STEP:
        return None
    return weight


def _eight_bits(linear: nn.Module) -> PreparedWeight | None:
    """The prepared weight of a linear that reads symmetric codes per token."""
    if not isinstance(linear, IntegerLinear) or not isinstance(linear.product, TensorCoreProduct):
        return None
    inputs = linear.activations
    plain = inputs.dynamic and inputs.granularity == "token" and inputs.symmetric
    return (
        linear.product.weight if plain and inputs.bits == 8 and inputs.clip == 1 and inputs.outliers is None else None
    )
