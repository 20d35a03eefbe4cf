"""Moving scales and shifts within parameters: the block's function stays, and fold.py agrees."""

import copy

import pytest
import torch
from torch.func import functional_call

from halfbyte.calibration.walk import enter
from halfbyte.models import moved as module
from halfbyte.models.architecture import Rows
from halfbyte.models.fold import find_links, move_scale
from halfbyte.models.heads import head_counts
from halfbyte.models.linearize import linearize
from halfbyte.models.moved import can_shift, moved
from halfbyte.models.tables import architecture_of
from tiny_models import tiny, tokens

CPU = torch.device("cpu")
FAMILIES = ("llama", "gemma", "phi3", "opt", "gpt_neox", "bloom", "mixtral", "qwen3")


def block_of(family):
    model = tiny(family, dtype=torch.float64)
    table = architecture_of(model.config.model_type)
    blocks = list(model.get_submodule(table.blocks))
    for block in blocks:
        linearize(block)
    stream = enter(model, blocks, [tokens(2, 9)], CPU, CPU)
    return blocks[0], stream, find_links(blocks[0], table, *head_counts(model.config))


def random_move(link, seed):
    generator = torch.Generator().manual_seed(seed)
    width = len(link.written)
    scale = torch.randn(width, generator=generator, dtype=torch.float64).mul(0.5).exp()
    return scale, torch.randn(width, generator=generator, dtype=torch.float64)


def worst_change(block, stream, links, *, shifted):
    parameters = {name: p.detach() for name, p in block.named_parameters()}
    for seed, link in enumerate(links):
        scale, shift = random_move(link, seed)
        parameters |= moved(parameters, link, scale, shift if shifted and can_shift(link) else None)
    with torch.no_grad():
        before = stream.run(block, 0, 0)
        after = stream.run(lambda *args, **kwargs: functional_call(block, parameters, args, kwargs), 0, 0)
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shifted", [False, True], ids=["scales", "shifts too"])
def test_the_block_computes_what_it_computed_before(family, shifted):
    assert worst_change(*block_of(family), shifted=shifted) < 1e-6  # some norms and softmaxes compute in float32


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_in_place_gives_the_same_parameters(family):
    block, _, links = block_of(family)
    link = next((link for link in links if link.repeats > 1), links[0])
    scale, _ = random_move(link, 0)
    here = moved(dict(block.named_parameters()), link, scale)
    twin = copy.deepcopy(block)
    table = next(l for l in find_links(twin, architecture_of(twin_type(family)), link.heads, link.kv_heads, link.head_dim)
                 if l.writer_name == link.writer_name)  # fmt: skip
    wide = scale if link.repeats == 1 else module._as_read(scale, link)
    move_scale(table, wide)
    for name, value in twin.named_parameters():
        assert torch.allclose(here.get(name, block.get_parameter(name)), value, rtol=1e-12)


def twin_type(family):
    return tiny(family).config.model_type


def test_shifts_move_out_of_norms_and_values_with_biases_alone():
    _, _, links = block_of("opt")
    assert {link.writer_name for link in links if can_shift(link)} == {
        "self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm",
    }  # fmt: skip
    assert not [link for link in block_of("llama")[2] if can_shift(link) and link.rows is not Rows.VALUES]
    assert not any(can_shift(link) for link in block_of("mixtral")[2])


def test_gradients_reach_scale_and_shift():
    block, _, links = block_of("opt")
    scale, shift = (t.requires_grad_() for t in random_move(links[0], 1))
    parameters = {name: p.detach() for name, p in block.named_parameters()}
    changed = moved(parameters, links[0], scale, shift)
    sum(value.square().sum() for value in changed.values()).backward()
    assert scale.grad.abs().min() > 0
    assert shift.grad.abs().min() > 0


@pytest.mark.parametrize("bug", ["shift forgotten in readers", "scale not divided", "heads not repeated"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    real = moved

    def wrong(parameters, link, scale, shift=None):
        result = real(parameters, link, scale, shift)
        if bug == "shift forgotten in readers" and shift is not None:
            result |= {f"{name}.bias": parameters[f"{name}.bias"] for name in link.readers}
        if bug == "scale not divided":
            result[f"{link.writer_name}.weight"] = parameters[f"{link.writer_name}.weight"]
        return result

    monkeypatch.setitem(globals(), "moved", wrong)
    if bug == "heads not repeated":
        monkeypatch.setattr(
            module, "_as_read", lambda own, link: own if link.repeats == 1 else own.repeat(link.repeats)
        )
    family = "llama" if bug == "heads not repeated" else "opt"
    assert worst_change(*block_of(family), shifted=True) > 1e-3
