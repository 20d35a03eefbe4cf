"""Gluon kernels on the CPU: a Gluon kernel less its layouts is a Triton kernel, and Triton has an interpreter.

`interpreted` loads a module of Gluon kernels a second time with stand-ins for Gluon: `gluon.jit` is `triton.jit`, layouts
are nothing, shared memory is a table of tensors, copies happen at once. Crews of warps are threads, which wait for each
other at barriers as they do on a GPU: a protocol that stalls, or reads a slot that was not filled, fails here.

What this cannot show is what layouts do, and memory that is not ordered. The benchmarks compare every kernel with the
reference on a GPU before they time it.
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from threading import Condition, Thread
from types import ModuleType
from typing import Any
from unittest.mock import patch

import triton.experimental
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

GLUON = "triton.experimental.gluon"
PATIENCE = 60  # seconds until a barrier counts as stuck


class Shared:
    """Cells by their places in the first axis. Reading one that was never written is an error."""

    def __init__(self, cells: dict[int, Any], dtype: Any, at: int = -1, views: tuple[Any, ...] = ()) -> None:
        self.cells, self.dtype, self.at, self.views = cells, dtype, at, views

    def index(self, at: Any) -> "Shared":
        return Shared(self.cells, self.dtype, whole(at))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.cells, self.dtype, self.at, (*self.views, lambda value: tl.permute(value, order)))

    def reshape(self, shape: tuple[Any, ...]) -> "Shared":
        view = (*self.views, lambda value: tl.reshape(value, [whole(size) for size in shape]))
        return Shared(self.cells, self.dtype, self.at, view)

    def slice(self, start: Any, length: Any, dim: Any) -> "Shared":
        start, length = whole(start), whole(length)

        def part(value: Any) -> Any:
            data = value.handle.data.take(range(start, start + length), whole(dim))
            return tl.tensor(TensorHandle(data, value.handle.dtype), tl.block_type(value.dtype, list(data.shape)))

        return Shared(self.cells, self.dtype, self.at, (*self.views, part))

    def store(self, value: Any) -> None:
        assert len(self.views) <= 1, "what is written through a permutation of two axes is permuted back by it"
        for view in self.views:
            value = view(value)
        self.cells[self.at] = value

    def load(self, _layout: None = None) -> Any:
        value = self.cells[self.at]
        for view in self.views:
            value = view(value)
        return value


class Barrier:
    """An mbarrier: a phase ends when so many have arrived and all the bytes that were expected."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.missing = arrivals
        self.missing_bytes, self.phase, self.changed = 0, 0, Condition()

    def note(self, arrived: int = 0, expected: int = 0) -> None:
        with self.changed:
            self.missing -= arrived
            self.missing_bytes += expected
            if self.missing == 0 and self.missing_bytes == 0:
                self.phase, self.missing = self.phase ^ 1, self.arrivals
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase != phase, PATIENCE), "stuck at a barrier"


class Interpreted(InterpretedFunction):
    """As Triton's own, which replaces the language anew for each call of one kernel function by another."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.rewrite()(*arguments, **options)


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return Interpreted(function) if function else lambda later: Interpreted(later)


class Language(ModuleType):
    """Triton's language under Gluon's name, as it is at the moment: the interpreter replaces it while a kernel runs."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)


def whole(value: Any) -> int:
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)


def load(at: Any, mask: Any = None, other: Any = None, **_options: Any) -> Any:
    # != 0: where the interpreter spreads a truth value over a tensor it makes an integer of it
    return tl.load(at, mask=None if mask is None else mask != 0, other=other)


