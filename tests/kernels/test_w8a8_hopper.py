"""The int8 matmul for Hopper, its own source run by an emulation of the chip."""

import pytest
import torch
from test_w8a8 import ones, problem

import gluon_emulation
from closeness import assert_close
from gluon_emulation import DeadlockError
from halfbyte.kernels.w8a8 import reference, tiling, triton_hopper


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With three multiprocessors, so that a few tiles already make several rounds."""
    for row_bytes, bits in ((128, 8), (128, 32), (64, 16)):
        triton_hopper._tiled(row_bytes, bits)  # layouts are remembered; the emulation has none
    monkeypatch.setattr(triton_hopper, "processors", lambda device: 3)
    gluon_emulation.emulate(triton_hopper, "_int8_matmul_kernel", monkeypatch)


CUTS = [tiling.Cut(1, 32, 128, 3), tiling.Cut(2, 64, 128, 3), tiling.Cut(3, 32, 128, 4), tiling.Cut(1, 128, 256, 2)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "ins", "outs"), [(1, 16, 8), (64, 128, 32), (65, 272, 40), (200, 1040, 328)],
)  # fmt: skip
def test_sums_are_exact_integers(cut: tiling.Cut, tokens: int, ins: int, outs: int) -> None:
    x, _, weight, *_ = problem(tokens, ins, outs)
    y = triton_hopper.int8_matmul(x, ones(tokens), weight, ones(outs), dtype=torch.float32, cut=cut)
    assert torch.equal(y, (x.long() @ weight.long().T).float())


@pytest.mark.parametrize("static", [False, True], ids=["scale-per-token", "one-scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_everything_optional_agrees_with_the_reference(static: bool, dtype: torch.dtype) -> None:
    arguments = problem(130, 144, 72, whole=True, static=static, dtype=dtype)
    y = triton_hopper.int8_matmul(*arguments, cut=CUTS[1])
    assert_close(y, reference.int8_matmul(*arguments), rounding_steps=4 if dtype == torch.float32 else 1)


def test_rows_may_lie_apart() -> None:
    arguments = problem(66, 144, 40, whole=True)
    assert arguments.residual is not None
    x, residual = torch.full((70, 320), 99, dtype=torch.int8), torch.full((70, 50), float("nan"))
    x, residual = x[2:68, 16:160].copy_(arguments.x), residual[1:67, 3:43].copy_(arguments.residual)
    y = triton_hopper.int8_matmul(*arguments._replace(x=x, residual=residual), cut=CUTS[0])
    assert_close(y, reference.int8_matmul(*arguments))


@pytest.mark.parametrize("tokens", [1, 100])
def test_the_built_in_cut_agrees_with_the_reference(tokens: int) -> None:
    arguments = problem(tokens, 528, 264)
    assert_close(triton_hopper.int8_matmul(*arguments), reference.int8_matmul(*arguments))


def assert_exact(cut: tiling.Cut) -> None:
    x, _, weight, *_ = problem(200, 528, 72)
    y = triton_hopper.int8_matmul(x, ones(200), weight, ones(72), dtype=torch.float32, cut=cut)
    assert torch.equal(y, (x.long() @ weight.long().T).float())


def test_results_overwritten_before_they_left_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation is a gate as well, and every gate is seen red: here a store may still read the only buffer."""
    assert_exact(CUTS[0])
    write = triton_hopper._write
    monkeypatch.setattr(triton_hopper, "_write", lambda *arguments: write(*arguments[:-2], 1, arguments[-1]))
    with pytest.raises(AssertionError):
        assert_exact(CUTS[0])


def test_a_buffer_never_given_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_emulation, "PATIENCE", 0.3)
    monkeypatch.setattr(triton_hopper, "_before", lambda stage, stages: 0)
    with pytest.raises(DeadlockError):
        assert_exact(CUTS[0])
