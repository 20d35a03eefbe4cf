"""The language model's head in 8 bits, from the recipe to the loaded model."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import halfbyte.huggingface  # noqa: F401 - registers the reader
from halfbyte.errors import CheckpointError, FormatError, RecipeError, WeightError
from halfbyte.evaluation.card import card
from halfbyte.evaluation.report import weakest
from halfbyte.layouts.convert import export
from halfbyte.layouts.inspect import inspect
from halfbyte.numerics.activations import InputQuantizer, simulate
from halfbyte.numerics.error import weight_snr
from halfbyte.numerics.grid import fit
from halfbyte.numerics.quantized import round_to_grid
from halfbyte.numerics.rows import round_rows, rows_snr
from halfbyte.pipeline import dry_run, quantize
from halfbyte.recipe import Recipe
from halfbyte.runtime.decoder import Decoder
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.runtime.load import load_model
from halfbyte.scheme import ActivationFormat, WeightFormat
from tiny_models import tiny, tokens

HEAD = {"bits": 8, "granularity": {"kind": "channel"}}
IN_GROUPS = {"bits": 8, "granularity": {"kind": "group", "size": 8}}
W4 = {"bits": 4, "granularity": {"kind": "group", "size": 16}}
A8 = {"bits": 8, "granularity": "token"}
FLOAT32 = {"kind": "float", "dtype": "float32"}


def recipe(head, activations=A8, weights=W4, steps=({"method": "rtn"},)):
    scheme = {"weights": weights, "activations": activations, "head": head}
    return Recipe.load({"scheme": scheme, "steps": list(steps)})


def saved(folder, model_type, **overrides):
    tiny(model_type, **overrides).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


@torch.no_grad()
def expected(folder, source, fields, activations):
    """The same blocks, and the head computed from what it reads, in reals."""
    quantize(source, recipe(None, activations), folder, device="cpu")
    model = load_model(folder, device="cpu")
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    logits(model)
    x = seen[0] if activations is None else simulate(seen[0], InputQuantizer(ActivationFormat(**activations)))
    format = WeightFormat.model_validate(fields | {"scale": FLOAT32})
    weight = round_to_grid(head.weight, fit(head.weight, format), format).decode()
    return nn.functional.linear(x, weight, head.bias)


MODELS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("gpt2", {}),
    ("gptj", {}),
    ("gpt_neox", {}),
    ("opt", {}),
]


@pytest.mark.parametrize("activations", [A8, None], ids=["a8", "a16"])
@pytest.mark.parametrize("head", [HEAD, IN_GROUPS], ids=["channel", "groups"])
@pytest.mark.parametrize(("model_type", "overrides"), MODELS, ids=["llama", "tied", "gpt2", "gptj", "neox", "opt"])
def test_a_checkpoint_computes_with_its_head_rounded(model_type, overrides, head, activations, tmp_path):
    source = saved(tmp_path / "model", model_type, **overrides)
    quantize(source, recipe(head, activations), tmp_path / "out", device="cpu")
    found = load_model(tmp_path / "out", device="cpu")
    kind = QuantizedLinear if activations is None else IntegerLinear
    assert isinstance(found.get_output_embeddings(), kind)
    assert type(found.get_input_embeddings()) is nn.Embedding
    torch.testing.assert_close(
        logits(found), expected(tmp_path / "plain", source, head, activations), rtol=1e-4, atol=1e-4
    )
    on_the_fly = load_model(source, recipe=recipe(head, activations), device="cpu")
    assert torch.equal(logits(on_the_fly), logits(found))
    assert not inspect(tmp_path / "out").problems


@pytest.mark.parametrize("activations", [A8, None], ids=["a8", "a16"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gptj", "gpt_neox"])
def test_transformers_computes_the_same(model_type, activations, tmp_path):
    source = saved(tmp_path / "model", model_type, tie_word_embeddings=model_type in ("llama", "gpt2"))
    weights = W4 | {"scale": {"kind": "integer", "amplifier": 1024}} if activations else W4
    quantize(source, recipe(HEAD, activations, weights), tmp_path / "out", device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = load_model(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)


def test_the_files_hold_it_and_the_embedding_stays(tmp_path):
    source = saved(tmp_path / "model", "llama", tie_word_embeddings=True)
    planned = dry_run(source, recipe(HEAD), device="cpu")
    quantize(source, recipe(HEAD), tmp_path / "out", device="cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    section = config["quantization_config"]
    assert config["tie_word_embeddings"] is False
    assert section["quant_method"] == "compressed-tensors"
    assert "lm_head" not in section["ignore"]
    assert [group["targets"] for group in section["config_groups"].values() if group["weights"]["num_bits"] == 8] == [
        ["lm_head"]
    ]
    tensors = load_file(sorted((tmp_path / "out").glob("model-*.safetensors"))[-1])
    assert tensors["lm_head.weight"].dtype == torch.int8
    embedding = tiny("llama", tie_word_embeddings=True).model.embed_tokens.weight
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding)
    assert planned.head is not None
    assert planned.head.bytes_before == 0
    held = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("lm_head."))
    assert planned.head.bytes_after == pytest.approx(held, abs=16)


def test_packed_words_take_the_place_of_the_matrix(tmp_path):
    source = saved(tmp_path / "model", "llama")
    quantize(source, recipe(HEAD, None), tmp_path / "out", device="cpu")
    names = load_file(sorted((tmp_path / "out").glob("model-*.safetensors"))[-1]).keys()
    found = {name for name in names if name.startswith("lm_head.")}
    assert found == {f"lm_head.{suffix}" for suffix in ("weight_packed", "weight_scale", "weight_shape")}


def test_it_is_a_line_of_plan_report_and_card(tmp_path):
    source = saved(tmp_path / "model", "llama")
    planned = dry_run(source, recipe(HEAD), device="cpu")
    assert [module.path for module in planned][-1] == "lm_head"
    report = quantize(source, recipe(HEAD), tmp_path / "out", device="cpu")
    record = report.modules[-1]
    assert (record.path, record.format, record.method) == ("lm_head", "int8 sym per channel, a8 per token", "rtn")
    weight = tiny("llama").lm_head.weight
    format = WeightFormat.model_validate(HEAD | {"scale": FLOAT32})
    assert record.weight_snr == pytest.approx(
        weight_snr(weight, round_to_grid(weight, fit(weight, format), format).decode())
    )
    assert "int8 sym per channel" in card(report, {})
    assert "the head" not in card(report, {})
    assert weakest(report)[-1] == record


def test_a_resumed_run_writes_the_same(tmp_path, monkeypatch):
    source = saved(tmp_path / "model", "llama")
    whole = quantize(source, recipe(HEAD), tmp_path / "whole", device="cpu")

    def stopped(*_given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("halfbyte.pipeline.finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, recipe(HEAD), tmp_path / "out", device="cpu")
    resumed = quantize(source, recipe(HEAD), tmp_path / "out", device="cpu", resume=True)
    assert [record.path for record in resumed.modules] == [record.path for record in whole.modules]
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert (tmp_path / "whole" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_head_is_rounded_after_the_rotation(tied, tmp_path):
    source = saved(tmp_path / "model", "llama", tie_word_embeddings=tied)
    steps = [{"method": "quarot"}, {"method": "rtn"}]
    fine = {"bits": 8, "granularity": {"kind": "channel"}}
    report = quantize(source, recipe(HEAD, None, fine, steps), tmp_path / "out", device="cpu")
    quantize(source, recipe(None, None, fine, steps), tmp_path / "plain", device="cpu")
    assert report.modules[-1].method == "quarot → rtn"
    turned = load_model(tmp_path / "plain", device="cpu")
    format = WeightFormat.model_validate(HEAD | {"scale": FLOAT32})
    weight = turned.lm_head.weight
    turned.lm_head.weight.data.copy_(round_to_grid(weight, fit(weight, format), format).decode())
    found = load_model(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logits(found), logits(turned), rtol=1e-4, atol=1e-4)


def test_the_embedding_and_the_head_may_both_be_quantized(tmp_path):
    table = {"bits": 8, "convention": "odyssey", "granularity": {"kind": "channel"}, "stored": "bytes"}
    source = saved(tmp_path / "model", "llama", tie_word_embeddings=True)
    scheme = {"weights": W4, "activations": A8, "embeddings": table, "head": HEAD}
    both = Recipe.load({"scheme": scheme, "steps": [{"method": "rtn"}]})
    quantize(source, both, tmp_path / "out", device="cpu")
    found = load_model(tmp_path / "out", device="cpu")
    assert isinstance(found.lm_head, IntegerLinear)
    assert torch.equal(logits(found), logits(load_model(source, recipe=both, device="cpu")))


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_it_is_exported(model_type, tmp_path):
    sizes = {"num_key_value_heads": 4} if model_type == "llama" else {}
    source = saved(tmp_path / "model", model_type, intermediate_size=64, **sizes)
    half = {"scale": {"kind": "float", "dtype": "float16"}}
    quantize(source, recipe(HEAD | half, None, W4 | half), tmp_path / "out", device="cpu")
    export(tmp_path / "out", "gptq", tmp_path / "gptq")
    expected = logits(load_model(tmp_path / "out", device="cpu"))
    torch.testing.assert_close(logits(load_model(tmp_path / "gptq", device="cpu")), expected, rtol=1e-4, atol=1e-4)
    export(tmp_path / "gptq", "compressed-tensors", tmp_path / "back")
    back = load_model(tmp_path / "back", device="cpu")
    assert isinstance(back.lm_head, QuantizedLinear)
    torch.testing.assert_close(logits(back), expected, rtol=1e-4, atol=1e-4)


def test_a_lost_scale_is_named(tmp_path):
    source = saved(tmp_path / "model", "llama")
    quantize(source, recipe(HEAD), tmp_path / "out", device="cpu")
    last = sorted((tmp_path / "out").glob("model-*.safetensors"))[-1]
    tensors = {name: tensor for name, tensor in load_file(last).items() if name != "lm_head.weight_scale"}
    save_file(tensors, last, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head .*weight_scale is missing"):
        load_model(tmp_path / "out", device="cpu")


@torch.no_grad()
def test_decoding_uses_it(tmp_path):
    source = saved(tmp_path / "model", "llama")
    model = load_model(source, recipe=recipe(HEAD), device="cpu")
    prompts = tokens()
    decoder = Decoder(model, len(prompts), prompts.shape[1] + 4, compiled=False)
    written = prompts
    for token in decoder.decode(prompts, 4).T:
        assert torch.equal(token, logits_of(model, written).argmax(1))
        written = torch.cat([written, token[:, None]], 1)


def logits_of(model, ids):
    return model(input_ids=ids).logits[:, -1]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (A8, A8),
        (A8 | {"symmetric": False}, A8 | {"symmetric": False}),
        (None, None),
        ({"bits": 4}, None),
        ({"granularity": "tensor"}, None),
        (A8 | {"outliers": {}}, None),
    ],
    ids=["a8", "asymmetric", "a16", "a4", "tensor", "split"],
)
def test_its_input_is_as_the_blocks_where_that_is_eight_bits_per_token(inputs, expected):
    found = recipe(HEAD, inputs).scheme.head_input
    assert found == (None if expected is None else ActivationFormat(**expected))
    assert recipe(None, inputs).scheme.head_input is None


def test_what_cannot_be_stored_or_run_is_refused(tmp_path):
    for head in (
        {},
        HEAD | {"bits": 4},
        HEAD | {"convention": "asymmetric"},
        HEAD | {"granularity": {"kind": "tensor"}},
        HEAD | {"scale": {"kind": "integer"}},
    ):
        with pytest.raises(RecipeError, match="heads are int8 with symmetric floating-point scales"):
            recipe(head)
    source = saved(tmp_path / "model", "llama")
    with pytest.raises(WeightError, match="lm_head: group size 7"):
        dry_run(source, recipe(HEAD | {"granularity": {"kind": "group", "size": 7}}))
    with pytest.raises(FormatError, match=r"lm_head: .*choose `convention: awq`"):
        dry_run(source, recipe(HEAD | {"convention": "omniquant"}))


def test_an_encoder_has_none(tmp_path):
    source = saved(tmp_path / "model", "bert")
    for attempt in (
        lambda: dry_run(source, recipe(HEAD)),
        lambda: load_model(source, recipe=recipe(HEAD), device="cpu"),
    ):
        with pytest.raises(RecipeError, match="bert has no head that continues text"):
            attempt()


def test_many_rows_are_rounded_as_few():
    weight = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    for fields in (HEAD, IN_GROUPS):
        format = WeightFormat.model_validate(fields | {"scale": {"kind": "float", "dtype": "bfloat16"}})
        whole = round_to_grid(weight.float(), fit(weight.float(), format), format)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("halfbyte.numerics.rows.ROWS", 7)
            found, snr = round_rows(weight, format), rows_snr(weight, whole)
        assert torch.equal(found.codes, whole.codes)
        assert torch.equal(found.grid.scales, whole.grid.scales)
        assert snr == pytest.approx(weight_snr(weight.float(), whole.decode()))
