"""The column solver against an oracle that knows no Cholesky factor, and the kernel against the reference."""

import importlib
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from closeness import relative_error
from halfbyte.errors import CalibrationError, RecipeError, WeightError
from halfbyte.solvers import columns
from halfbyte.solvers.columns import Segment, reference, round_columns, round_segment, triton_kernel


class Problem(NamedTuple):
    weight: Tensor
    spread: Tensor
    scales: Tensor
    zero_points: Tensor | None
    low: int
    high: int


def hessian(width: int, seed: int = 0) -> Tensor:
    """Of strongly correlated inputs, damped by a hundredth."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * width + 8, width, generator=g, dtype=torch.float64)
    inputs = inputs @ torch.randn(width, width, generator=g, dtype=torch.float64) + 3 * inputs[:, :1]
    gram = inputs.T @ inputs / len(inputs)
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)


def factor(matrix: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(matrix), upper=True)


def problem(
    outs: int, width: int, *, bits: int = 4, zeros: bool = False, dtype=torch.float64, seed: int = 0
) -> Problem:
    """Signed weights, a few of them beyond the grid; a scale for every element; zero points around the middle."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(outs, width, generator=g, dtype=torch.float64)
    scales = (torch.rand(outs, width, generator=g, dtype=torch.float64) + 0.5) * 4 / 2**bits
    middle, quarter = 2 ** (bits - 1), 2 ** (bits - 2)
    zero_points = torch.randint(middle - quarter, middle + quarter, (outs, width), generator=g).to(dtype)
    low = 0 if zeros else -middle
    spread = factor(hessian(width)).to(dtype)
    return Problem(weight.to(dtype), spread, scales.to(dtype), zero_points if zeros else None, low, low + 2**bits - 1)


def nearest(weight: Tensor, scales: Tensor, zero_points: Tensor | None, low: int, high: int) -> Tensor:
    """Plain rounding: the codes."""
    return torch.round(weight / scales + (0 if zero_points is None else zero_points)).clamp(low, high)


def brain_surgeon(weight, matrix, scales, zero_points, low, high) -> Tensor:
    """Optimal Brain Quantization from left to right: the codes, by an inverse Hessian that shrinks (OBC, §3)."""
    weight, inverse, codes = weight.clone(), torch.linalg.inv(matrix), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        zero = torch.zeros(len(weight)) if zero_points is None else zero_points[:, j]
        codes[:, j] = nearest(weight[:, j], scales[:, j], zero, low, high)
        error = weight[:, j] - (codes[:, j] - zero) * scales[:, j]
        weight = weight - torch.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # gone; any number will do
    return codes


def output_loss(difference: Tensor, matrix: Tensor) -> Tensor:
    return ((difference @ matrix) * difference).sum(1)


SHAPES = [(1, 1), (7, 7), (33, 32), (7, 128)]


