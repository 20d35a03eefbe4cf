"""Programs of others read what we write, and say the same: transformers by perplexity, vLLM by the text it writes.

What is marked `clients` makes an environment of vLLM (minutes, and a package index): `make clients`.
"""

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from client_models import INPUTS, MODELS, agreement, continued, damaged, eight_bits

from halfbyte.evaluation.perplexity import evaluate
from halfbyte.runtime.generate import generate
from halfbyte.runtime.load import load

COMPLETE = Path(__file__).parents[2] / "benchmarks/peers/vllm_complete.py"
LAYOUTS = ["compressed-tensors", "gptq", "awq"]
TOKENS = 16
MAY_DIFFER = 1  # of TOKENS
NEAR_TIE = 0.25  # nats; twice what int8 activations were seen to move a log-probability by
WINDOWS, WINDOW = 4, 256


@torch.no_grad()
def perplexity_in_transformers(folder: Path, text: str) -> float:
    """No code of ours: what anybody gets who loads the folder with transformers alone."""
    load_with_report: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, report = load_with_report(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:  # fused experts, whatever dtype says; transformers 5.17 stops over it
            parameter.data = parameter.data.float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: WINDOWS * WINDOW]
    losses = [
        torch.nn.functional.cross_entropy(model(input_ids=window[None]).logits[0, :-1], window[1:])
        for window in torch.tensor(ids).view(WINDOWS, WINDOW)
    ]
    return math.exp(torch.stack(losses).mean())


def perplexities(ours: Path, theirs: Path, text: str) -> dict[str, float]:
    """Of one checkpoint read by us and one read by transformers."""
    first = evaluate(ours, text=text, window=WINDOW, limit_windows=WINDOWS, device="cpu").perplexity
    second = perplexity_in_transformers(theirs, text)
    return {"halfbyte": first, "transformers": second, "relative_difference": abs(second / first - 1)}


@pytest.mark.parametrize(
    "name", [name if name == "demo" else pytest.param(name, marks=pytest.mark.clients) for name in MODELS]
)
def test_transformers_measures_the_perplexity_that_we_measure(name, subject_of, checkpoint_of, figures):
    folder = checkpoint_of(name, "compressed-tensors")
    found = perplexities(folder, folder, subject_of(name).text)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    figures.append({"client": "transformers", "model": name, "perplexity": found, "versions": versions})
    assert found["relative_difference"] < MODELS[name].perplexity_gap


def test_the_comparison_of_perplexities_notices_damage(subject_of, checkpoint_of, tmp_path):
    folder = checkpoint_of("demo", "compressed-tensors")
    found = perplexities(folder, damaged(folder, tmp_path / "damaged"), subject_of("demo").text)
    assert found["relative_difference"] > 1e-3


def complete_in_vllm(
    python: Path, checkpoint: Path, prompts: list[list[int]], folder: Path, dtype: str = "float16"
) -> dict[str, Any]:
    """vllm_complete.py's report, with the names of the kernels that vLLM told its log."""
    (folder / "prompts.json").write_text(json.dumps(prompts))
    output = folder / "completions.json"
    command = [
        python, COMPLETE, checkpoint, "--prompts", folder / "prompts.json", "--output", output, "--max-tokens",
        str(TOKENS), "--dtype", dtype,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    kernels = sorted(set(re.findall(r"Using (CPU\w*(?:Kernel|Experts)\w*)", log)))
    return json.loads(output.read_text()) | {"kernels": kernels}


def compared(
    python: Path, ours: Path, theirs: Path, prompts: tuple[str, ...], folder: Path, dtype: str = "float16"
) -> dict[str, Any]:
    """vLLM's completions beside ours, prompt by prompt."""
    model, tokenizer = load(ours, device="cpu")
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    report = complete_in_vllm(python, theirs, ids, folder, dtype)
    each = [agreement(model, completion) for completion in report["completions"]]
    kept = ("dtype", "first_quantized_linear", "kernels", "vllm")
    return {
        "tokens": TOKENS,
        **{key: [one[key] for one in each] for key in ("before_first_difference", "likeliest_after_the_same_text")},
        **{key: max(one[key] for one in each) for key in ("largest_logprob_gap", "farthest_from_our_choice")},
        **{key: report[key] for key in kept},
    }


@pytest.mark.clients
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_vllm_writes_what_we_write(name, layout, vllm_python, subject_of, checkpoint_of, figures, tmp_path):
    folder = checkpoint_of(name, layout)
    found = compared(vllm_python, folder, folder, subject_of(name).prompts, tmp_path)
    figures.append({"client": "vllm", "model": name, "layout": layout, **found})
    assert len(found["before_first_difference"]) == 8
    if MODELS[name].mixture:
        # int8 activations in vLLM's CPU kernel for int4 experts, unasked: near ties go the other way, and the text then
        assert found["farthest_from_our_choice"] < NEAR_TIE
    else:
        assert min(found["before_first_difference"]) >= TOKENS - MAY_DIFFER


@pytest.mark.clients
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", ["demo", "ref-llama-22m"])
def test_vllm_multiplies_the_integers_that_we_write(name, inputs, vllm_python, subject_of, figures, tmp_path):
    folder = eight_bits(subject_of(name), inputs, tmp_path / "w8a8")
    # vLLM's int8 kernel on a CPU has bfloat16 only, which moves log-probabilities more than int8 does
    found = compared(vllm_python, folder, folder, subject_of(name).prompts, tmp_path, "bfloat16")
    figures.append({"client": "vllm", "model": name, "layout": f"int-quantized, {inputs}", **found})
    assert found["first_quantized_linear"]["scheme"] == "CompressedTensorsW8A8Int8"
    assert found["first_quantized_linear"]["kernel"] == "CPUInt8ScaledMMLinearKernel"
    if inputs == "static":
        # so coarse on a small model that bfloat16 instead of float32 already moves our own choices by a nat
        assert sum(found["likeliest_after_the_same_text"]) >= 0.75 * 8 * TOKENS
    else:
        assert found["farthest_from_our_choice"] < NEAR_TIE


@pytest.mark.clients
def test_vllm_multiplies_a_head_in_eight_bits(vllm_python, subject_of, figures, tmp_path):
    folder = eight_bits(subject_of("ref-llama-22m"), "per token", tmp_path / "w8a8", head=True)
    found = compared(vllm_python, folder, folder, subject_of("ref-llama-22m").prompts, tmp_path, "bfloat16")
    figures.append(
        {"client": "vllm", "model": "ref-llama-22m", "layout": "int-quantized, per token, with its head", **found}
    )
    assert found["farthest_from_our_choice"] < NEAR_TIE


@pytest.mark.clients
def test_the_comparison_of_texts_notices_damage(vllm_python, subject_of, checkpoint_of, tmp_path):
    folder = checkpoint_of("demo", "compressed-tensors")
    found = compared(vllm_python, folder, damaged(folder, tmp_path / "damaged"), subject_of("demo").prompts, tmp_path)
    assert min(found["before_first_difference"]) < TOKENS - MAY_DIFFER


def test_the_tokens_compared_are_those_that_generate_writes(subject_of, checkpoint_of):
    pair = load(checkpoint_of("demo", "compressed-tensors"), device="cpu")
    prompt = subject_of("demo").prompts[0]
    ids = continued(pair[0], pair[1](prompt)["input_ids"], TOKENS)
    assert pair[1].eos_token_id not in ids
    assert generate(pair, prompt, max_new_tokens=TOKENS) == pair[1].decode(ids, skip_special_tokens=True)
