"""Experts that run together: loaded from a folder as on a GPU of Hopper's kind, they answer as one by one."""

import pytest
import torch
from packed_folders import packed_folder
from torch import nn

from closeness import relative_error
from halfbyte.errors import WeightError
from halfbyte.models.linearize import ExpertList
from halfbyte.runtime import experts, linear, products
from halfbyte.runtime.experts import JoinedExperts, join_experts
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.runtime.load import load_model
from halfbyte.scheme import ActivationFormat, Convention, FloatScale, PerGroup, WeightFormat
from tiny_models import VARIANTS, tokens

SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
WIDE = dict.fromkeys(SIZES, 128) | {"head_dim": 32}
INT4 = WeightFormat(bits=4, granularity=PerGroup(size=128), scale=FloatScale(dtype="bfloat16"))
TOKEN = ActivationFormat()


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on such a GPU: the ops compute on a CPU."""
    monkeypatch.setattr(products.tensor_cores, "runs_on", lambda _device: True)
    monkeypatch.setattr(linear.tensor_cores, "runs_on", lambda _device: True)
    monkeypatch.setattr(QuantizedLinear, "_torch_pays", lambda _linear: False)


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    variant, format, inputs, overrides = request.param
    model_type, usual = VARIANTS[variant]
    monkeypatch.setitem(VARIANTS, variant, (model_type, usual | WIDE | overrides))
    return packed_folder(tmp_path, variant, format, activations=inputs)[0]


def case(variant: str, format: WeightFormat, inputs: ActivationFormat | None, **overrides: object):
    return variant, format, inputs, overrides


def mixtures(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, ExpertList | JoinedExperts)]


def linears_of_experts(model: nn.Module) -> list[str]:
    kinds = QuantizedLinear | IntegerLinear
    return [path for path, part in model.named_modules() if isinstance(part, kinds) and ".experts." in path]


JOINED = {
    "mixtral W4A8": case("mixtral", INT4, TOKEN),
    "mixtral W4A16": case("mixtral", INT4, None),
    "qwen2_moe W4A8": case("qwen2_moe", INT4, TOKEN),
    "qwen3_moe W4A16": case("qwen3_moe", INT4, None),
}


@pytest.mark.parametrize("folder", JOINED.values(), ids=JOINED, indirect=True)
@pytest.mark.usefixtures("_hopper")
def test_a_loaded_mixture_runs_its_experts_together(folder, monkeypatch) -> None:
    together = load_model(folder, device="cpu", dtype=torch.bfloat16)
    monkeypatch.setattr(experts, "_together", lambda _experts: None)
    apart = load_model(folder, device="cpu", dtype=torch.bfloat16)
    found = mixtures(together)
    assert found
    assert all(isinstance(part, JoinedExperts) for part in found)
    assert not linears_of_experts(together)
    assert linears_of_experts(apart)
    one, other = mixtures(together)[0], mixtures(apart)[0]
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = torch.rand(9, 4, generator=torch.Generator().manual_seed(1)).topk(2).indices
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(2))
    # a gate on the other side of a rounding boundary moves a code
    assert relative_error(one(x, index, weights), other(x, index, weights)) < 5e-3
    assert relative_error(together(tokens()).logits, apart(tokens()).logits) < 5e-2


LEFT = {
    "zero points": case("mixtral", INT4.model_copy(update={"convention": Convention.ASYMMETRIC}), None),
    "small groups": case("mixtral", INT4.model_copy(update={"granularity": PerGroup(size=64)}), None),
    "static inputs": case("mixtral", INT4, ActivationFormat(granularity="tensor", dynamic=False)),
    "odd outputs": case(
        "mixtral", INT4.model_copy(update={"granularity": PerGroup(size=8)}), None, intermediate_size=72
    ),
    "gelu": case("mixtral", INT4, TOKEN, hidden_act="gelu"),
}


@pytest.mark.parametrize("folder", LEFT.values(), ids=LEFT, indirect=True)
@pytest.mark.usefixtures("_hopper")
def test_what_the_kernels_do_not_take_runs_one_by_one(folder) -> None:
    model = load_model(folder, device="cpu", dtype=torch.bfloat16)
    assert all(isinstance(part, ExpertList) for part in mixtures(model))
    assert linears_of_experts(model)


@pytest.mark.parametrize("folder", [JOINED["mixtral W4A8"]], ids=["mixtral"], indirect=True)
def test_a_cpu_runs_experts_one_by_one(folder) -> None:
    assert all(isinstance(part, ExpertList) for part in mixtures(load_model(folder, device="cpu")))


@pytest.mark.parametrize("folder", [JOINED["mixtral W4A8"]], ids=["mixtral"], indirect=True)
@pytest.mark.usefixtures("_hopper")
def test_joined_experts_keep_their_scales_when_the_model_is_cast(folder) -> None:
    model = load_model(folder, device="cpu", dtype=torch.bfloat16)
    before = {name: buffer.clone() for name, buffer in mixtures(model)[0].named_buffers()}
    assert join_experts(model) == 0
    model.half()
    after = dict(mixtures(model)[0].named_buffers())
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(WeightError, match=r"torch\.float16 and these experts are prepared for torch\.bfloat16"):
        mixtures(model)[0](torch.zeros(1, 128).half(), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))


@pytest.mark.parametrize(
    "folder", [JOINED["mixtral W4A8"], JOINED["mixtral W4A16"]], ids=["W4A8", "W4A16"], indirect=True
)
@pytest.mark.usefixtures("_hopper")
def test_joined_experts_are_one_graph_for_torch_compile(folder) -> None:
    module = mixtures(load_model(folder, device="cpu", dtype=torch.bfloat16))[0]
    x, index = torch.randn(3, 128).bfloat16(), torch.tensor([[0, 1], [4, 2], [1, 0]])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    weights = torch.rand(3, 2)
    assert torch.equal(compiled(x, index, weights), module(x, index, weights))


@pytest.mark.parametrize("folder", [JOINED["mixtral W4A8"]], ids=["mixtral"], indirect=True)
@pytest.mark.usefixtures("_hopper")
def test_joined_experts_are_not_saved_as_if_they_were_a_checkpoint(folder) -> None:
    with pytest.raises(WeightError, match=r"layers\.0.*laid out for running.*copy the folder"):
        load_model(folder, device="cpu", dtype=torch.bfloat16).state_dict()
