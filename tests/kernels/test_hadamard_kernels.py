"""The rotation of tokens: op, CPU form and Triton kernel against the dense matrix in float64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from closeness import relative_error
from halfbyte.errors import WeightError
from halfbyte.kernels.hadamard import cpu, hadamard, hadamard_quantize, reference, triton_kernel
from halfbyte.kernels.hadamard.triton_kernel import shape_of
from halfbyte.numerics.hadamard import factored
from halfbyte.numerics.rotation import random_orthogonal, random_signs, rotation

SIZES = [1, 2, 16, 12, 48, 344, 896, 1024]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = {"cpu": cpu.hadamard, "triton": triton_kernel.hadamard}


def drawn(tokens, ins, dtype=torch.float32, seed=0):
    """Signed, with a loud channel and a token of zeros."""
    x = torch.randn(tokens, ins, generator=torch.Generator().manual_seed(seed))
    x[:, ins // 2] *= 50
    x[tokens // 2] = 0
    return x.to(dtype)


def parts(ins, seed=None):
    signs = None if seed is None else random_signs(ins, seed).to(torch.int8)
    return factored(ins)[1], signs


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("ins", SIZES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_the_product_with_the_dense_matrix(form, ins, seed):
    x, (core, signs) = drawn(3, ins), parts(ins, seed)
    assert relative_error(form(x, core, signs), reference.hadamard(x, core, signs)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [hadamard, partial(triton_kernel.hadamard, wide=True)], ids=["op", "triton"])
def test_it_is_rounded_once_to_the_dtype_of_the_tokens(form, dtype):
    x, (core, signs) = drawn(5, 96, dtype), parts(96, 1)
    found = form(x, core, signs)
    assert found.dtype == dtype
    assert relative_error(found, reference.hadamard(x, core, signs)) < torch.finfo(dtype).eps


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_core_of_real_numbers_is_applied_as_it_is(form):
    core = random_orthogonal(23, 0).float()
    x = drawn(3, 92)
    assert relative_error(form(x, core, None), reference.hadamard(x, core)) < 1e-6
    assert relative_error(form(x, core, None), rotation(92, None, fallback=True).apply(x)) < 1e-6


def test_it_is_the_rotation_that_was_folded():
    for ins in (48, 344, 512):
        x, (core, signs) = drawn(3, ins), parts(ins, 9)
        assert relative_error(hadamard(x, core, signs), rotation(ins, 9).apply(x)) < 1e-6


@settings(max_examples=25, deadline=None)
@given(ins=st.sampled_from([2, 12, 40, 64, 224]), tokens=st.integers(0, 5), seed=st.integers(0, 99))
def test_lengths_are_kept(ins, tokens, seed):
    x, (core, signs) = torch.randn(tokens, ins, generator=torch.Generator().manual_seed(seed)), parts(ins, seed)
    assert torch.allclose(hadamard(x, core, signs).norm(dim=1), x.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("ins", [12, 48, 384])
@pytest.mark.parametrize("form", [hadamard_quantize, triton_kernel.hadamard_quantize], ids=["op", "triton"])
def test_fused_codes_are_those_of_the_rotated_tokens(form, ins, clip, bits):
    x, (core, signs) = drawn(5, ins), parts(ins, 2)
    codes, scales = form(x, core, signs, bits, clip)
    expected, steps = reference.quantize(reference.hadamard(x, core, signs), bits, clip)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
    torch.testing.assert_close(scales, steps, rtol=1e-5, atol=0)
    off = (codes.int() - expected.int()).abs()  # a value may lie half way between two codes
    assert int(off.max()) <= 1
    assert float(off.float().mean()) < 0.01


def test_a_token_of_zeros_has_scale_one_and_no_tokens_have_no_codes():
    core, _ = parts(12)
    for form in (hadamard_quantize, triton_kernel.hadamard_quantize):
        codes, scales = form(torch.zeros(2, 12), core, None, 8, 1.0)
        assert not codes.any()
        assert scales.tolist() == [1, 1]
        assert form(torch.zeros(0, 12), core, None, 8, 1.0)[0].shape == (0, 12)


def test_leading_axes_are_kept():
    core, _ = parts(12)
    x = drawn(6, 12)
    assert torch.equal(hadamard(x.view(2, 3, 12), core), hadamard(x, core).view(2, 3, 12))


@pytest.mark.parametrize("ins", [12, 344, 4096, 11008, 14336, 28672, 29568, 32768, 53248])
def test_every_size_of_known_models_fits_a_program(ins):
    power, core = factored(ins)
    shape = shape_of(ins, len(core))
    assert shape.rows * shape.columns == ins == power * len(core)
    assert shape.first * shape.second == shape.rows
    assert shape.second == 1 or min(shape.first, shape.second) >= 16  # sides of products on the tensor cores
    assert shape.padded_columns % shape.chunk == 0


def test_two_steps_from_the_left_are_one():
    """More rows than one left matrix has."""
    ins = 32768
    x, (core, _) = drawn(2, ins), parts(ins)
    assert shape_of(ins, 1).second > 1
    assert relative_error(triton_kernel.hadamard(x, core, None), cpu.hadamard(x, core, None)) < 1e-6
    codes, scales = triton_kernel.hadamard_quantize(x, core, None, 8, 1.0)
    expected, steps = hadamard_quantize(x, core)
    torch.testing.assert_close(scales, steps, rtol=1e-5, atol=0)
    assert float((codes != expected).float().mean()) < 0.001


def test_a_token_that_no_program_holds_is_refused():
    with pytest.raises(WeightError, match="a program holds 16384"):
        shape_of(2**20, 1)


@pytest.mark.parametrize(
    ("x", "core", "signs", "message"),
    [
        (torch.zeros(2, 12, dtype=torch.int8), torch.ones(12, 12), None, "x is torch.int8"),
        (torch.zeros(2, 2, 12), torch.ones(12, 12), None, r"x is .*\[2, 2, 12\]"),
        (torch.zeros(2, 24), torch.ones(12, 4), None, r"the core is .*\[12, 4\]"),
        (torch.zeros(2, 36), torch.ones(12, 12), None, "36 columns and the core 12"),
        (torch.zeros(2, 12), torch.ones(24, 24), None, "12 columns and the core 24"),
        (torch.zeros(2, 12), torch.ones(12, 12), torch.ones(12), "the signs are torch.float32"),
        (torch.zeros(2, 12), torch.ones(12, 12), torch.ones(6, dtype=torch.int8), r"the signs are .*\[6\]"),
    ],
)
def test_arguments_that_disagree_are_refused(x, core, signs, message):
    with pytest.raises(WeightError, match=message):
        torch.ops.halfbyte.hadamard(x, core, signs)


@pytest.mark.parametrize(("bits", "clip"), [(9, 1.0), (1, 1.0), (8, 0.0), (8, 1.5)])
def test_a_grid_that_there_is_not_is_refused(bits, clip):
    with pytest.raises(WeightError, match="bits over"):
        hadamard_quantize(torch.zeros(2, 12), torch.ones(12, 12), None, bits, clip)


def test_the_ops_can_be_compiled_and_faked():
    core, signs = parts(48, 1)
    x = drawn(3, 48)
    torch.library.opcheck(torch.ops.halfbyte.hadamard.default, (x, core, signs))
    torch.library.opcheck(torch.ops.halfbyte.hadamard_quantize.default, (x, core, None, 4, 0.9))


def wrong_signs(monkeypatch):
    monkeypatch.setattr(cpu, "sylvester", lambda order: torch.ones(order, order))


def unscaled(monkeypatch):
    monkeypatch.setattr(cpu, "sqrt", lambda _number: 1.0)


def transposed_grid(monkeypatch):
    original = cpu.hadamard
    monkeypatch.setattr(cpu, "hadamard", lambda x, core, signs: original(x, core.T.contiguous(), signs))


@pytest.mark.parametrize("bug", [wrong_signs, unscaled, transposed_grid])
def test_a_planted_bug_is_noticed(bug, monkeypatch):
    x, (core, signs) = drawn(3, 48), parts(48, 1)
    bug(monkeypatch)
    assert relative_error(hadamard(x, core, signs), reference.hadamard(x, core, signs)) > 0.1


def kernel_without_signs(monkeypatch):
    original = triton_kernel._launch
    monkeypatch.setattr(triton_kernel, "_launch", lambda x, core, _signs, _wide: original(x, core, None))


@pytest.mark.parametrize("bug", [kernel_without_signs])
def test_a_planted_bug_in_the_kernel_is_noticed(bug, monkeypatch):
    x, (core, signs) = drawn(3, 48), parts(48, 1)
    bug(monkeypatch)
    assert relative_error(triton_kernel.hadamard(x, core, signs), reference.hadamard(x, core, signs)) > 0.1


def test_matrices_are_kept_by_core_and_a_changed_core_gets_its_own():
    core, x = random_orthogonal(3, 0).float(), drawn(3, 12)
    first = triton_kernel.hadamard(x, core, None)
    core.copy_(random_orthogonal(3, 1))
    assert relative_error(triton_kernel.hadamard(x, core, None), reference.hadamard(x, core)) < 1e-6
    assert relative_error(first, triton_kernel.hadamard(x, core, None)) > 0.1


def test_half_precision_goes_to_the_tensor_cores_as_it_is():
    x, (core, signs) = drawn(5, 96, torch.float16), parts(96, 1)
    found = triton_kernel.hadamard(x, core, signs)
    assert relative_error(found, reference.hadamard(x, core, signs)) < torch.finfo(torch.float16).eps
