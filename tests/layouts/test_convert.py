"""A converted checkpoint decodes to the same weights, keeps everything else, and is complete or absent."""

import hashlib
import json

import pytest
import torch
from export_samples import ASYMMETRIC, INT4, INT8, checkpoint, linears
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from halfbyte.errors import CheckpointError, FormatError, OutputError
from halfbyte.layouts import LAYOUTS
from halfbyte.layouts.convert import export
from halfbyte.layouts.inspect import inspect
from tiny_models import tiny

NAMES = list(linears(tiny("llama", hidden_size=64, intermediate_size=128)))


def stored(folder):
    """Every tensor of a folder, whatever its files."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def decoded(folder, layout, formats):
    """Every tensor of the dense model that the folder stands for."""
    tensors = stored(folder)
    for path, format in formats.items():
        parts = {suffix: tensors.pop(f"{path}.{suffix}", None) for suffix in layout.suffixes}
        parts = {suffix: tensor for suffix, tensor in parts.items() if tensor is not None}
        tensors[f"{path}.weight"] = layout.read(parts, format).decode()
    return tensors


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("format", "layout"), [(INT4, "gptq"), (INT4, "awq"), (ASYMMETRIC, "awq"), (INT8, "gptq"), (ASYMMETRIC, "gptq_v2")]
)
def test_the_weights_are_the_same_to_the_bit_and_the_rest_is_untouched(tmp_path, format, layout, shards):
    source, output = tmp_path / "source", tmp_path / "output"
    formats = {name: format for name in NAMES if name != "model.layers.1.mlp.down_proj"}
    dense = checkpoint(source, formats, shards=shards)
    assert export(source, layout, output) == output
    assert equal(decoded(output, LAYOUTS[layout], formats), dict(dense.state_dict()))
    for name in ("tokenizer.json", "chat_template.jinja", "figures/loss.svg"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, output))
    assert after.pop("quantization_config")["quant_method"] == layout.removesuffix("_v2")
    del before["quantization_config"]
    assert after == before
    report = inspect(output)
    assert report.problems == ()
    assert len(report.modules) == len(formats)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source"]


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_there_and_back_is_the_same_checkpoint(tmp_path, layout):
    checkpoint(tmp_path / "source", ASYMMETRIC, shards=2)
    there = export(tmp_path / "source", layout, tmp_path / "there")
    back = export(there, "compressed-tensors", tmp_path / "back")
    assert equal(stored(back), stored(tmp_path / "source"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (back, tmp_path / "source")]
    groups = [config["quantization_config"]["config_groups"] for config in configs]
    assert groups[0] == groups[1]


def test_files_and_index_agree(tmp_path):
    checkpoint(tmp_path / "source", INT4, shards=3)
    output = export(tmp_path / "source", "gptq", tmp_path / "output")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        with safe_open(output / file, framework="pt") as handle:
            assert set(handle.keys()) == {name for name, place in index["weight_map"].items() if place == file}
            assert handle.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(output).values())


def test_our_record_keeps_its_notes_and_learns_the_new_hashes(tmp_path):
    source = tmp_path / "source"
    checkpoint(source, INT4)
    files = {"model.safetensors": "0" * 64, "config.json": "0" * 64}
    (source / "halfbyte.json").write_text(json.dumps({"recipe": "gptq-w4a16", "files": files}))
    output = export(source, "gptq", tmp_path / "output")
    record = json.loads((output / "halfbyte.json").read_text())
    assert record["recipe"] == "gptq-w4a16"
    assert record["files"] == {
        name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    assert inspect(output).problems == ()


def rewrite(folder, change):
    """Change the tensors of a one-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder, **section):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= section
    (folder / "config.json").write_text(json.dumps(config))


def tiny_scale(tensors):
    tensors["model.layers.1.mlp.up_proj.weight_scale"][3, 1] = 1e-30


def zero_zero_point(tensors):
    tensors["model.layers.1.mlp.up_proj.weight_zero_point"][0, 0] = 0


def missing_scale(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]


