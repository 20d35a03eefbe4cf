"""Train the small Llama that `halfbyte demo` quantizes: tokenizer, data, training, evaluation, a Hugging Face folder.

    python benchmarks/train_demo_model.py --corpus wiki-books.txt.xz --output out/demo-model --minutes 5

takes one GPU. `--minutes` is the time of the whole script after its imports: the learning rate follows a cosine over
as many steps as the clock leaves, so that it reaches its end on any machine. A dry run for a CPU:

    python benchmarks/train_demo_model.py --corpus wiki-books.txt.xz --output out/dry --device cpu --minutes 2 \
        --max-documents 300 --layers 2 --batch 8 --length 128 --warmup 30 --evaluate-every 30 --windows 40
"""

import argparse
import hashlib
import json
import lzma
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from halfbyte.demo_text import documentation_split

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
VOCABULARY = 4096
HELD_OUT_EVERY = 200  # of so many corpus documents one is evaluation text
TOKENIZER_REPEATS = 10  # the documentation's weight in the tokenizer's counts, for indentation and code
FINAL_SECONDS = 10  # what saving, reloading and writing may take
FLOOR = 0.01  # where the learning rate ends, of its peak
STARTED = time.perf_counter()

MODEL_CARD = """---
library_name: transformers
language: en
---
# The model of `halfbyte demo`

A Llama of {parameters:,} parameters ({layers} layers, hidden 256, 4 heads and 2 key/value heads of 64, MLP 768, tied
embeddings, vocabulary {vocabulary}, context {window}) in bfloat16. It is small enough to ship and to quantize on a CPU
in seconds, and really trained, so that quantization has something to lose. It is no use for anything else.

## Data

- English Wikipedia articles (CC BY-SA) and public-domain books from Project Gutenberg: {corpus_tokens:,} tokens, from
  which the windows are drawn at random.
- The topics of CPython's documentation, `pydoc_data.topics` of Python {python} (Python Software Foundation License):
  {documentation_tokens:,} tokens, drawn for {documentation_share:.1%} of the windows, which makes
  {documentation_passes:.0f} passes.

The topics that `halfbyte.demo_text.documentation_split` holds out, and one corpus document in {held_out_every}, were
seen neither by the model nor by its tokenizer (byte-level BPE, the documentation counted {repeats} times).

## Training

`benchmarks/train_demo_model.py --seed {seed}`: {steps:,} steps of {batch} x {window} tokens ({tokens:,} tokens) in
{seconds:.0f} s on one {device}; AdamW (0.9, 0.95), weight decay 0.1, gradient clip 1, learning rate {peak:g} with a
linear warm-up and a cosine fitted to the clock. A run on another machine takes another number of steps.

## Perplexity of the saved weights, {window}-token windows

{perplexities}
"""


def main() -> None:
    """Run the whole recipe; leave the model, its card and `training.json` in the output folder."""
    options = parsed_arguments()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    options.output.mkdir(parents=True, exist_ok=True)

    training, held_out = read_documents(options.corpus, options.max_documents)
    documentation, held_out_topics = documentation_split()
    tokenizer = trained_tokenizer([*training, *[documentation] * TOKENIZER_REPEATS])
    say(f"tokenizer trained on {len(training)} documents; {len(held_out)} are held out")
    corpus, topics = encoded(tokenizer, training), encoded(tokenizer, [documentation])
    evaluation = {
        "held-out documentation topics": windows(encoded(tokenizer, [held_out_topics]), options),
        "held-out corpus documents": windows(encoded(tokenizer, held_out), options),
    }
    say(f"{len(corpus)} tokens of corpus and {len(topics)} of documentation to train on")

    model = LlamaForCausalLM(configuration(options.layers, options.length)).to(options.device)
    deadline = STARTED + 60 * options.minutes - FINAL_SECONDS
    progress = train(model, corpus.to(options.device), topics.to(options.device), evaluation, options, deadline)
    save(model, tokenizer, options.output)
    saved = AutoModelForCausalLM.from_pretrained(options.output, dtype=torch.float32).to(options.device).eval()
    perplexity = perplexities(lambda tokens: saved_model_loss(saved, tokens), evaluation)
    tokens = progress["steps"] * options.batch * options.length
    record = {
        "parameters": saved.num_parameters(),
        "layers": options.layers,
        "vocabulary": VOCABULARY,
        "window": options.length,
        "batch": options.batch,
        "peak": options.peak,
        "seed": options.seed,
        "corpus": {"name": options.corpus.name, "sha256": hashlib.sha256(options.corpus.read_bytes()).hexdigest()},
        "corpus_tokens": len(corpus),
        "documentation_tokens": len(topics),
        "documentation_share": options.documentation_share,
        "documentation_passes": round(tokens * options.documentation_share / len(topics), 1),
        "evaluation_tokens": {name: held.numel() for name, held in evaluation.items()},
        "tokens": tokens,
        **progress,
        "perplexity": perplexity,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "python": platform.python_version(),
        "versions": {module.__name__: str(module.__version__) for module in (torch, transformers, tokenizers)},
        "seconds": round(time.perf_counter() - STARTED, 1),
    }
    write_record(record, options.output)
    say(f"saved; {progress['steps']} steps, {tokens:,} tokens; of the saved weights: {perplexity}")
    print(continuation(saved, options.output, 'The "for" statement is used to'), flush=True)


