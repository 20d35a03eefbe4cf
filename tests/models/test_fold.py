"""Moving a scale leaves the function of a block as it was, in float64, for every link of every family."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from halfbyte.errors import WeightError
from halfbyte.models.architecture import Link, Rows
from halfbyte.models.fold import ResolvedLink, find_links, move_scale, tie
from halfbyte.models.heads import head_counts
from halfbyte.models.linearize import linearize
from halfbyte.models.tables import ARCHITECTURES
from tiny_models import VARIANTS, logits, tiny, tokens


def relative_error(result, expected):
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def model_and_links(variant, dtype=torch.float64):
    """A linearized tiny model and the links of each of its blocks."""
    model_type, overrides = VARIANTS[variant]
    model, table = tiny(model_type, dtype, **overrides), ARCHITECTURES[model_type]
    blocks = list(model.get_submodule(table.blocks).children())
    for block in blocks:
        linearize(block)
    return model, [find_links(block, table, *head_counts(model.config)) for block in blocks]


def random_scale(link, seed=0):
    """Between a quarter and four, another one for every channel."""
    generator = torch.Generator().manual_seed(seed)
    return 4 ** (2 * torch.rand(link.scale_width, generator=generator, dtype=torch.float64) - 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_folding_random_scales_into_every_link_leaves_the_outputs(variant):
    model, blocks = model_and_links(variant)
    ids = tokens()
    before = logits(model, ids)
    for seed, link in enumerate(link for links in blocks for link in links):
        weight = link.weights[0].clone()
        move_scale(link, tie(random_scale(link, seed), link))
        assert relative_error(link.weights[0], weight) > 0.1
    assert relative_error(logits(model, ids), before) <= 1e-10


def link_from(links, writer):
    return next(link for link in links if link.writer_name == writer)


def forget_the_router(link):
    readers = {name: reader for name, reader in link.readers.items() if name != "mlp.gate"}
    move_scale(replace(link, readers=readers), random_scale(link))


def forget_the_shared_gate(link):
    readers = {name: reader for name, reader in link.readers.items() if name != "mlp.shared_expert_gate"}
    move_scale(replace(link, readers=readers), random_scale(link))


def forget_one_reader(link):
    move_scale(replace(link, readers=dict(list(link.readers.items())[:-1])), random_scale(link))


def forget_the_bias(link):
    bias = link.writer.bias.clone()
    move_scale(link, tie(random_scale(link), link))
    link.writer.bias.copy_(bias)


def forget_to_tie(link):
    """The first query head's scale for the values, each query head's own for the readers."""
    scale = random_scale(link)
    first = scale.view(link.kv_heads, link.repeats, -1)[:, :1].expand(-1, link.repeats, -1).flatten()
    move_scale(link, first)
    for weight in link.weights:
        weight.mul_(scale / first)


def tie_the_wrong_heads(link):
    """As if query head h read KV head h % kv_heads."""
    own = tie(random_scale(link), link).view(link.kv_heads, link.repeats, -1)[:, 0]
    link.writer.weight.div_(own.flatten()[:, None])
    link.writer.bias.div_(own.flatten())
    for weight in link.weights:
        weight.mul_(own.repeat(link.repeats, 1).flatten())


def forget_the_norm_offset(link):
    move_scale(replace(link, norm_offset=0.0), random_scale(link))


def take_the_values_for_contiguous(link):
    move_scale(replace(link, rows=Rows.VALUES), tie(random_scale(link), link))


def take_the_values_for_one_per_head(link):
    move_scale(replace(link, rows=Rows.VALUES_PER_HEAD), tie(random_scale(link), link))


def scale_the_gate_half(link):
    scale = random_scale(link)
    move_scale(link, scale)
    half = len(scale)
    link.writer.weight.copy_(torch.cat((link.writer.weight[:half] / scale[:, None], link.writer.weight[half:])))


def divide_the_readers_too(link):
    scale = random_scale(link)
    move_scale(link, scale)
    link.weights[0].div_(scale)


@pytest.mark.parametrize(
    ("variant", "writer", "bug"),
    [
        ("llama", "input_layernorm", divide_the_readers_too),
        ("llama", "input_layernorm", forget_one_reader),
        ("llama", "self_attn.v_proj", forget_the_bias),
        ("llama", "self_attn.v_proj", forget_to_tie),
        ("llama", "self_attn.v_proj", tie_the_wrong_heads),
        ("llama", "mlp.up_proj", forget_the_bias),
        ("gemma", "input_layernorm", forget_the_norm_offset),
        ("gemma3_text", "pre_feedforward_layernorm", forget_the_norm_offset),
        ("phi3", "self_attn.qkv_proj", forget_to_tie),
        ("phi3", "self_attn.qkv_proj", take_the_values_for_one_per_head),
        ("phi3", "mlp.gate_up_proj", scale_the_gate_half),
        ("opt", "fc1", forget_the_bias),
        ("gpt2", "ln_1", forget_the_bias),
        ("gptj", "ln_1", forget_one_reader),
        ("gpt_neox", "attention.query_key_value", take_the_values_for_contiguous),
        ("bloom", "self_attention.query_key_value", take_the_values_for_contiguous),
        ("falcon", "input_layernorm", forget_one_reader),
        ("falcon-two-norms", "self_attention.query_key_value", take_the_values_for_contiguous),
        ("mixtral", "post_attention_layernorm", forget_the_router),
        ("qwen2_moe", "post_attention_layernorm", forget_the_router),
        ("qwen2_moe", "post_attention_layernorm", forget_the_shared_gate),
        ("qwen3_moe", "post_attention_layernorm", forget_the_router),
        ("bert", "attention.self.value", forget_the_bias),
    ],
)
def test_the_comparison_notices(variant, writer, bug):
    """A gate that no bug can fail is no gate."""
    model, blocks = model_and_links(variant)
    ids = tokens()
    before = logits(model, ids)
    bug(link_from(blocks[0], writer))
    assert relative_error(logits(model, ids), before) > 1e-4


@pytest.mark.parametrize(
    ("variant", "link"),
    [
        ("opt-post-norm", Link("self_attn_layer_norm", ("fc1",))),
        ("opt-gelu", Link("fc1", ("fc2",))),
        ("bloom-norm-to-residual", Link("input_layernorm", ("self_attention.query_key_value",))),
        ("bert", Link("attention.output.LayerNorm", ("intermediate.dense",))),
        ("gemma2", Link("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))),
        ("llama", Link("mlp.gate_proj", ("mlp.down_proj",))),
    ],
)
def test_links_that_the_tables_leave_out_would_change_the_outputs(variant, link):
    model_type, overrides = VARIANTS[variant]
    model, table = tiny(model_type, torch.float64, **overrides), ARCHITECTURES[model_type]
    ids = tokens()
    before = logits(model, ids)
    block = next(model.get_submodule(table.blocks).children())
    (resolved,) = find_links(block, replace(table, links=(link,)), *head_counts(model.config))
    move_scale(resolved, random_scale(resolved))
    assert relative_error(logits(model, ids), before) > 1e-4


def weights_of(link: ResolvedLink) -> list[Any]:
    """Writer and reader of a link that has one reader, as they are now, in float64."""
    modules: list[Any] = [link.writer, *link.readers.values()]
    return [module.weight.detach().clone().double() for module in modules]


def resolved_link(heads=4, kv_heads=2, head_dim=3, dtype=torch.float64, rows=Rows.VALUES):
    inputs, outputs = heads * head_dim, kv_heads * head_dim
    if rows is Rows.ALL:
        outputs = inputs
    return ResolvedLink(
        writer_name="v_proj",
        writer=nn.Linear(5, outputs, dtype=dtype),
        readers={"o_proj": nn.Linear(inputs, 7, dtype=dtype)},
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_offset=0.0,
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**16))
def test_a_tied_scale_is_the_geometric_mean_of_the_heads_that_share(kv_heads, seed):
    link = resolved_link(heads=6, kv_heads=kv_heads)
    scale = random_scale(link, seed)
    tied = tie(scale, link)
    groups, means = scale.view(kv_heads, -1, link.head_dim), tied.view(kv_heads, -1, link.head_dim)
    assert torch.equal(means, means[:, :1].expand_as(means))
    assert torch.allclose(means[:, 0], groups.prod(dim=1) ** (1 / groups.shape[1]), rtol=1e-12)
    assert torch.allclose(tie(tied, link), tied, rtol=1e-12)


def test_tying_leaves_a_scale_that_no_heads_share():
    link = resolved_link(rows=Rows.ALL)
    scale = random_scale(link)
    assert torch.equal(tie(scale, link), scale)


def test_an_untied_scale_is_refused_before_anything_is_edited():
    link = resolved_link()
    before = weights_of(link)
    with pytest.raises(WeightError, match=r"tie\(scale, link\) first"):
        move_scale(link, random_scale(link))
    assert all(map(torch.equal, weights_of(link), before))


@pytest.mark.parametrize("entry", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_and_finite_is_refused(entry):
    link = resolved_link(rows=Rows.ALL)
    scale = random_scale(link)
    scale[-1] = entry
    with pytest.raises(WeightError, match="positive and finite"):
        move_scale(link, scale)


def test_a_scale_of_another_length_is_refused():
    link = resolved_link(rows=Rows.ALL)
    with pytest.raises(WeightError, match=r"shape \[1\].*12 inputs"):
        move_scale(link, torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_moved_weight_is_rounded_once_to_its_own_dtype(dtype):
    link = resolved_link(rows=Rows.ALL, dtype=dtype)
    scale = random_scale(link).float()
    writer, reader = weights_of(link)
    move_scale(link, scale)
    assert {p.dtype for module in (link.writer, *link.readers.values()) for p in module.parameters()} == {dtype}
    moved_writer, moved_reader = weights_of(link)
    bound = torch.finfo(dtype).eps / 2 + torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert ((moved_writer * scale.double()[:, None] - writer).abs() <= bound * writer.abs() * (1 + bound)).all()
    assert ((moved_reader / scale - reader).abs() <= bound * reader.abs() * (1 + bound)).all()


def test_a_norm_with_an_offset_is_scaled_in_float32():
    """1 + weight loses the weight's last bits in bfloat16."""
    norm: Any = nn.Module()
    norm.weight = nn.Parameter(torch.full((4,), 2.0**-9, dtype=torch.bfloat16))
    link = replace(resolved_link(), writer=norm, readers={"q": nn.Linear(4, 2, dtype=torch.bfloat16)}, rows=Rows.ALL)
    move_scale(replace(link, norm_offset=1.0), torch.ones(4, dtype=torch.bfloat16))
    assert torch.equal(norm.weight, torch.full((4,), 2.0**-9, dtype=torch.bfloat16))


def test_the_bits_of_a_power_of_two_come_back():
    link = resolved_link(rows=Rows.ALL, dtype=torch.bfloat16)
    before = weights_of(link)
    scale = 2.0 ** torch.arange(-6, 6)
    move_scale(link, scale)
    move_scale(link, 1 / scale)
    assert all(map(torch.equal, weights_of(link), before))
