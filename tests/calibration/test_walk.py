import copy

import pytest
import torch

from closeness import relative_error
from halfbyte.calibration.statistics import InputStatistics
from halfbyte.calibration.walk import Stream, enter, linears, observe, shared_inputs
from halfbyte.errors import CalibrationError, ModelError
from halfbyte.models.linearize import linearize
from halfbyte.models.load import find_blocks
from halfbyte.models.tables import architecture_of
from tiny_models import VARIANTS, tiny, tokens

CPU = torch.device("cpu")


def entered(name):
    """A linearized tiny model, its blocks, the stream at their door, and the hidden states that transformers reports."""
    kind, changes = VARIANTS[name]
    model = tiny(kind, **changes)
    architecture = architecture_of(kind)
    assert architecture is not None
    blocks = model.get_submodule(architecture.blocks)
    for block in blocks:
        linearize(block)
    ids = tokens(3, 11)
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    return model, blocks, enter(model, blocks, [ids[:2], ids[2:]], CPU, CPU), hidden


@pytest.mark.parametrize("name", VARIANTS)
def test_walking_block_by_block_is_the_model_s_own_forward_pass(name):
    _, blocks, stream, hidden = entered(name)
    with torch.no_grad():
        for index, block in enumerate(blocks):
            assert torch.equal(stream.run(block, index, 0), stream.run(block, index, 0))  # nothing is remembered
            stream.advance(block, index)
            if index + 1 < len(blocks):
                assert relative_error(torch.cat(stream.hidden), hidden[index + 1]) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gptj", "mixtral", "qwen2_moe", "bert", "falcon"])
def test_linears_that_read_one_tensor_share_it_and_every_linear_is_found(name):
    _, blocks, stream, _ = entered(name)
    shared = shared_inputs(blocks[0], stream, 0)
    assert sorted(n for names in shared for n in names) == sorted(linears(blocks[0]))
    together = {
        "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "gptj": ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),
        "mixtral": ("mlp.experts.4.gate_proj", "mlp.experts.4.up_proj"),
        "qwen2_moe": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"),
        "bert": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "falcon": ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
    }
    assert together[name] in shared