def parsed_arguments() -> argparse.Namespace:
    """The options; those after `--max-documents` exist for dry runs and experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="xz file, UTF-8, documents separated by NUL")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=5.0, help="wall-clock time of the whole script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--max-documents", type=int, help="use the first so many documents")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=128, help="windows of a step")
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--peak", type=float, default=2e-3, help="learning rate after the warm-up")
    parser.add_argument("--documentation-share", type=float, default=0.005, help="of the training windows")
    parser.add_argument("--evaluate-every", type=float, default=45.0, help="seconds")
    parser.add_argument("--windows", type=int, default=256, help="at most so many in each evaluation text")
    return parser.parse_args()


def read_documents(path: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """The corpus as (training documents, held-out documents); the same ones are held out in every run."""
    documents = lzma.decompress(path.read_bytes()).decode("utf-8").split("\0")[:limit]
    held_out = documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    del documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    return documents, held_out


def trained_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of `VOCABULARY` tokens that puts `<s>` before each text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return tokenizer


def encoded(tokenizer: Tokenizer, texts: Sequence[str], chunk: int = 2000) -> Int[Tensor, "tokens"]:
    """All texts as one int16 stream, `<s>` before and `</s>` after each. In chunks, because encodings are large."""
    end = np.array([SPECIAL_TOKENS.index("</s>")], dtype=np.int16)
    pieces = []
    for first in range(0, len(texts), chunk):
        for encoding in tokenizer.encode_batch_fast(list(texts[first : first + chunk])):
            pieces += [np.array(encoding.ids, dtype=np.int16), end]
    return torch.from_numpy(np.concatenate(pieces))


def windows(stream: Int[Tensor, "tokens"], options: argparse.Namespace) -> Int[Tensor, "windows length"]:
    """`stream` in non-overlapping windows on the device of the run, the first `options.windows` of them."""
    whole = len(stream) // options.length * options.length
    return stream[:whole].view(-1, options.length)[: options.windows].to(options.device)


def configuration(layers: int, length: int) -> LlamaConfig:
    """The architecture. Every input width (256 and 768) is a multiple of 128, the largest usual group size."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        attn_implementation="sdpa",
    )


def next_token_loss(model: LlamaForCausalLM, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of tokens 1.. given those before.

    Walks the layers itself: the model's own `forward` builds a mask when compiled, which rules flash attention out.
    """
    body = model.model
    hidden = body.embed_tokens(tokens[:, :-1])
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    rotary = body.rotary_emb(hidden, position_ids=positions)
    for layer in body.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions)
    logits = model.lm_head(body.norm(hidden))
    return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def perplexities(loss: Callable[[Tensor], Tensor], evaluation: dict[str, Tensor], batch: int = 32) -> dict[str, float]:
    """exp of the mean loss over each text's windows; all of them have the same number of tokens."""
    with torch.no_grad():
        means = {
            name: sum(loss(part.long()) * len(part) for part in held.split(batch)) / len(held)
            for name, held in evaluation.items()
        }
    return {name: round(math.exp(mean), 3) for name, mean in means.items()}


def drawn(
    corpus: Int[Tensor, "tokens"], topics: Int[Tensor, "few"], options: argparse.Namespace, dice: torch.Generator
) -> Int[Tensor, "batch length"]:
    """Random windows of `options.length` + 1 tokens: each from the topics with the documentation's share, else not."""
    chance = torch.rand(3, options.batch, generator=dice, device=corpus.device, dtype=torch.float64)
    reach = torch.arange(options.length + 1, device=corpus.device)
    common = corpus[(chance[0] * (len(corpus) - options.length)).long()[:, None] + reach]
    special = topics[(chance[1] * (len(topics) - options.length)).long()[:, None] + reach]
    return torch.where(chance[2][:, None] < options.documentation_share, special, common).long()


@dataclass
class ClockedCosine:
    """A learning rate that warms up over `warmup` steps and then falls along a cosine that the clock stretches.

    Each `refit` counts the remaining steps anew, and the cosine goes from where it is to its end in that many: a wrong
    guess bends the schedule and never cuts it off.
    """

    peak: float
    warmup: int
    step: int = 0
    remaining: float = math.inf
    turned: float = 0.0

    def advance(self) -> float:
        """Take one step; its learning rate."""
        self.step += 1
        if self.step > self.warmup:
            self.turned += (1 - self.turned) / self.remaining
        self.remaining -= 1
        fall = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * self.turned)) / 2
        return self.peak * min(1.0, self.step / self.warmup) * fall

    def refit(self, seconds: float, steps_per_second: float) -> None:
        """Spread the rest over `seconds`; at least one step remains. The warm-up is taken whole whatever it costs."""
        if self.step >= self.warmup:
            self.remaining = max(1, int(seconds * steps_per_second))