class TestSegment:
    def test_an_error_moves_the_next_column(self):
        weight, spread = torch.tensor([[0.6, 0.4]]), torch.tensor([[2.0, 2.0], [0.0, 0.5]])
        solved = round_segment(weight, spread, torch.ones(1, 2), None, -8, 7)
        assert solved.codes.tolist() == [[1, 1]]  # 0.4 became 0.8
        assert solved.rounded.tolist() == [[1.0, 1.0]]
        torch.testing.assert_close(solved.errors, torch.tensor([[-0.2, -0.4]]))

    @pytest.mark.parametrize("solve", [reference.round_segment, triton_kernel.round_segment])
    def test_ties_go_to_even(self, solve):
        weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, 7.5]])
        solved = solve(weight, torch.eye(8), torch.ones(1, 8), None, -8, 7)
        assert solved.codes.tolist() == [[0, 2, 2, 0, -2, -2, 6, 7]]

    @pytest.mark.parametrize("solve", [reference.round_segment, triton_kernel.round_segment])
    @pytest.mark.parametrize(
        ("low", "high", "dtype"),
        [(-2, 1, torch.int8), (-8, 7, torch.int8), (0, 15, torch.int8), (-128, 127, torch.int8), (0, 255, torch.uint8)],
    )
    def test_every_code_occurs_and_what_lies_beyond_is_clamped(self, solve, low, high, dtype):
        wanted = torch.arange(low - 2, high + 3, dtype=torch.float32)[:, None] - 9
        solved = solve(
            wanted * 0.25, torch.ones(1, 1), torch.full_like(wanted, 0.25), torch.full_like(wanted, 9), low, high
        )
        assert solved.codes.dtype == dtype
        assert solved.codes.flatten().tolist() == [low, low, *range(low, high + 1), high, high]
        assert torch.equal(solved.rounded, (solved.codes.float() - 9) * 0.25)

    @pytest.mark.parametrize("zeros", [False, True])
    @pytest.mark.parametrize("width", [1, 7, 32])
    def test_the_codes_are_the_brain_surgeons(self, width, zeros):
        case = problem(33, width, zeros=zeros)
        expected = brain_surgeon(case.weight, hessian(width), *case[2:])
        assert torch.equal(round_segment(*case).codes, expected)

    @given(outs=st.integers(1, 9), width=st.integers(1, 128), bits=st.integers(2, 8), seed=st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def test_without_correlation_it_is_plain_rounding(self, outs, width, bits, seed):
        case = problem(outs, width, bits=bits, seed=seed)._replace(spread=torch.eye(width, dtype=torch.float64) * 3)
        solved = round_segment(*case)
        assert torch.equal(solved.codes, nearest(case.weight, *case[2:]))
        assert torch.equal(solved.errors, (case.weight - solved.rounded) / 3)

    @given(outs=st.integers(1, 9), width=st.integers(1, 64), zeros=st.booleans(), seed=st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def test_the_whole_difference_is_the_errors_times_the_spread(self, outs, width, zeros, seed):
        case = problem(outs, width, zeros=zeros, seed=seed)
        solved = round_segment(*case)
        # a product and a difference per column, in the solver and again here, each off by eps/2 of a partial sum
        largest = (case.weight.abs() + solved.rounded.abs() + solved.errors.abs() @ case.spread.abs()).max()
        bound = 2 * (width + 1) * torch.finfo(torch.float64).eps * largest
        assert (solved.errors @ case.spread - (case.weight - solved.rounded)).abs().max() <= bound

    def test_correlated_inputs_lose_less_than_by_plain_rounding(self):
        case = problem(33, 64)
        plain = nearest(case.weight, *case[2:]) * case.scales
        lost, lost_plainly = (
            output_loss(case.weight - rounded, hessian(64)).sum() for rounded in (round_segment(*case).rounded, plain)
        )
        assert lost < lost_plainly / 2

    def test_the_lower_triangle_is_not_read_and_nothing_is_changed(self):
        case = problem(7, 32, zeros=True, dtype=torch.float32)
        poisoned = case._replace(spread=case.spread.masked_fill(torch.ones(32, 32).tril(-1) > 0, torch.nan))
        tensors = [argument for argument in poisoned if isinstance(argument, Tensor)]
        before = [tensor.clone() for tensor in tensors]
        for solve in (reference.round_segment, triton_kernel.round_segment):
            assert_same(solve(*poisoned), reference.round_segment(*case))
            assert all(torch.equal(a.nan_to_num(99), b.nan_to_num(99)) for a, b in zip(before, tensors, strict=True))


def assert_same(result: Segment, expected: Segment) -> None:
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Whatever is allocated and not written is NaN, or a code that no test asks for."""
    empty = torch.empty

    def poisoned(*arguments, **keywords):
        fresh = empty(*arguments, **keywords)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", poisoned)


class TestKernel:
    """Equal, not close: float32 division, product and difference are IEEE in the reference and in the interpreter."""

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("zeros", [False, True])
    @pytest.mark.parametrize(("outs", "width"), SHAPES)
    def test_it_agrees_with_the_reference(self, outs, width, zeros):
        case = problem(outs, width, zeros=zeros, dtype=torch.float32)
        assert_same(triton_kernel.round_segment(*case), reference.round_segment(*case))

    @pytest.mark.parametrize(("block_rows", "warps"), [(8, 1), (16, 1), (64, 8)])
    def test_the_launch_shape_does_not_matter(self, block_rows, warps):
        case = problem(33, 17, dtype=torch.float32)
        result = triton_kernel.round_segment(*case, block_rows=block_rows, warps=warps)
        assert_same(result, reference.round_segment(*case))

    def test_arguments_may_be_views(self):
        whole = problem(7, 40, zeros=True, dtype=torch.float32)
        case = whole._replace(
            weight=whole.weight.t().contiguous().t()[:, 8:27],
            spread=whole.spread[8:27, 8:27],
            scales=whole.scales[:, :1].expand(7, 19),
            zero_points=torch.full((), 5.0).expand(7, 19),
        )
        assert_same(triton_kernel.round_segment(*case), reference.round_segment(*case))


def spread_of_the_hessian(case: Problem) -> Problem:
    return case._replace(spread=torch.linalg.cholesky(hessian(32), upper=True))


def lower_factor(case: Problem) -> Problem:
    return case._replace(spread=torch.linalg.cholesky(torch.linalg.inv(hessian(32))))


def forgotten_division(case: Problem) -> Problem:
    return case._replace(spread=case.spread.clone().fill_diagonal_(1))


def next_row(case: Problem) -> Problem:
    rows = case.spread.roll(-1, 0).triu(1)
    return case._replace(spread=rows + case.spread.diagonal().diag())


def opposite_sign(case: Problem) -> Problem:
    return case._replace(spread=2 * case.spread.diagonal().diag() - case.spread)


def first_row_for_all(case: Problem) -> Problem:
    return case._replace(spread=case.spread[:1].expand(32, 32).triu(1) + case.spread.diagonal().diag())


def scales_of_the_next_column(case: Problem) -> Problem:
    return case._replace(scales=case.scales.roll(-1, 1))


def forgotten_zero_points(case: Problem) -> Problem:
    return case._replace(zero_points=None)


def short_by_a_code(case: Problem) -> Problem:
    return case._replace(high=case.high - 1)


BUGS = [
    spread_of_the_hessian, lower_factor, forgotten_division, next_row, opposite_sign, first_row_for_all,
    scales_of_the_next_column, forgotten_zero_points, short_by_a_code,
]  # fmt: skip


class TestPlantedBugs:
    """A gate that no bug can fail is no gate: the comparison with the brain surgeon's codes turns red for each."""

    @pytest.mark.parametrize("bug", BUGS)
    def test_the_comparison_notices(self, bug):
        case = problem(33, 32, zeros=True)
        expected = brain_surgeon(case.weight, hessian(32), *case[2:])
        assert not torch.equal(round_segment(*bug(case)).codes, expected)

    @pytest.mark.parametrize("instead", [torch.trunc, torch.floor, lambda x: torch.floor(x + 0.5)])
    def test_the_comparison_notices_another_rounding(self, instead, monkeypatch):
        weight = torch.tensor([[0.5, 1.7, -1.7, 2.5]], dtype=torch.float64)
        case = Problem(weight, torch.eye(4, dtype=torch.float64), torch.ones_like(weight), None, -8, 7)
        assert round_segment(*case).codes.tolist() == [[0, 2, -2, 2]]
        monkeypatch.setattr(torch, "round", instead)
        assert round_segment(*case).codes.tolist() != [[0, 2, -2, 2]]


def fixed(case: Problem):
    return lambda start, stop, current: (
        case.scales[:, start:stop],
        None if case.zero_points is None else case.zero_points[:, start:stop],
    )


def solve_whole(case: Problem, segment: int, grid=None, **keywords):
    return round_columns(case.weight, case.spread, grid or fixed(case), segment, case.low, case.high, **keywords)


class TestColumns:
    @pytest.mark.parametrize("segment", [1, 7, 32, 128])
    def test_the_cut_into_segments_and_batches_does_not_matter(self, segment, monkeypatch):
        case = problem(7, 150, zeros=True)
        expected = reference.round_segment(*case)  # the reference takes any width
        for batch in (1, 64, 512):
            monkeypatch.setattr(columns, "BATCH", batch)
            solved = solve_whole(case, segment)
            assert torch.equal(solved.codes, expected.codes)
            assert torch.equal(solved.rounded, expected.rounded)

    def test_the_loss_is_half_the_output_loss(self):
        case = problem(33, 100)
        solved = solve_whole(case, 32)
        expected = output_loss(case.weight - solved.rounded, hessian(100)) / 2
        assert solved.loss.shape == (33,)
        assert relative_error(solved.loss, expected) < 1e-9  # the condition of H, about 1e5, times eps, and room

    def test_the_grid_is_asked_with_the_weights_as_updated(self):
        case = problem(7, 70)
        asked = []

        def grid(start, stop, current):
            asked.append((start, stop))
            before = slice(0, start)
            errors = torch.linalg.solve_triangular(
                case.spread[before, before], case.weight[:, before] - so_far[:, before], upper=True, left=False
            )
            torch.testing.assert_close(current, case.weight[:, start:stop] - errors @ case.spread[before, start:stop])
            scales = current.abs().amax(1, keepdim=True).expand_as(current) / 7
            solved = round_segment(current, case.spread[start:stop, start:stop], scales, None, case.low, case.high)
            so_far[:, start:stop] = solved.rounded
            return scales, None

        so_far = torch.empty_like(case.weight)
        assert torch.equal(solve_whole(case, 32, grid).rounded, so_far)
        assert asked == [(0, 32), (32, 64), (64, 70)]

    def test_arguments_stay_as_they_were(self):
        case = problem(7, 70)
        weight, spread = case.weight.clone(), case.spread.clone()
        solve_whole(case, 32)
        assert torch.equal(case.weight, weight)
        assert torch.equal(case.spread, spread)

    def test_float32_codes_are_those_of_float64_but_beside_ties(self):
        double, single = (problem(33, 64, zeros=True, dtype=dtype) for dtype in (torch.float64, torch.float32))
        assert (solve_whole(single, 32).codes == solve_whole(double, 32).codes).double().mean() > 0.99

    @pytest.mark.parametrize(("tf32", "inside"), [(False, "ieee"), (True, "tf32")])
    @pytest.mark.parametrize("outside", ["none", "ieee", "tf32"])
    def test_the_precision_of_products_is_set_for_the_products_only(self, tf32, inside, outside, monkeypatch):
        matmul, addmm_, seen = torch.backends.cuda.matmul, Tensor.addmm_, []

        def watched(*arguments, **keywords):
            seen.append(matmul.fp32_precision)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return addmm_(*arguments, **keywords)

        monkeypatch.setattr(Tensor, "addmm_", watched)
        at_first = matmul.fp32_precision
        matmul.fp32_precision = outside  # not by monkeypatch, which takes this attribute for a missing one
        try:
            with pytest.raises(KeyboardInterrupt):
                solve_whole(problem(1, 100), 32, tf32=tf32)
            assert matmul.fp32_precision == outside
        finally:
            matmul.fp32_precision = at_first
        assert set(seen) == {inside}


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"spread": torch.eye(6)}, WeightError, r"needs a spread of \[7, 7\], not \[6, 6\]"),
            ({"scales": torch.ones(3, 1)}, WeightError, r"scales \[3, 1\] must be expanded to the segment's \[3, 7\]"),
            ({"zero_points": torch.ones(7)}, WeightError, "zero_points .* must be expanded"),
            ({"scales": torch.ones(3, 7).double()}, WeightError, "scales is torch.float64 on cpu"),
            ({"weight": torch.ones(3, 7).half()}, WeightError, "float32 or float64, not torch.float16"),
            ({"weight": torch.ones(3, 129)}, WeightError, "a segment of 129 columns"),
            ({"low": -8, "high": 255}, RecipeError, "codes -8..255 fit neither int8 nor uint8"),
            ({"low": 3, "high": 2}, RecipeError, "codes 3..2"),
        ],
    )
    def test_a_segment_that_does_not_fit_is_refused(self, change, error, message):
        case = problem(3, 7, dtype=torch.float32)._replace(**change)
        with pytest.raises(error, match=message):
            round_segment(*case)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"weight": torch.full((3, 7), torch.nan)}, WeightError, "NaN or Inf"),
            ({"weight": torch.full((3, 7), torch.inf)}, WeightError, "NaN or Inf"),
            ({"spread": -torch.eye(7)}, CalibrationError, "reaches -1 and must be positive"),
            ({"spread": torch.eye(7) * torch.nan}, CalibrationError, "reaches nan"),
            ({"spread": torch.eye(8)}, WeightError, r"\[7, 7\], not \[8, 8\]"),
            ({"scales": torch.zeros(3, 7)}, WeightError, "scale that is zero, negative or NaN"),
        ],
    )
    def test_a_weight_that_cannot_be_solved_is_refused(self, change, error, message):
        case = problem(3, 7, dtype=torch.float32)._replace(**change)
        with pytest.raises(error, match=message):
            solve_whole(case, 4)

    @pytest.mark.parametrize("segment", [0, -1, 129])
    def test_a_segment_length_outside_the_kernels_is_refused(self, segment):
        with pytest.raises(RecipeError, match="choose 1 to 128"):
            solve_whole(problem(3, 7), segment)


def test_the_package_can_be_imported_without_triton(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton" or "halfbyte.solvers" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert importlib.import_module("halfbyte.solvers").round_columns
    with pytest.raises(ImportError, match="triton"):
        importlib.import_module("halfbyte.solvers.columns.triton_kernel")
