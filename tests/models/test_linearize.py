"""Linearized blocks compute what they computed, out of nn.Linear alone."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from halfbyte.errors import ModelError
from halfbyte.models.linearize import ExpertList, TransposedLinear, is_router, linearize, unlinearized
from halfbyte.models.tables import ARCHITECTURES
from tiny_models import HIDDEN, VARIANTS, logits, tiny, tokens

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]


def blocks_of(model: Any, model_type: str) -> list[Any]:
    return list(model.get_submodule(ARCHITECTURES[model_type].blocks).children())


def relative_error(result, expected):
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_outputs_stay_and_every_matrix_is_a_linear(model_type, overrides):
    model, ids = tiny(model_type, torch.float64, **overrides), tokens()
    before = logits(model, ids)
    for block in blocks_of(model, model_type):
        linearize(block)
        assert unlinearized(block) == []
        matrices = {id(p) for p in block.parameters() if p.dim() >= 2}
        linear = {id(module.weight) for module in block.modules() if isinstance(module, nn.Linear)}
        routers = {id(module.weight) for module in block.modules() if is_router(module)}
        assert matrices == linear | routers
        assert len(routers) == any(isinstance(module, ExpertList) for module in block.modules())
    assert relative_error(logits(model, ids), before) <= 1e-12


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "qwen2_moe"])
def test_the_meta_device_gives_the_same_names_and_shapes(model_type):
    with torch.device("meta"):
        model = tiny(model_type)
    real = tiny(model_type)
    for block, real_block in zip(blocks_of(model, model_type), blocks_of(real, model_type), strict=True):
        linearize(block)
        linearize(real_block)
        assert all(parameter.is_meta for parameter in block.parameters())
        assert {name: p.shape for name, p in block.named_parameters()} == {
            name: p.shape for name, p in real_block.named_parameters()
        }


def test_linearizing_twice_changes_nothing_more():
    (block, _) = blocks_of(tiny("mixtral"), "mixtral")
    linearize(block)
    before = dict(block.named_modules())
    linearize(block)
    assert dict(block.named_modules()) == before


def test_what_lies_transposed_on_disk_is_marked():
    (block, _) = blocks_of(tiny("gpt2"), "gpt2")
    linearize(block)
    marked = {name for name, module in block.named_modules() if isinstance(module, TransposedLinear)}
    assert marked == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert block.attn.c_attn.weight.shape == (3 * HIDDEN, HIDDEN)
    assert all(parameter.is_contiguous() for parameter in block.parameters())


def test_an_ordinary_linear_stays_the_object_it_was():
    (block, _) = blocks_of(tiny("llama"), "llama")
    before = dict(block.named_modules())
    linearize(block)
    assert dict(block.named_modules()) == before


def routed(tokens_count, experts, seed=0, dtype=torch.float64):
    """Inputs, two distinct experts per token and weights; expert 0 is nobody's choice."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens_count, HIDDEN, generator=generator, dtype=dtype)
    chosen = torch.rand(tokens_count, experts - 1, generator=generator).topk(2).indices + 1
    return hidden, chosen, torch.rand(tokens_count, 2, generator=generator, dtype=dtype)


@pytest.mark.parametrize("calibrate_all", [False, True])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_one_by_one_write_what_the_fused_experts_write(model_type, calibrate_all):
    (block, _) = blocks_of(tiny(model_type, torch.float64), model_type)
    inputs = routed(7, 5)
    expected = block.mlp.experts(*inputs)
    linearize(block)
    block.mlp.experts.calibrate_all = calibrate_all
    assert relative_error(block.mlp.experts(*inputs), expected) <= 1e-12


@pytest.mark.parametrize("calibrate_all", [False, True])
def test_every_expert_is_called_even_where_no_token_goes(calibrate_all):
    (block, _) = blocks_of(tiny("mixtral", torch.float64), "mixtral")
    linearize(block)
    experts = block.mlp.experts
    experts.calibrate_all = calibrate_all
    seen = {}
    for index, expert in enumerate(experts):
        expert.up_proj.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0].shape}))
    hidden, chosen, weights = routed(7, 5)
    experts(hidden, chosen, weights)
    counts = [7] * 5 if calibrate_all else torch.bincount(chosen.flatten(), minlength=5).tolist()
    assert counts[0] == (7 if calibrate_all else 0)
    assert seen == {index: (count, HIDDEN) for index, count in enumerate(counts)}


def test_a_choice_beyond_the_last_expert_reaches_nobody():
    """transformers marks the experts of other devices so."""
    (block, _) = blocks_of(tiny("mixtral", torch.float64), "mixtral")
    hidden, chosen, weights = routed(7, 5)
    weights[2] = 0
    expected = block.mlp.experts(hidden, chosen, weights)
    linearize(block)
    weights[2], chosen[2] = 1, 5
    assert relative_error(block.mlp.experts(hidden, chosen, weights), expected) <= 1e-12