def test_what_is_observed_is_what_the_linear_reads():
    _, blocks, stream, _ = entered("llama")
    inputs = []
    hook = blocks[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    seen = observe(blocks[0], stream, 0, shared_inputs(blocks[0], stream, 0))
    hook.remove()
    x = torch.cat(inputs[1:])  # the first is shared_inputs' own pass
    statistics = seen["mlp.down_proj"]
    assert statistics.tokens == 33
    assert relative_error(statistics.gram, x.T @ x) < 1e-6
    assert torch.equal(statistics.absolute_max, x.abs().amax(0))
    assert torch.equal(statistics.maximum, x.amax(0))
    assert torch.equal(statistics.minimum, x.amin(0))
    assert torch.allclose(statistics.mean_absolute, x.abs().mean(0))
    assert seen["self_attn.q_proj"] is seen["self_attn.v_proj"]


def test_experts_count_their_own_tokens():
    _, blocks, stream, _ = entered("mixtral")
    seen = observe(blocks[0], stream, 0, shared_inputs(blocks[0], stream, 0))
    assert sum(seen[f"mlp.experts.{e}.gate_proj"].tokens for e in range(5)) == 2 * 33
    assert seen["self_attn.q_proj"].tokens == 33


def test_the_drift_is_the_product_of_what_is_missing_with_what_is_there():
    _, blocks, stream, _ = entered("llama")
    original, float_stream = copy.deepcopy(blocks[1]), stream.copy()
    float_stream.advance(blocks[0], 0)
    blocks[0].mlp.down_proj.weight.mul_(1.05)
    stream.advance(blocks[0], 0)
    shared = shared_inputs(blocks[1], stream, 1)
    found = observe(blocks[1], stream, 1, shared, (original, float_stream))["self_attn.q_proj"].drift
    norm = blocks[1].input_layernorm
    clean, drifted = norm(torch.cat(float_stream.hidden)).flatten(0, 1), norm(torch.cat(stream.hidden)).flatten(0, 1)
    assert found is not None
    assert relative_error(found, (clean - drifted).T @ drifted) < 1e-4


def test_experts_have_no_drift_since_routers_may_disagree():
    _, blocks, stream, _ = entered("mixtral")
    seen = observe(blocks[0], stream, 0, shared_inputs(blocks[0], stream, 0), (copy.deepcopy(blocks[0]), stream.copy()))
    assert all(seen[f"mlp.experts.{e}.gate_proj"].drift is None for e in range(5))
    assert seen["self_attn.q_proj"].drift is not None


@pytest.mark.parametrize("chosen", [True, False], ids=["quantized-sees-all", "float-sees-all"])
def test_an_expert_that_one_of_the_routers_gives_every_token_has_no_drift(chosen):
    """As many tokens as there are do not make it a linear that sees all of them in both models."""
    _, blocks, stream, _ = entered("mixtral")
    favoured = copy.deepcopy(blocks[0])
    favoured.mlp.gate.weight.data.zero_()  # ties: every token goes to the same experts
    one, other = (favoured, blocks[0]) if chosen else (blocks[0], favoured)
    shared = shared_inputs(one, stream, 0)
    seen = observe(one, stream, 0, shared, (other, stream.copy()))
    assert all(
        seen[f"mlp.experts.{e}.gate_proj"].drift is None for e in range(5) if f"mlp.experts.{e}.gate_proj" in seen
    )
    assert seen["self_attn.q_proj"].drift is not None


def test_the_blocks_are_themselves_again_after_the_stand_ins():
    model, blocks, _, _ = entered("llama")
    assert all("forward" not in vars(block) for block in blocks)
    assert model.config.use_cache


def test_an_architecture_without_a_table_is_walked_by_its_longest_list():
    for kind in ("llama", "gpt2", "bert", "mixtral", "opt"):
        architecture = architecture_of(kind)
        assert architecture is not None
        assert find_blocks(tiny(kind)) == architecture.blocks


def test_a_model_that_skips_a_block_is_refused():
    model = tiny("llama")
    blocks = list(model.model.layers)
    with pytest.raises(ModelError, match="called 2 of its 3 blocks"):
        enter(model, [blocks[0], torch.nn.Linear(2, 2), blocks[1]], [tokens(1, 5)], CPU, CPU)


def test_a_linear_that_is_never_called_is_named():
    _, blocks, stream, _ = entered("llama")
    blocks[0].spare = torch.nn.Linear(4, 4)
    with pytest.raises(CalibrationError, match=r"never called spare.*ignore"):
        shared_inputs(blocks[0], stream, 0)


def test_statistics_merge_in_any_order():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    whole, parts = InputStatistics.empty(6), [InputStatistics.empty(6) for _ in range(2)]
    whole.absorb(x)
    parts[0].absorb(x[30:])
    parts[1].absorb(x[:30])
    parts[0].merge(parts[1])
    assert relative_error(parts[0].gram, whole.gram) < 1e-6
    assert parts[0].tokens == whole.tokens == 50
    assert torch.equal(parts[0].minimum, whole.minimum)
    assert torch.allclose(parts[0].absolute_sum, whole.absolute_sum)


def test_a_wide_gram_matrix_is_the_whole_product():
    x = torch.randn(40, 1100, generator=torch.Generator().manual_seed(0))
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-6)):
        statistics = InputStatistics.empty(1100)
        statistics.absorb(x.to(dtype))
        wide = x.to(dtype).double()
        assert relative_error(statistics.gram, wide.T @ wide) < bound


def test_statistics_of_no_tokens_change_nothing():
    statistics = InputStatistics.empty(6)
    statistics.absorb(torch.zeros(0, 6))
    assert statistics.tokens == 0
    assert float(statistics.gram.abs().max()) == 0


def test_a_stream_s_copy_moves_on_its_own():
    stream = Stream([torch.zeros(1, 2, 3)], [[((), {})]], lambda output: output, CPU)
    other = stream.copy()
    other.advance(torch.nn.Linear(3, 3), 0)
    assert torch.equal(stream.hidden[0], torch.zeros(1, 2, 3))
    assert stream.tokens == 2
