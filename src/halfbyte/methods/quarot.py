"""QuaRot: compute in rotated coordinates, in which no channel is loud, and quantize there.

Ashkboos et al., 2024 — https://arxiv.org/abs/2404.00456, section 4; R1 to R4 as SpinQuant (2405.16406) numbers them

    here          paper           what it is
    residual      Q       (R1)    the residual stream's rotation, folded into all that reads or writes it
    heads         H_dh    (R2)    each head's values, folded into the value and the output projection
    online: down  H_ff    (R4)    the inputs of the down projections, folded into them
    online: out   H_nh·dh         the inputs of the output projections, likewise: the paper's Hadamard across heads

What is folded costs nothing at run time. What is `online` is a Hadamard product there, and the checkpoint says so. All
products are formed in float64 and rounded once; the logits stay those of the model, whatever its norms (models/rotate.py).
The paper moves the means of layer norms into what comes before; here the rotation leaves means alone (numerics/rotation.py),
so a model with layer norms keeps them. Rotations depend on the seed and the sizes alone. R3, of keys, is the cache's own:
`scheme.cache.rotate_keys`.
"""

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from halfbyte.models.load import Skeleton
from halfbyte.models.rotate import (
    Wiring,
    check_stream,
    keeps_mean,
    turn_inputs,
    turn_stream,
    turn_values,
    turned_outside,
    wiring,
)
from halfbyte.numerics.rotation import Orthogonal, online_rotation, rotation
from halfbyte.scheme import OnlineHadamard, Value

Online = Literal["down", "out"]


class QuaRot(Value):
    """Rotate the residual stream, heads and inputs."""

    method: Literal["quarot"] = "quarot"
    seed: int = Field(default=0, ge=0)
    residual: bool = True
    heads: bool = True
    online: tuple[Online, ...] = ()
    fallback: Literal["error", "orthogonal"] = "error"
    """What takes the place of a Hadamard matrix of an order that has none."""

    @property
    def unties(self) -> bool:
        """See Rotation."""
        return self.residual

    def check(self, skeleton: Skeleton) -> None:
        """ModelError, WeightError where this model cannot be rotated so; nothing was read or edited."""
        if self.residual:
            check_stream(skeleton)
            self._stream(skeleton)
        if self.heads:
            self._values(skeleton)
        for online in self.online_inputs(skeleton).values():
            online_rotation(online)

    def rotate_outside(self, skeleton: Skeleton, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Embeddings, last norm and head: path -> new value, in the dtype of what `read` gives."""
        return turned_outside(skeleton, read, self._stream(skeleton).apply) if self.residual else {}

    def rotate_block(self, skeleton: Skeleton, block: nn.Module) -> None:
        """Edit a block, whose parameters are float64, in place."""
        found = wiring(block, skeleton)
        if self.residual:
            turn_stream(found, self._stream(skeleton).apply)
        if self.heads:
            turn_values(found, self._values(skeleton).apply)
        for name, online in self._inputs(found).items():
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            turn_inputs(linear, online_rotation(online).apply)

    def online_inputs(self, skeleton: Skeleton) -> dict[str, OnlineHadamard]:
        """Path of a linear -> what is done to its input at run time."""
        prefix = skeleton.blocks_name
        return {
            f"{prefix}.{index}.{name}": online
            for index, block in enumerate(skeleton.blocks)
            for name, online in self._inputs(wiring(block, skeleton)).items()
        }

    def _inputs(self, found: Wiring) -> dict[str, OnlineHadamard]:
        after = {name: found.writers[name] for link in found.values for name in link.readers}
        chosen = (found.down if "down" in self.online else {}) | (after if "out" in self.online else {})
        return {name: self._online(linear.in_features) for name, linear in chosen.items()}

    def _online(self, size: int) -> OnlineHadamard:
        return OnlineHadamard(size=size, fallback=self.fallback == "orthogonal")

    def _stream(self, skeleton: Skeleton) -> Orthogonal:
        width = skeleton.config.get_text_config().hidden_size
        return rotation(width, self.seed, fallback=self.fallback == "orthogonal", keep_sum=keeps_mean(skeleton))

    def _values(self, skeleton: Skeleton) -> Orthogonal:
        return rotation(skeleton.heads[2], self.seed, fallback=self.fallback == "orthogonal")
