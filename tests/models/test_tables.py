"""The tables against transformers' own modeling code, in every variant of every family."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from halfbyte.errors import ModelError
from halfbyte.models.architecture import Link
from halfbyte.models.fold import find_links
from halfbyte.models.heads import head_counts
from halfbyte.models.linearize import linearize
from halfbyte.models.tables import ARCHITECTURES, TABLES, architecture_of
from tiny_models import CONFIGURATIONS, HEADS, VARIANTS, tiny

variants = pytest.mark.parametrize(("model_type", "overrides"), VARIANTS.values(), ids=VARIANTS)


def linearized(model_type, **overrides):
    """On the meta device: names and shapes are all that a table knows."""
    with torch.device("meta"):
        model = tiny(model_type, **overrides)
    table = ARCHITECTURES[model_type]
    blocks = model.get_submodule(table.blocks)
    for block in blocks.children():
        linearize(block)
    return model, list(blocks.children()), table


def used(block, table, model):
    """The table's links that some modules of this block resolve."""
    heads = head_counts(model.config)
    return [link for link in table.links if find_links(block, replace(table, links=(link,)), *heads)]


@variants
def test_every_module_that_the_table_names_exists(model_type, overrides):
    model, blocks, table = linearized(model_type, **overrides)
    assert isinstance(model.get_submodule(table.blocks), nn.ModuleList)
    assert isinstance(model.get_submodule(table.head), nn.Linear)
    for name in table.embeddings:
        assert isinstance(model.get_submodule(name), nn.Embedding | nn.LayerNorm)
    if table.final_norm and model_type != "opt":  # the 350m has none: transformers keeps a None under the name
        assert model.get_submodule(table.final_norm).weight.dim() == 1
    for block in blocks:
        assert find_links(block, table, *head_counts(model.config))


def test_every_link_of_every_table_is_met_in_some_variant():
    met = {id(table): set() for table in TABLES}
    for model_type, overrides in VARIANTS.values():
        model, blocks, table = linearized(model_type, **overrides)
        for block in blocks:
            met[id(table)] |= {table.links.index(link) for link in used(block, table, model)}
    assert all(met[id(table)] == set(range(len(table.links))) for table in TABLES)


def test_every_table_has_a_tiny_model_and_no_type_has_two_tables():
    assert CONFIGURATIONS.keys() == ARCHITECTURES.keys()
    assert len(ARCHITECTURES) == sum(len(table.model_types) for table in TABLES)


def test_a_type_without_a_table_has_none():
    assert architecture_of("llama") is ARCHITECTURES["mistral"]
    assert architecture_of("mamba") is None


def test_the_router_is_the_first_reader_of_the_norm_before_a_mixture():
    for model_type in ("mixtral", "qwen2_moe", "qwen3_moe"):
        model, blocks, table = linearized(model_type)
        links = find_links(blocks[0], table, *head_counts(model.config))
        readers = next(link.readers for link in links if link.writer_name == "post_attention_layernorm")
        assert next(iter(readers)) == "mlp.gate"
        assert len(readers) >= 1 + 2 * 5


@pytest.mark.parametrize(
    ("variant", "writer"),
    [
        ("opt-post-norm", "self_attn_layer_norm"),
        ("opt-post-norm", "final_layer_norm"),
        ("opt-gelu", "fc1"),
        ("gpt2", "mlp.c_fc"),
        ("bloom-norm-to-residual", "input_layernorm"),
        ("bloom-norm-to-residual", "post_attention_layernorm"),
        ("bert", "attention.output.LayerNorm"),
    ],
)
def test_no_link_leaves_a_writer_that_others_read_or_that_a_curve_follows(variant, writer):
    model_type, overrides = VARIANTS[variant]
    model, blocks, table = linearized(model_type, **overrides)
    links = find_links(blocks[0], table, *head_counts(model.config))
    assert writer not in {link.writer_name for link in links}


def test_a_name_that_the_block_lacks_is_an_error_and_not_a_link_less():
    model, blocks, table = linearized("llama")
    heads = head_counts(model.config)
    mistaken = Link("input_layernorm", ("self_attn.query",))
    with pytest.raises(ModelError, match=r"names 'self_attn.query', which this LlamaDecoderLayer lacks"):
        find_links(blocks[0], replace(table, links=(mistaken,)), *heads)
    with pytest.raises(ModelError, match="'no_such_flag'"):
        find_links(blocks[0], replace(table, links=(replace(table.links[0], when={"no_such_flag": True}),)), *heads)


def test_an_optional_link_of_which_one_reader_is_missing_is_an_error():
    model, blocks, table = linearized("qwen2_moe")
    link = table.links[2]
    assert link.optional
    del blocks[0].mlp.shared_expert_gate
    with pytest.raises(ModelError, match="shared_expert_gate"):
        find_links(blocks[0], replace(table, links=(link,)), *head_counts(model.config))


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "qwen3_moe"])
def test_a_block_that_was_not_linearized_has_no_links_but_an_error(model_type):
    with torch.device("meta"):
        model = tiny(model_type)
    table = ARCHITECTURES[model_type]
    with pytest.raises(ModelError, match="linearize the block first"):
        find_links(model.get_submodule(table.blocks)[0], table, *head_counts(model.config))


def test_heads_of_another_model_are_an_error():
    model, blocks, table = linearized("llama")
    heads, kv_heads, head_dim = head_counts(model.config)
    with pytest.raises(ModelError, match="the heads are not this model's"):
        find_links(blocks[0], table, heads, heads, head_dim)
    with pytest.raises(ModelError, match="cannot share"):
        find_links(blocks[0], table, heads, 3, head_dim)
    with pytest.raises(ModelError, match="no scale can move"):
        find_links(blocks[0], table, kv_heads, kv_heads, head_dim)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("llama", (HEADS, 2, 8)),
        ("qwen3", (HEADS, 2, 12)),
        ("gpt2", (HEADS, HEADS, 8)),
        ("gptj", (HEADS, HEADS, 8)),
        ("bloom", (HEADS, HEADS, 8)),
        ("bert", (HEADS, HEADS, 8)),
        ("falcon", (HEADS, 1, 8)),
        ("falcon-serial", (HEADS, HEADS, 8)),
        ("falcon-two-norms", (HEADS, 2, 8)),
    ],
)
def test_heads_are_counted_as_the_model_uses_them(variant, expected):
    model_type, overrides = VARIANTS[variant]
    with torch.device("meta"):
        assert head_counts(tiny(model_type, **overrides).config) == expected
