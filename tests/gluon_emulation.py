"""Enough of Gluon, in numpy and threads, to run a kernel for Hopper on the CPU: Triton's interpreter does not.

What is asynchronous on the chip happens here as late as it may: a product is computed when a wait demands it, and a
store reads its shared memory then, so that a buffer that is used again too soon gives wrong results. Warps that wait for
each other in vain raise DeadlockError.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

PATIENCE = 10.0  # seconds


class DeadlockError(Exception):
    """A warp waited for a barrier that nobody completes."""


class Block(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype: Any) -> "Block":
        return self.astype(dtype)

    def permute(self, order: Sequence[int]) -> "Block":
        return self.transpose(order)

    def split(self) -> tuple["Block", "Block"]:
        return self[..., 0], self[..., 1]

    @property
    def type(self) -> Any:
        return self

    layout = None


class Pointer:
    """What lies behind a tensor of torch, from its first element on."""

    def __init__(self, memory: np.ndarray, at: Any = 0) -> None:
        self.memory, self.at = memory, at

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.at + offset)


class Descriptor:
    """A matrix that the copy engine moves tiles of."""

    def __init__(self, matrix: np.ndarray, block: Sequence[int]) -> None:
        self.matrix, self.block, self.dtype, self.layout = matrix, tuple(block), matrix.dtype, None


class Shared:
    """Tiles in shared memory."""

    def __init__(self, tiles: np.ndarray) -> None:
        self.tiles = tiles

    def index(self, i: int) -> "Shared":
        assert 0 <= i < len(self.tiles)
        return Shared(self.tiles[i])

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.tiles.transpose(order))

    def store(self, block: np.ndarray) -> None:
        self.tiles[...] = block


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes that it waits for have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def change(self, arrivals: int, missing_bytes: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += missing_bytes
            assert self.missing >= 0
            if not self.missing and not self.bytes:
                self.missing, self.phase = self.count, self.phase + 1
                self.changed.notify_all()


class Barriers(list[Barrier]):
    index = list.__getitem__  # type: ignore[assignment]


class Mbarrier:
    MBarrierLayout = staticmethod(lambda: Barriers)

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    @staticmethod
    def expect(barrier: Barrier, size: int) -> None:
        barrier.change(1, size)

    @staticmethod
    def arrive(barrier: Barrier, pred: bool = True) -> None:
        if pred:
            barrier.change(1, 0)

    @staticmethod
    def wait(barrier: Barrier, parity: int) -> None:
        with barrier.changed:
            if not barrier.changed.wait_for(lambda: barrier.phase % 2 != parity, PATIENCE):
                raise DeadlockError


class Chip:
    """The functions of `gl`, and what a warp has begun and not finished."""

    int8, int32, int64, float32 = np.int8, np.int32, np.int64, np.float32
    constexpr = static_range = staticmethod(lambda value: value)
    NVMMADistributedLayout = SliceLayout = to_tensor = staticmethod(lambda *arguments: arguments[0])

    def __init__(self) -> None:
        self.program, self.programs, self.own = 0, 0, threading.local()
        self.static_range = range

    def program_id(self, axis: int) -> int:
        return self.program

    def num_programs(self, axis: int) -> int:
        return self.programs

    def where(self, condition: bool, then: int, otherwise: int) -> int:
        return then if condition else otherwise

    def zeros(self, shape: Sequence[int], dtype: Any, layout: Any) -> Block:
        return np.zeros(shape, dtype).view(Block)

    def arange(self, start: int, stop: int, layout: Any) -> Block:
        return np.arange(start, stop, dtype=np.int32).view(Block)

    def convert_layout(self, block: Block, layout: Any, assert_trivial: bool) -> Block:
        return block

    def load(self, pointer: Pointer, mask: Any = True, other: Any = 0) -> Block:
        at, mask = np.broadcast_arrays(pointer.at, mask)
        loaded = np.full(at.shape, other, pointer.memory.dtype)
        loaded[mask] = pointer.memory[at[mask]]
        return loaded.view(Block)

    def allocate_shared_memory(self, dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if layout is Barriers:
            return Barriers(Barrier() for _ in range(shape[0]))
        return Shared(np.full(shape, 99, dtype))

    def load_tile(self, descriptor: Descriptor, at: Sequence[int], barrier: Barrier, tile: Shared) -> None:
        part = descriptor.matrix[at[0] : at[0] + descriptor.block[0], at[1] : at[1] + descriptor.block[1]]
        tile.tiles[...] = 0
        tile.tiles[: part.shape[0], : part.shape[1]] = part
        barrier.change(0, -tile.tiles.nbytes)

    def store_tile(self, descriptor: Descriptor, at: Sequence[int], tile: Shared) -> None:
        self.own.stores.append((descriptor, at, tile))

    def store_wait(self, pending: int) -> None:
        while len(self.own.stores) > pending:
            descriptor, (row, column), tile = self.own.stores.pop(0)
            part = descriptor.matrix[row : row + descriptor.block[0], column : column + descriptor.block[1]]
            part[...] = tile.tiles[: part.shape[0], : part.shape[1]]

    def mma(self, left: Shared, right: Shared, total: Block, use_acc: bool, is_async: bool) -> Block:
        self.own.products.append((left, right, total, use_acc))
        return total

    def mma_wait(self, pending: int, deps: tuple[Block]) -> Block:
        while len(self.own.products) > pending:
            left, right, total, use_acc = self.own.products.pop(0)
            total *= int(use_acc)
            total += left.tiles.astype(np.int32) @ right.tiles.astype(np.int32)
        return deps[0]

    def warp_specialize(self, parts: Sequence[tuple[Callable[..., None], tuple]], warps: Any, registers: Any) -> None:
        failures: list[BaseException] = []

        def run(function: Callable[..., None], arguments: tuple) -> None:
            self.own.stores, self.own.products = [], []
            try:
                function(*arguments)
                assert not self.own.stores
                assert not self.own.products
            except BaseException as failure:  # noqa: BLE001 - raised below, in the thread of the test
                failures.append(failure)

        threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


class Launcher:
    """`kernel[grid](...)`, one program after the other."""

    def __init__(self, chip: Chip, kernel: Callable[..., None]) -> None:
        self.chip, self.kernel = chip, kernel

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int) -> None:
            self.chip.programs = grid[0]
            for self.chip.program in range(grid[0]):
                self.kernel(*map(as_seen_by_the_kernel, arguments))

        return launch


def as_seen_by_the_kernel(argument: Any) -> Any:
    if hasattr(argument, "block_shape"):
        return Descriptor(argument.base.numpy(), argument.block_shape)
    if isinstance(argument, torch.Tensor):
        everything = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage())
        return Pointer(everything[argument.storage_offset() :].numpy())
    return argument


def emulate(module: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, the kernel of that name in a module that uses Gluon runs here."""
    from triton.language import constexpr
    from triton.runtime.jit import JITFunction

    chip = Chip()
    for name, value in list(vars(module).items()):
        if isinstance(value, JITFunction):
            monkeypatch.setattr(module, name, value.fn if name != kernel else Launcher(chip, value.fn))
        elif isinstance(value, constexpr):
            monkeypatch.setattr(module, name, value.value)
    nothing = lambda *arguments: None  # noqa: E731
    stand_ins = {
        "gl": chip, "mbarrier": Mbarrier, "tma": chip, "warpgroup_mma": chip.mma, "warpgroup_mma_wait": chip.mma_wait,
        "fence_async_shared": nothing, "_barrier": nothing, "_load_tile": chip.load_tile, "_store_tile": chip.store_tile,
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(module, name, value)
