"""Greedy completions of a checkpoint by vLLM on the CPU: proof that a real client loads what we write.

Run with the python of the `vllm` environment (`make_environment.sh vllm DIR`); halfbyte is not imported. Prompts are
a JSON list whose entries are strings or lists of token ids; strings are tokenised without special tokens. The output
has the layout of transformers_complete.py, plus the layer, scheme and kernel classes of the first quantized linear.

float16 is the type to compare in: vLLM's CPU kernel for int4 weights has no float32, and bfloat16 is coarse enough to
change tokens. In bfloat16 on a CPU with AMX vLLM also rounds the activations of an int4 checkpoint to int8, unasked;
this script forbids that unless --int8-activations is given.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


def prepare_process(int8_activations: bool) -> None:
    """What vLLM reads from the environment, here and in its worker; before the import, or it comes too late."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_INT4_W4A8": str(int(int8_activations)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound to one core it starves when that core is busy
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine in this process: one import of vLLM fewer
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # lets us send first_quantized_linear to the worker
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def first_quantized_linear(model: Any) -> dict[str, str | None] | None:
    """Name and class names of the first linear with a quantized method; None when all are plain. Runs in the worker."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or type(method).__name__.startswith("Unquantized"):
            continue
        scheme = getattr(module, "scheme", None)
        kernel = getattr(scheme or method, "kernel", None)
        return {
            "name": name,
            "layer": type(module).__name__,
            "method": type(method).__name__,
            "scheme": scheme and type(scheme).__name__,
            "kernel": kernel and type(kernel).__name__,
            "weights": ", ".join(f"{key} {tuple(value.shape)}" for key, value in module.named_parameters()),
            "int8_activations": str(getattr(module, "use_w4a8", None)),
        }
    return None


def complete(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the checkpoint, generate for every prompt and return the report."""
    import vllm  # prepare_process must have run

    started = time.perf_counter()
    llm = vllm.LLM(
        model=str(arguments.model),
        dtype=arguments.dtype,
        enforce_eager=True,
        max_model_len=arguments.max_length,
        max_num_seqs=8,
        seed=0,
    )
    loaded = time.perf_counter()
    tokenizer = llm.get_tokenizer()
    prompts = [
        tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
        for prompt in json.loads(arguments.prompts.read_text(encoding="utf-8"))
    ]
    greedy = vllm.SamplingParams(temperature=0, max_tokens=arguments.max_tokens, ignore_eos=True, logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    completions = []
    for prompt, output in zip(prompts, outputs, strict=True):
        chosen = output.outputs[0]
        logprobs = [at[token].logprob for at, token in zip(chosen.logprobs, chosen.token_ids, strict=True)]
        completions.append({"prompt_ids": prompt, "generated_ids": list(chosen.token_ids), "logprobs": logprobs})
    return {
        "completions": completions,
        "dtype": arguments.dtype,
        "first_quantized_linear": llm.apply_model(first_quantized_linear)[0],
        "load_seconds": round(loaded - started, 2),
        "generate_seconds": round(time.perf_counter() - loaded, 2),
        "vllm": vllm.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON list of strings or lists of token ids")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--max-tokens", type=int, default=16, help="generated for every prompt, end-of-text or not")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and completion together")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--int8-activations", action="store_true", help="allow vLLM's W4A8 path (bfloat16 with AMX)")
    arguments = parser.parse_args()
    prepare_process(arguments.int8_activations)
    report = complete(arguments)
    arguments.output.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":  # vLLM's worker imports this file again
    main()
