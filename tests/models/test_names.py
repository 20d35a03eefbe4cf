"""Names on disk against what transformers itself writes and what the reference checkpoints hold."""

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.models.linearize import TransposedLinear, linearize
from halfbyte.models.names import block_name, disk_name, outer_disk_name
from halfbyte.models.tables import ARCHITECTURES
from tiny_models import CONFIGURATIONS, tiny


@pytest.mark.parametrize("model_type", CONFIGURATIONS)
def test_every_tensor_is_under_its_name_in_what_transformers_saves(model_type, tmp_path):
    model, table = tiny(model_type), ARCHITECTURES[model_type]
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    index = 1
    block = model.get_submodule(table.blocks)[index]
    linearize(block)
    transposed = {f"{name}.weight" for name, m in block.named_modules() if isinstance(m, TransposedLinear)}
    prefix = f"{table.blocks}.{index}."
    for name, parameter in block.named_parameters():
        tensor = stored.pop(prefix + disk_name(table, name))
        assert torch.equal(parameter, tensor.T if name in transposed else tensor), name
    assert not [name for name in stored if name.startswith(prefix)]
    for name in (table.head, table.final_norm, *table.embeddings):
        if name and not (name == table.head and model.config.tie_word_embeddings):
            assert f"{outer_disk_name(table, name)}.weight" in stored


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("mlp.experts.3.gate_proj.weight", "block_sparse_moe.experts.3.w1.weight"),
        ("mlp.experts.12.up_proj.weight_scale", "block_sparse_moe.experts.12.w3.weight_scale"),
        ("mlp.experts.0.down_proj", "block_sparse_moe.experts.0.w2"),
        ("mlp.gate.weight", "block_sparse_moe.gate.weight"),
        ("mlp.gate", "block_sparse_moe.gate"),
        ("self_attn.q_proj.weight", "self_attn.q_proj.weight"),
    ],
)
def test_mixtral_goes_by_other_names_on_disk_and_back(here, there):
    table = ARCHITECTURES["mixtral"]
    assert disk_name(table, here) == there
    assert block_name(table, there) == here


def test_only_whole_names_are_renamed():
    table = ARCHITECTURES["mixtral"]
    for name in ("mlp.gate_proj.weight", "other.mlp.gate.weight", "mlp.experts.1.extra.gate_proj"):
        assert disk_name(table, name) == name
