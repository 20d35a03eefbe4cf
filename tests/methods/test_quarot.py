"""A rotated model computes what it computed, in every family; and what is loud becomes quiet."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from closeness import relative_error
from halfbyte.errors import ModelError, RecipeError, WeightError
from halfbyte.methods import quarot
from halfbyte.methods.quarot import QuaRot
from halfbyte.models import rotate as rotating
from halfbyte.numerics.rotation import rotation
from halfbyte.recipe import Recipe
from halfbyte.scheme import OnlineHadamard
from rotated_models import before_and_after, bones, rotate
from tiny_models import HIDDEN, INNER, VARIANTS

FIXED = {"gemma2", "gemma3_text", "bloom", "bloom-norm-to-residual", "bert", "bert-relu", "opt-post-norm"}
PARTS = {
    "stream": QuaRot(heads=False),
    "heads": QuaRot(residual=False, seed=1),
    "down": QuaRot(residual=False, heads=False, online=("down",)),
    "out": QuaRot(residual=False, heads=False, online=("out",)),
    "all": QuaRot(seed=7, online=("down", "out")),
}
ANY_SIZE = {"fallback": "orthogonal"}  # the tiny models have odd sizes on purpose


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_computes_what_it_computed(variant, part):
    step = PARTS[part].model_copy(update=ANY_SIZE)
    if variant in FIXED:
        step = step.model_copy(update={"residual": False})
    before, after, _ = before_and_after(variant, step)
    assert relative_error(after, before) <= 1e-10


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", ["llama", "gemma", "gpt2", "opt", "falcon"])
def test_a_head_that_shared_the_embedding_gets_its_own_weight(variant, tied):
    before, after, skeleton = before_and_after(variant, QuaRot(heads=False), tie_word_embeddings=tied)
    assert relative_error(after, before) <= 1e-10
    embedding = skeleton.model.get_parameter(f"{skeleton.architecture.embeddings[0]}.weight")
    assert not torch.equal(embedding, skeleton.model.get_parameter(f"{skeleton.architecture.head}.weight"))


@pytest.mark.parametrize(
    "variant", ["llama", "gemma", "mixtral", "qwen2_moe", "opt", "gpt2", "gptj", "gpt_neox", "phi3"]
)
def test_norms_have_no_gain_left_and_every_weight_was_turned(variant):
    skeleton = bones(variant)
    before = {name: value.clone() for name, value in skeleton.model.named_parameters()}
    rotate(skeleton, QuaRot(online=("down",), **ANY_SIZE))
    for block in skeleton.blocks:
        for link in rotating.wiring(block, skeleton).norms:
            assert torch.all(link.writer.weight == 1 - link.norm_offset)
    matrices = {name: value for name, value in skeleton.model.named_parameters() if value.dim() > 1}
    assert not [name for name in matrices.keys() & before.keys() if torch.equal(matrices[name], before[name])]


@pytest.mark.parametrize("variant", sorted(FIXED))
def test_a_stream_that_norms_scale_is_refused_with_the_reason_and_the_remedy(variant):
    with pytest.raises(ModelError, match=r"cannot be rotated: .*; set `residual: false`"):
        QuaRot(**ANY_SIZE).check(bones(variant))
    QuaRot(residual=False, online=("down",), **ANY_SIZE).check(bones(variant))


def test_a_model_without_a_table_is_refused():
    skeleton = bones("llama")
    unknown = type(skeleton)(skeleton.folder, skeleton.model, skeleton.config, None, skeleton.blocks_name)
    for step in PARTS.values():
        with pytest.raises(ModelError, match="llama has no table"):
            step.check(unknown)


def test_a_linear_of_which_the_table_says_nothing_is_refused():
    skeleton = bones("llama")
    skeleton.blocks[1].adapter = nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.adapter reads or writes it"):
        QuaRot().check(skeleton)
    QuaRot(residual=False, online=("down",)).check(skeleton)


def test_a_module_outside_the_blocks_of_which_the_table_says_nothing_is_refused():
    with pytest.raises(ModelError, match="project_in"):
        QuaRot().check(bones("opt", word_embed_proj_dim=16))


def test_a_size_without_a_hadamard_matrix_is_refused_unless_a_fallback_is_asked_for():
    odd = {"intermediate_size": 92}
    with pytest.raises(WeightError, match="order 92 is known"):
        QuaRot(online=("down",)).check(bones("llama", **odd))
    QuaRot().check(bones("llama", **odd))
    before, after, _ = before_and_after("llama", QuaRot(online=("down",), **ANY_SIZE), **odd)
    assert relative_error(after, before) <= 1e-10


def test_a_norms_bias_without_a_place_is_refused():
    skeleton = bones("gptj")
    skeleton.blocks[0].ln_1.weight[3] = 0.0
    with pytest.raises(ModelError, match="ln_1 has a bias where its gain is 0"):
        rotate(skeleton, QuaRot())


def test_the_checkpoint_is_told_what_runs_online():
    skeleton = bones("llama")
    step = QuaRot(online=("down",))
    down = OnlineHadamard(size=INNER)
    assert step.online_inputs(skeleton) == {f"model.layers.{index}.mlp.down_proj": down for index in range(2)}
    assert QuaRot().online_inputs(skeleton) == {}
    assert set(QuaRot(online=("out",)).online_inputs(bones("mixtral"))) == {
        f"model.layers.{index}.self_attn.o_proj" for index in range(2)
    }
    experts = QuaRot(online=("down",), **ANY_SIZE).online_inputs(bones("qwen2_moe"))
    assert len(experts) == 2 * (5 + 1)


def test_seeds_stand_for_different_rotations_of_one_function():
    results = [before_and_after("llama", QuaRot(seed=seed)) for seed in (0, 1)]
    assert relative_error(results[0][1], results[1][1]) <= 1e-10
    weights = [skeleton.blocks[0].mlp.up_proj.weight for _, _, skeleton in results]
    assert relative_error(weights[0], weights[1]) > 0.5


def test_a_loud_channel_becomes_quiet():
    """One channel of the stream 200 times as loud: before, the readers' inputs peak there; afterwards nowhere."""

    def peaks(step):
        skeleton = bones("llama")
        skeleton.model.model.embed_tokens.weight[:, 5] *= 200
        seen = []
        skeleton.blocks[1].self_attn.q_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        if step is not None:
            rotate(skeleton, step)
        skeleton.model(input_ids=torch.arange(3, 20)[None])
        return float((seen[0].abs().amax(-1) / seen[0].square().mean(-1).sqrt()).mean())

    assert peaks(None) > 4
    assert peaks(QuaRot()) < 3


