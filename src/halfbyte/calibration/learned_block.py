"""A block whose parameters follow from a few learned tensors: scales and shifts along its links, then clipped grids.

    here        what it is
    unrounded   the block's parameters after the moves; the block computes what the float block computes
    clips       per quantized linear, the factors of its ranges (numerics/clipping.py)
    moves       per link, the logarithms of a scale, and a shift where one can move (models/moved.py)

What was learned ends as quantized weights on grids of their formats, and as norms and biases.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.models.fold import ResolvedLink
from halfbyte.models.moved import can_shift, moved
from halfbyte.numerics.clipping import Clipping
from halfbyte.numerics.grid import expand
from halfbyte.numerics.quantized import QuantizedWeight, round_to_grid
from halfbyte.numerics.slopes import round_through

INSIDE = 0.499  # of a step: as far from its code as a weight may start
Start = Callable[[Float[Tensor, "out in"], QuantizedWeight], Clipping]


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """What moves along one link."""

    link: ResolvedLink
    log_scale: Float[Tensor, "written"]
    shift: Float[Tensor, "written"] | None


@dataclass(frozen=True, slots=True, eq=False)
class LearnedBlock:
    """`base`: every parameter of the block, float32, unrounded. `quantized`: how each rounded linear came, by its name."""

    base: Mapping[str, Tensor]
    quantized: Mapping[str, QuantizedWeight]
    clips: Mapping[str, Clipping]
    moves: tuple[Move, ...] = ()

    def unrounded(self, base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The parameters after the moves; of another base of the same names, if one is given."""
        parameters = dict(self.base if base is None else base)
        for move in self.moves:
            parameters |= moved(parameters, move.link, move.log_scale.exp(), move.shift)
        return parameters

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the quantized block computes with, with slopes in all that is learned."""
        parameters = self.unrounded()
        for name, clip in self.clips.items():
            weight, format = parameters[f"{name}.weight"], self.quantized[name].format
            parameters[f"{name}.weight"] = round_through(weight, clip.grid(weight, format), format)
        return parameters

    @torch.no_grad()
    def settled(self, base: Mapping[str, Tensor] | None = None) -> dict[str, QuantizedWeight]:
        """Each weight at its nearest codes on its clipped grid."""
        parameters = self.unrounded(base)
        return {
            name: round_to_grid(weight, self.clips[name].grid(weight, start.format), start.format)
            for name, start in self.quantized.items()
            for weight in (parameters[f"{name}.weight"],)
        }

    @property
    def clip_tensors(self) -> list[Tensor]:
        return [tensor for clip in self.clips.values() for tensor in clip.learned]

    @property
    def move_tensors(self) -> list[Tensor]:
        tensors = [tensor for move in self.moves for tensor in (move.log_scale, move.shift)]
        return [tensor for tensor in tensors if tensor is not None]


def learned_block(
    block: nn.Module,
    weights: Mapping[str, Float[Tensor, "out in"]],
    quantized: Mapping[str, QuantizedWeight],
    start: Start,
    links: Iterable[ResolvedLink] = (),
    *,
    keep_codes: bool,
) -> LearnedBlock:
    """What is to be learned of a rounded block. Nothing is edited.

    `weights`: the linears before rounding. `keep_codes`: let every weight begin inside the cell of the code that it came
    with, as near to itself as that allows. `start`: the ranges to begin with.
    """
    base = {name: parameter.detach().float().clone() for name, parameter in block.named_parameters()}
    for name, weight in quantized.items():
        original = weights[name].float()
        base[f"{name}.weight"] = (near_codes(original, weight) if keep_codes else original).clone()
    clips = {name: start(base[f"{name}.weight"], weight) for name, weight in quantized.items()}
    moves = []
    for link in links:
        device = base[f"{link.writer_name}.weight"].device
        zeros = torch.zeros(len(link.written), device=device)
        shift = zeros.clone().requires_grad_() if can_shift(link) else None
        moves.append(Move(link, zeros.clone().requires_grad_(), shift))
    return LearnedBlock(base, quantized, clips, tuple(moves))


def near_codes(original: Float[Tensor, "out in"], weight: QuantizedWeight) -> Float[Tensor, "out in"]:
    """The values nearest to the original whose nearest codes are the weight's; beyond the grid's ends, the original."""
    steps, decoded = expand(weight.grid.scales, *original.shape), weight.decode()
    away = (original - decoded) / steps
    low = torch.where(weight.codes <= weight.format.lowest, -torch.inf, -INSIDE)
    high = torch.where(weight.codes >= weight.format.highest, torch.inf, INSIDE)
    return decoded + torch.maximum(torch.minimum(away, high), low) * steps