def test_sums_of_half_precision_experts_are_rounded_once():
    (block, _) = blocks_of(tiny("mixtral", torch.bfloat16), "mixtral")
    hidden, chosen, weights = routed(7, 5, dtype=torch.bfloat16)
    weights = weights.float()
    linearize(block)
    experts = block.mlp.experts
    exact = torch.zeros(7, HIDDEN)
    for index, expert in enumerate(experts):
        share = (weights * (chosen == index)).sum(dim=1, keepdim=True)
        exact += torch.where(share > 0, expert(hidden).float() * share, 0)
    experts.calibrate_all = True  # the same products as above, to the bit
    assert torch.equal(experts(hidden, chosen, weights), exact.to(torch.bfloat16))


class FusedExperts(nn.Module):
    """The layout of Mixtral and Qwen, with biases, to be bent out of shape by the tests below."""

    def __init__(self, experts=3, inner=6, hidden=4):
        super().__init__()
        self.num_experts = experts
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64), requires_grad=False)

        self.gate_up_proj, self.gate_up_proj_bias = random(experts, 2 * inner, hidden), random(experts, 2 * inner)
        self.down_proj, self.down_proj_bias = random(experts, hidden, inner), random(experts, hidden)
        self.act_fn = ACT2FN["silu"]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for token, (x, indexes, weights) in enumerate(zip(hidden_states, top_k_index, top_k_weights, strict=True)):
            for index, weight in zip(indexes, weights, strict=True):
                gate, up = (self.gate_up_proj[index] @ x + self.gate_up_proj_bias[index]).chunk(2)
                written = self.down_proj[index] @ (self.act_fn(gate) * up) + self.down_proj_bias[index]
                output[token] += weight * written
        return output


def held(experts: nn.Module) -> Any:
    """A block that holds them."""
    block = nn.Module()
    block.experts = experts
    return block


def test_experts_keep_their_biases():
    fused = FusedExperts()
    inputs = (torch.randn(5, 4, dtype=torch.float64), torch.tensor([[0, 2]] * 5), torch.rand(5, 2, dtype=torch.float64))
    expected = fused(*inputs)
    block = held(fused)
    linearize(block)
    assert relative_error(block.experts(*inputs), expected) <= 1e-12


def transposed(experts):
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.transpose(1, 2), requires_grad=False)


def interleaved(experts):
    experts.is_concatenated = False


def normed(experts):
    experts.has_post_expert_norm = True


def clamped(experts):
    experts._apply_gate = lambda x: experts.act_fn(x.chunk(2, dim=-1)[0]).clamp(max=7.0) * x.chunk(2, dim=-1)[1]


def without_a_gate(experts):
    experts.up_proj = experts.gate_up_proj
    del experts.gate_up_proj


def called_otherwise(experts):
    experts.forward = lambda hidden_states: hidden_states


def with_another_weight(experts):
    experts.shift = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    "change", [transposed, interleaved, normed, clamped, without_a_gate, called_otherwise, with_another_weight]
)
def test_experts_in_an_unknown_layout_are_refused_by_name(change):
    experts = FusedExperts()
    change(experts)
    with pytest.raises(ModelError, match=r"'experts' \(FusedExperts\)"):
        linearize(held(experts))


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("gpt_oss", {"num_local_experts": 4, "intermediate_size": 16, "head_dim": 8}),
        ("llama4_text", {"num_local_experts": 4, "intermediate_size": 16, "intermediate_size_mlp": 16, "head_dim": 8}),
    ],
)
def test_the_other_fused_layouts_of_transformers_are_refused(model_type, overrides):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **overrides, vocab_size=32))
    with pytest.raises(ModelError, match="experts"):
        linearize(model)


def test_weights_that_no_rule_knows_are_reported_by_name():
    block = nn.Module()
    block.linear, block.embedding, block.norm = nn.Linear(4, 3), nn.Embedding(4, 3), nn.LayerNorm(4)
    block.convolution = nn.Conv1d(4, 4, 3)
    block.stacked = nn.Parameter(torch.zeros(2, 3, 4))
    linearize(block)
    assert unlinearized(block) == ["stacked", "convolution.weight"]


def test_a_router_is_told_from_a_matrix_by_what_it_scores():
    router: Any = nn.Module()
    router.weight, router.num_experts, router.top_k = nn.Parameter(torch.zeros(5, 8)), 5, 2
    assert is_router(router)
    assert not is_router(nn.Linear(8, 5))
    router.num_experts = 4
    assert unlinearized(held(router)) == ["experts.weight"]


def test_a_block_cannot_replace_itself():
    with pytest.raises(ModelError, match="FusedExperts is itself"):
        linearize(FusedExperts())


def test_half_a_disguise_is_not_taken_for_a_transposed_linear():
    child: Any = nn.Module()
    child.weight, child.bias, child.nf, child.nx = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3)), 4, 3
    block = held(child)
    linearize(block)
    assert unlinearized(block) == ["experts.weight"]