def every_scale_tiny(tensors):
    for number, path in enumerate(NAMES):
        tensors[f"{path}.weight_scale"].fill_(1e-30 * (number + 1))


@pytest.mark.parametrize(
    ("formats", "layout", "change", "error", "words"),
    [
        (INT8, "awq", None, FormatError, ["model.layers.0.mlp.down_proj and 13 more", "4 bits only", "write"]),
        (INT4, "gptq", tiny_scale, FormatError, ["model.layers.1.mlp.up_proj:", "1e-30", "quantize with"]),
        (ASYMMETRIC, "gptq", zero_zero_point, FormatError, ["model.layers.1.mlp.up_proj:", "version 1"]),
        (
            INT4,
            "gptq",
            every_scale_tiny,
            FormatError,
            ["down_proj: 256 of 256", "; and 11 more modules for"],
        ),
        (INT4, "gptq", missing_scale, CheckpointError, ["model.layers.1.mlp.up_proj", "weight_scale"]),
        (INT4, "gguf", None, FormatError, ["no layout 'gguf'", "choose one of"]),
        (INT4, "compressed-tensors", None, FormatError, ["already"]),
    ],
    ids=["bits", "scale", "zero-point", "scales", "damaged", "unknown-layout", "same-layout"],
)
def test_a_refusal_names_module_reason_and_remedy_and_writes_nothing(tmp_path, formats, layout, change, error, words):
    source = tmp_path / "source"
    checkpoint(source, formats)
    if change:
        rewrite(source, change)
    with pytest.raises(error) as caught:
        export(source, layout, tmp_path / "output")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_quantized_inputs_are_not_dropped_silently(tmp_path):
    checkpoint(tmp_path / "source", INT4)
    config = json.loads((tmp_path / "source" / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    reconfigure(tmp_path / "source", **config)
    with pytest.raises(FormatError, match="no place for quantized inputs"):
        export(tmp_path / "source", "gptq", tmp_path / "output")


def test_scales_that_readers_would_round_to_the_models_dtype_are_refused(tmp_path):
    checkpoint(tmp_path / "source", INT4, layout="gptq")
    config = json.loads((tmp_path / "source" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    export(tmp_path / "source", "compressed-tensors", tmp_path / "output")  # eight bits of mantissa suffice here
    assert stored(tmp_path / "output")["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16

    def fine_scale(tensors):
        tensors["model.layers.1.mlp.up_proj.scales"][0, 3] = 1 + 2.0**-10

    rewrite(tmp_path / "source", fine_scale)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj: 1 of 256 scales, 1\.00098"):
        export(tmp_path / "source", "compressed-tensors", tmp_path / "other")


def test_an_output_in_the_way_is_kept_unless_told_otherwise(tmp_path):
    checkpoint(tmp_path / "source", INT4)
    output = tmp_path / "output"
    checkpoint(output, INT8)
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        export(tmp_path / "source", "gptq", output)
    assert (output / "model.safetensors").read_bytes() == before
    export(tmp_path / "source", "gptq", output, overwrite=True)
    assert inspect(output).layout == "gptq"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source"]
    with pytest.raises(OutputError, match="the checkpoint itself"):
        export(output, "awq", output, overwrite=True)


def test_a_failure_halfway_leaves_nothing_behind(tmp_path, monkeypatch):
    checkpoint(tmp_path / "source", INT4, shards=2)
    layout = type(LAYOUTS["gptq"])
    calls = []
    original = layout.write

    def write(self, weight):
        calls.append(weight)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(self, weight)

    monkeypatch.setattr(layout, "write", write)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "source", "gptq", tmp_path / "output")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_not_quantized_or_damaged_is_not_converted(tmp_path):
    checkpoint(tmp_path / "source", INT4, shards=2)
    (tmp_path / "source" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        export(tmp_path / "source", "gptq", tmp_path / "output")
    checkpoint(tmp_path / "plain", {})
    with pytest.raises(CheckpointError, match="not quantized"):
        export(tmp_path / "plain", "gptq", tmp_path / "output")
