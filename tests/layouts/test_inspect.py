"""Inspection counts what is there and tells every kind of damage in words, raising nothing."""

import hashlib
import json

import pytest
import torch
from export_samples import ASYMMETRIC, INT4, INT8, checkpoint, linears
from safetensors.torch import load_file, save_file

from halfbyte.errors import CheckpointError
from halfbyte.layouts.inspect import inspect
from halfbyte.scheme import PerChannel
from tiny_models import tiny

NAMES = list(linears(tiny("llama", hidden_size=64, intermediate_size=128)))
UP = "model.layers.1.mlp.up_proj"


def record_hashes(folder):
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".json")
    }
    (folder / "halfbyte.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "awq"])
def test_an_intact_checkpoint_has_no_problems(tmp_path, layout):
    dense = checkpoint(tmp_path, INT4, layout=layout, shards=2)
    record_hashes(tmp_path)
    report = inspect(tmp_path)
    assert report.problems == ()
    assert report.layout == layout
    assert list(report.formats.values()) == [len(NAMES)]
    sizes = {module.path: module.shape for module in report.modules}
    assert sizes == {name: tuple(linears(dense)[name].weight.shape) for name in NAMES}
    parameters = sum(tensor.numel() for tensor in dense.state_dict().values())
    quantized = sum(out * columns for out, columns in sizes.values())
    assert report.unquantized_share == pytest.approx(1 - quantized / parameters)
    assert report.bytes_on_disk == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert report.kernels is None
    assert json.loads(json.dumps(report.as_dict()))["layout"] == layout


def test_bits_per_weight_count_scales_and_zero_points(tmp_path):
    formats = dict.fromkeys(NAMES, INT4) | {UP: INT8.model_copy(update={"granularity": PerChannel()})}
    checkpoint(tmp_path, formats)
    report = inspect(tmp_path)
    assert report.formats == {"int4 sym g32": len(NAMES) - 1, "int8 sym per channel": 1}
    bits = {module.path: module.bits_per_weight for module in report.modules}
    shape = 16 * 8  # weight_shape, two int64
    assert bits[UP] == pytest.approx(8 + 32 / 64 + shape / (128 * 64))
    assert bits["model.layers.0.self_attn.q_proj"] == pytest.approx(4 + 32 / 32 + shape / (64 * 64))
    assert report.bits_per_weight is not None
    assert 5 < report.bits_per_weight < 6 < report.model_bits_per_weight < 32


def test_a_model_that_is_not_quantized_is_all_unquantized(tmp_path):
    checkpoint(tmp_path, {})
    report = inspect(tmp_path)
    assert (report.layout, report.modules, report.problems) == (None, (), ())
    assert (report.unquantized_share, report.bits_per_weight, report.model_bits_per_weight) == (1, None, 32)


def change_tensors(change):
    def damage(folder):
        path = next(path for path in sorted(folder.glob("*.safetensors")) if f"{UP}.weight_scale" in load_file(path))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    damage.__name__ = change.__name__
    return damage


@change_tensors
def scale_dropped(tensors):
    del tensors[f"{UP}.weight_scale"]


@change_tensors
def scales_of_another_shape(tensors):
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"][:, :1].contiguous()


@change_tensors
def integer_scales(tensors):
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].to(torch.int32)


@change_tensors
def nan_scale(tensors):
    tensors[f"{UP}.weight_scale"][4, 1] = float("nan")


@change_tensors
def one_changed_value(tensors):
    tensors[f"{UP}.weight_scale"][4, 1] *= 2


def truncated_file(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def missing_file(folder):
    (folder / "model-00001-of-00002.safetensors").unlink()


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")


def changed_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def missing_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def broken_record(folder):
    (folder / "halfbyte.json").write_text("[1")


def unknown_method(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "quanto"
    (folder / "config.json").write_text(json.dumps(config))


def forgotten_module(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append(UP)
    (folder / "config.json").write_text(json.dumps(config))


def dense_module(folder):
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(f"{UP}.weight_")}
        if path.name.startswith("model-00001"):
            tensors[f"{UP}.weight"] = torch.ones(128, 64)
        save_file(tensors, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (scale_dropped, [f"{UP}: weight_scale is missing", f"places {UP}.weight_scale"]),
        (scales_of_another_shape, [f"{UP}: weight_scale is float32 [128, 1] instead of"]),
        (integer_scales, [f"{UP}: weight_scale is int32 [128, 2] instead of float32 or"]),
        (nan_scale, [f"{UP}: 1 scales are NaN"]),
        (one_changed_value, [".safetensors is not the file that was written"]),
        (truncated_file, ["model-00002-of-00002.safetensors is truncated"]),
        (missing_file, ["model-00001-of-00002.safetensors is missing"]),
        (broken_index, ["model.safetensors.index.json is damaged"]),
        (changed_tokenizer, ["tokenizer.json is not the file that was written"]),
        (missing_tokenizer, ["tokenizer.json is missing, which halfbyte.json lists"]),
        (broken_record, ["halfbyte.json is damaged"]),
        (unknown_method, ["'quanto' is none of"]),
        (forgotten_module, [f"{UP} has packed tensors, which config.json does not mention"]),
        (dense_module, [f"{UP} is a plain matrix, although config.json says that it is int4 sym g32"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_told_in_words(tmp_path, damage, words):
    checkpoint(tmp_path, INT4, shards=2)
    record_hashes(tmp_path)
    damage(tmp_path)
    told = "\n".join(inspect(tmp_path).problems)
    assert all(word in told for word in words), told


def test_a_module_without_any_tensor_is_missed_where_the_linear_layers_are_known(tmp_path):
    checkpoint(tmp_path, ASYMMETRIC)
    tensors = load_file(tmp_path / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{UP}.weight_")}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert inspect(tmp_path).problems == ()
    expected = f"{UP} has no tensors, although config.json says that it is int4 asym g32"
    assert inspect(tmp_path, linears=NAMES).problems == (expected,)


@pytest.mark.parametrize(("name", "content"), [("config.json", "{"), ("config.json", "[]"), ("config.json", None)])
def test_what_is_no_checkpoint_is_refused(tmp_path, name, content):
    checkpoint(tmp_path, INT4)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"again|no checkpoint"):
        inspect(tmp_path)


def test_a_folder_without_weights_is_no_checkpoint(tmp_path):
    checkpoint(tmp_path, INT4)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        inspect(tmp_path)