def fetch(tiles: Any, at: list[Any], barrier: Shared, to: Shared) -> None:
    value = tiles.load(at)
    to.store(value)
    barrier.load().note(expected=-math.prod(value.shape) * value.dtype.primitive_bitwidth // 8)


def specialize(crews: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    failures: list[BaseException] = []

    def work(crew: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            crew(*arguments)
        except BaseException as failure:  # noqa: BLE001 - handed to the thread that waits
            failures.append(failure)

    threads = [Thread(target=work, args=crew, daemon=True) for crew in crews]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not failures:
            thread.join(0.01)
    if failures:
        raise failures[0]


def module_of(**members: Any) -> ModuleType:
    module = ModuleType("stand_in")
    vars(module).update(members)
    return module


def in_float32(operation: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """An operation of the interpreter, which takes bfloat16 for integers, with its operands widened and its result cut off."""

    def compute(builder: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return operation(builder, a, b)
        wide = operation(builder, builder.create_fp_ext(a, tl.float32), builder.create_fp_ext(b, tl.float32))
        return builder.create_fp_trunc(wide, tl.bfloat16)

    return compute


for name in ("create_fadd", "create_fsub", "create_fmul"):
    setattr(InterpreterBuilder, name, in_float32(getattr(InterpreterBuilder, name)))

# a Gluon tensor's type has one, and a kernel may ask for it
tl.block_type.layout = None  # pyright: ignore[reportAttributeAccessIssue]


def stand_ins() -> dict[str, ModuleType]:
    """The modules that our kernels import, by name."""
    language = Language("gl")
    names = "Blocked DotOperand NVMMADistributed Slice SwizzledShared NVMMAShared"
    vars(language).update({f"{name}Layout": lambda *_: None for name in names.split()})
    vars(language).update(
        arange=lambda start, stop, _layout: tl.arange(start, stop),
        full=lambda shape, value, dtype, _layout: tl.full(shape, value, dtype),
        convert_layout=lambda value, _layout, assert_trivial=False: value,
        allocate_shared_memory=lambda dtype, _shape, _layout: Shared({}, dtype),
        barrier=lambda: None,
        load=load,
        warp_specialize=specialize,
    )
    async_copy = module_of(
        async_load=lambda to, at, mask, cache_modifier="": to.store(load(at, mask, 0)),
        commit_group=lambda: None,
        wait_group=lambda _pending: None,
    )
    mbarrier = module_of(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.store(Barrier(count)),
        expect=lambda barrier, size: barrier.load().note(arrived=1, expected=whole(size)),
        arrive=lambda barrier, count: barrier.load().note(arrived=count),
        wait=lambda barrier, phase: barrier.load().wait(whole(phase)),
    )
    tma = module_of(
        async_load=fetch, async_store=lambda to, at, value: to.store(at, value.load()), store_wait=lambda _pending: None
    )

    # the interpreter multiplies bfloat16 by its bits
    def multiply(a: Any, b: Any, sums: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        b = b.load() if isinstance(b, Shared) else b
        if a.dtype == tl.int8:
            product = tl.dot(a, b, out_dtype=tl.int32)
            return sums + product if use_acc else product
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")

    hopper = module_of(
        fence_async_shared=lambda: None, mbarrier=mbarrier, tma=tma, warpgroup_mma=multiply,
        warpgroup_mma_wait=lambda _pending, deps: deps[0] if len(deps) == 1 else deps,
    )  # fmt: skip
    return {
        GLUON: module_of(jit=jit, language=language),
        f"{GLUON}.language": language,
        f"{GLUON}.language.nvidia.ampere": module_of(async_copy=async_copy, mma_v2=multiply),
        f"{GLUON}.language.nvidia.hopper": hopper,
        f"{GLUON}.nvidia.hopper": module_of(TensorDescriptor=lambda *described: TensorDescriptor(*described[:4])),
        "triton.language.extra.cuda": module_of(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None),
    }


def interpreted(module: ModuleType, *needed: ModuleType) -> ModuleType:
    """A copy of the module whose kernels the interpreter runs, and those of what it needs, in the order of their imports."""
    assert module.__spec__ is not None
    assert module.__spec__.origin is not None
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_interpreted", module.__spec__.origin)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    modules = stand_ins()
    for need in needed:
        with patch.dict(sys.modules, modules):
            modules[need.__name__] = interpreted(need)
    with patch.dict(sys.modules, modules), patch.object(triton.experimental, "gluon", modules[GLUON]):
        spec.loader.exec_module(copy)
    # now, as crews that came to it at the same moment would break python's parser
    for kernel in [value for value in vars(copy).values() if isinstance(value, Interpreted)]:
        kernel.rewrite()
    return copy
