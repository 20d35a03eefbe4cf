"""What a growing cache is made of: tensors that grow by rows, and the rotation of every token."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from halfbyte.kernels.kv_attention import KeyRotation

FEWEST_ROWS = 64  # that a buffer grows by
SHARE = 16  # or by this fraction of itself

Rotation = tuple[Float[Tensor, "batch tokens rotated"], Float[Tensor, "batch tokens rotated"]]
"""Cosines and sines of a call's tokens."""


class Rows:
    """A tensor that grows along one axis."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.length = 0
        self.buffer: Tensor | None = None

    @property
    def taken(self) -> Tensor:
        """What has been appended."""
        assert self.buffer is not None
        return self.buffer.narrow(self.axis, 0, self.length)

    def append(self, rows: Tensor) -> None:
        """Copy rows to the end."""
        count, capacity = rows.shape[self.axis], 0 if self.buffer is None else self.buffer.shape[self.axis]
        if self.length + count > capacity:
            wanted = max(self.length + count, capacity + capacity // SHARE)
            shape = list(rows.shape)
            shape[self.axis] = -(-wanted // FEWEST_ROWS) * FEWEST_ROWS
            grown = rows.new_zeros(shape)
            if self.buffer is not None:
                grown.narrow(self.axis, 0, self.length).copy_(self.taken)
            self.buffer = grown
        assert self.buffer is not None
        self.buffer.narrow(self.axis, self.length, count).copy_(rows)
        self.length += count

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the buffer by what `change` makes of it; only its batch axis may become another."""
        if self.buffer is not None:
            self.buffer = change(self.buffer)

    @property
    def nbytes(self) -> int:
        return 0 if self.buffer is None else self.buffer.nbytes


class Rotations:
    """Cosines and sines of every cached token, shared by the layers that rotate alike."""

    def __init__(self, near: Float[Tensor, "2 near half"]) -> None:
        """`near`: of 0, 1, ... tokens further, where attention reads codes (static_rotations.py)."""
        self.cos, self.sin, self.near = Rows(1), Rows(1), near

    def extend(self, rotation: Rotation, seen: int) -> None:
        """Append the rotation of the tokens after the first `seen`, unless another layer has."""
        if self.cos.length == seen:
            self.cos.append(rotation[0])
            self.sin.append(rotation[1])

    def of(self, first: int, last: int) -> Rotation:
        """Of the tokens first .. last - 1."""
        return self.cos.taken[:, first:last], self.sin.taken[:, first:last]

    def of_packed(self, first: int, last: int, batch: int) -> KeyRotation:
        """Of the tokens first .. last - 1, as kernels read them."""
        half = self.near.shape[2]
        cos, sin = (part[..., :half].expand(batch, -1, -1).contiguous() for part in self.of(first, last))
        return KeyRotation(cos, sin, self.near)

    def crop(self, length: int) -> None:
        self.cos.length = self.sin.length = min(length, self.cos.length)

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        for rows in (self.cos, self.sin):
            if rows.buffer is not None and rows.buffer.shape[0] > 1:  # 1: the same for the whole batch
                rows.change(change)

    @property
    def nbytes(self) -> int:
        return self.cos.nbytes + self.sin.nbytes
