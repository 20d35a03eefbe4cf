"""How launches of prepared 4-bit weights are cut up: every tiling fits a multiprocessor, and stands where it is for."""

from itertools import chain, product

import pytest

from halfbyte.kernels import crews
from halfbyte.kernels.w4a16 import tilings
from halfbyte.kernels.w4a16.tilings import Block, Stream, Streamed, Tiling

SHARED_MEMORY = 227 * 1024  # of a Hopper multiprocessor


@pytest.mark.parametrize("outs", [64, 4096, 4224, 4288, 16384, 25344, 28672, 151936])
@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 16, 17, 32, 33, 100, 1000, 5000, 100_000])
def test_every_number_of_tokens_has_a_tiling_that_fits_it(tokens: int, outs: int) -> None:
    kinds = product((128, 4096, 14336), ((128, True), (128, False), (64, True)))
    for tiling in {tilings.choose(tokens, outs, ins, *kind) for ins, kind in kinds}:
        assert tokens <= tiling.block_m or isinstance(tiling, Block)
        assert shared_memory(tiling) <= SHARED_MEMORY


@pytest.mark.parametrize("tiling", dict.fromkeys(filter(None, chain(*tilings.STREAMED))), ids=str)
def test_streamed_programs_fit_beside_others(tiling: Streamed) -> None:
    assert tiling.residents * (tiling.shared_memory + 1024) <= SHARED_MEMORY
    assert tiling.residents * (tiling.launch_registers or 0) * 32 * tiling.warps <= crews.REGISTERS
    assert tiling.fold == 1 or not tiling.beside
    given_up = (tiling.workers + 1) * (tiling.launch_registers or 0) - crews.LOADER
    assert tiling.workers * tiling.worker_registers <= given_up
    # the sums, those of a step, and the rest
    assert tiling.worker_registers >= tiling.block_m * tiling.fold // 2 * (tiling.units + 1) + 48
    # a slot belongs to one crew, which so sees all of its phases
    assert tiling.stages % tiling.turns == 0
    assert tiling.block_m * tiling.fold >= 8


@pytest.mark.parametrize(
    ("tokens", "outs", "ins", "tiling"),
    [
        (4, 4096, 4096, Streamed(4, 2, 2, 2, 8, 2)),
        (5, 4224, 8192, Streamed(8, 2, 2, 1, 12, 2)),
        (16, 2112, 4096, Streamed(16, 2, 1, 2, 4, 2)),
        (32, 8448, 4096, Streamed(32, 2, 1, 2, 2, 2)),
        (1, 16896, 14336, Streamed(8, 1, 2, 2, 8, 2)),
        (1, 25344, 8192, Streamed(8, 1, 1, 2, 5, 3)),
        (1, 25352, 8192, Streamed(8, 1, 2, 2, 5, 2, beside=True)),
        (16, 16904, 4096, Streamed(16, 1, 1, 2, 4, 3)),
    ],
)
def test_symmetric_groups_of_128_stream_where_that_is_faster(
    tokens: int, outs: int, ins: int, tiling: Streamed
) -> None:
    assert tilings.choose(tokens, outs, ins, 128, symmetric=True) == tiling
    for other in ((128, False), (64, True)):
        assert isinstance(tilings.choose(tokens, outs, ins, *other), Stream if tokens <= 16 else Block)


@pytest.mark.parametrize(("outs", "ins"), [(2048, 4096), (4096, 8320), (8448, 8320)])
def test_where_programs_would_not_fill_the_chip_nothing_is_streamed_so(outs: int, ins: int) -> None:
    assert isinstance(tilings.choose(1, outs, ins, 128, symmetric=True), Stream)
    assert tilings.stream_tokens(outs, ins, 128, symmetric=True) == 16


@pytest.mark.parametrize(
    ("run", "group_size", "ins", "fits"),
    [(2, 128, 4096, 2), (2, 64, 4096, 1), (2, 32, 4096, 1), (2, 384, 768, 2), (2, 96, 96, 2), (1, 64, 128, 1)],
)  # fmt: skip
def test_steps_and_groups_end_together(run: int, group_size: int, ins: int, fits: int) -> None:
    assert tilings.run_of(run, group_size, ins) == fits


def shared_memory(tiling: Tiling) -> int:
    """Bytes of the ring, and of what is staged."""
    if isinstance(tiling, Streamed):
        return tiling.shared_memory
    if isinstance(tiling, Block):
        step = tiling.run * (tiling.block_m * 128 + tiling.workers * tiling.each * 2048)
        return tiling.stages * (step + 16) + tiling.block_m * tiling.workers * tiling.each * 128
    return tiling.stages * tiling.run * tiling.warps * (tiling.block_n * 32 + tiling.block_m * 128)