def train(
    model: LlamaForCausalLM,
    corpus: Int[Tensor, "tokens"],
    topics: Int[Tensor, "few"],
    evaluation: dict[str, Int[Tensor, "windows length"]],
    options: argparse.Namespace,
    deadline: float,
) -> dict[str, Any]:
    """Train `model` in place until `deadline` (of `time.perf_counter`); the steps and the evaluations on the way."""
    optimizer = adamw(model, options.peak)
    compiled = next_token_loss if options.eager else torch.compile(next_token_loss, dynamic=False)
    dice = torch.Generator(options.device).manual_seed(options.seed)
    schedule = ClockedCosine(options.peak, options.warmup)
    interval = max(1, options.warmup // 3)
    history: list[dict[str, Any]] = []
    began = marked = evaluated = time.perf_counter()
    marked_step, pause = 0, 0.0
    while schedule.remaining > 0:
        rate = schedule.advance()
        for group in optimizer.param_groups:
            group["lr"] = rate
        with mixed_precision(options.device):
            loss = compiled(model, drawn(corpus, topics, options, dice))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if schedule.step % interval and schedule.remaining > 0:
            continue
        current = finite(loss.detach(), schedule.step)  # waits for the device, so that the clock below is honest
        now = time.perf_counter()
        speed = (schedule.step - marked_step) / (now - marked)
        due = now - evaluated >= options.evaluate_every or (not history and schedule.step >= options.warmup)
        if due or schedule.remaining == 0:
            with mixed_precision(options.device):
                found = perplexities(lambda tokens: next_token_loss(model, tokens), evaluation)
            evaluated = time.perf_counter()
            pause = evaluated - now
            history.append(
                {"step": schedule.step, "seconds": round(now - began, 1), "loss": current, "perplexity": found}
            )
            say(f"step {schedule.step}: loss {current:.3f}, rate {rate:.1e}, {speed:.2f} steps/s, perplexity {found}")
        marked, marked_step = time.perf_counter(), schedule.step
        if schedule.remaining > 0:
            schedule.refit((deadline - marked - 2 * pause) / (1 + pause / options.evaluate_every), speed)
    return {"steps": schedule.step, "history": history}


def adamw(model: LlamaForCausalLM, peak: float) -> torch.optim.AdamW:
    """The optimizer; norms are not decayed."""
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    norms = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 autocast on a GPU; on a CPU, where it is slower than float32, nothing."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def finite(loss: Tensor, step: int) -> float:
    """`loss` as a number; ends the run when it is none."""
    value = float(loss)
    if not math.isfinite(value):
        raise SystemExit(f"the loss is {value} at step {step}: use a lower --peak")
    return value


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Write the model in bfloat16 and its tokenizer as Hugging Face reads them. `model` becomes bfloat16."""
    unknown, begin, end = SPECIAL_TOKENS
    ids = {"bos_token_id": SPECIAL_TOKENS.index(begin), "eos_token_id": SPECIAL_TOKENS.index(end)}
    model.generation_config = GenerationConfig(**ids, pad_token_id=ids["eos_token_id"])
    model.to(torch.bfloat16).save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)  # it is written for its owner alone, and a package is read by others
    FastTokenizer(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(output)


def saved_model_loss(model: LlamaForCausalLM, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """The loss of a reloaded model by its own `forward`, a check of what was written and of `next_token_loss`."""
    return cross_entropy(model(tokens[:, :-1]).logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def continuation(model: LlamaForCausalLM, folder: Path, prompt: str) -> str:
    """What the model in `folder` writes after `prompt`, greedily: something for a person to look at."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    return tokenizer.decode(model.generate(**tokens, max_new_tokens=48, do_sample=False)[0], skip_special_tokens=True)


def write_record(record: dict[str, Any], output: Path) -> None:
    """`training.json` and the model card."""
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    rows = [
        f"- {name}: {value} ({record['evaluation_tokens'][name]} tokens)"
        for name, value in record["perplexity"].items()
    ]
    card = MODEL_CARD.format(
        **record, perplexities="\n".join(rows), repeats=TOKENIZER_REPEATS, held_out_every=HELD_OUT_EVERY
    )
    (output / "README.md").write_text(card, encoding="utf-8")


def say(line: str) -> None:
    """A line of the log, with the seconds since the script began."""
    print(f"{time.perf_counter() - STARTED:6.1f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