def forgotten_gain(monkeypatch):
    monkeypatch.setattr(rotating, "fold_gain", lambda link: None)


def forgotten_writers(monkeypatch):
    original = rotating._turn_outputs
    skip = lambda linear, turn, rows: None if rows == slice(None) else original(linear, turn, rows)  # noqa: E731
    monkeypatch.setattr(rotating, "_turn_outputs", skip)


def forgotten_output_bias(monkeypatch):
    def without(linear, turn, rows):
        linear.weight[rows] = turn(linear.weight[rows].T).T

    monkeypatch.setattr(rotating, "_turn_outputs", without)


def mean_not_kept(monkeypatch):
    monkeypatch.setattr(quarot, "keeps_mean", lambda skeleton: False)


def turned_the_other_way(monkeypatch):
    original = rotating.turn_inputs
    monkeypatch.setattr(
        quarot, "turn_inputs", lambda linear, _turn: original(linear, rotation(linear.in_features, 9).apply)
    )


def heads_as_one(monkeypatch):
    """The rotation of the values runs over neighbouring heads in place of each."""

    def over_all(found, _turn):
        for link in found.values:
            width = len(link.written)
            turn = rotation(width, 0).apply
            rotating._turn_outputs(link.writer, turn, link.written)
            for weight in link.weights:
                weight.copy_(turn(weight.unflatten(1, (-1, width))).flatten(1))

    monkeypatch.setattr(quarot, "turn_values", over_all)


def forgotten_router(monkeypatch):
    def without(block, skeleton):
        found = rotating.wiring(block, skeleton)
        linears = [
            replace(link, readers={name: m for name, m in link.readers.items() if isinstance(m, nn.Linear)})
            for link in found.norms
        ]
        return replace(found, norms=tuple(linears))

    monkeypatch.setattr(quarot, "wiring", without)


@pytest.mark.parametrize(
    ("bug", "variant"),
    [
        (forgotten_gain, "llama"),
        (forgotten_writers, "llama"),
        (forgotten_output_bias, "llama"),
        (mean_not_kept, "gpt_neox"),
        (turned_the_other_way, "llama"),
        (heads_as_one, "llama"),
        (forgotten_router, "mixtral"),
    ],
)
def test_a_planted_bug_changes_the_logits(bug, variant, monkeypatch):
    bug(monkeypatch)
    before, after, _ = before_and_after(variant, QuaRot(online=("down",), **ANY_SIZE))
    assert relative_error(after, before) > 1e-3


def test_a_recipe_rotates_first_and_once():
    quantized = [{"method": "rtn"}]
    Recipe.load({"steps": [{"method": "quarot", "seed": 3}, {"method": "awq"}, *quantized]})
    with pytest.raises(RecipeError, match="this order: one rotation such as quarot"):
        Recipe.load({"steps": [{"method": "awq"}, {"method": "quarot"}, *quantized]})
    with pytest.raises(RecipeError, match="one rotation"):
        Recipe.load({"steps": [{"method": "quarot"}, {"method": "quarot"}, *quantized]})
    assert not Recipe.load({"steps": [{"method": "quarot"}, *quantized]}).needs_data
