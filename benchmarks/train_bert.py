"""Train a small BERT on masked words, the encoder on which the methods for encoders are measured.

On any machine, once: the tokenizer and the corpus as tokens, small enough to travel.

    python benchmarks/train_bert.py --prepare out/bert-data --corpus wiki-books.txt.xz

On one GPU: training for `--minutes` after compilation, then saving, reloading and evaluating what was saved.

    python benchmarks/train_bert.py --data out/bert-data --output out/bert --minutes 4.5

A dry run for a CPU:

    python benchmarks/train_bert.py --data out/bert-data --output out/dry --device cpu --minutes 0.5 --eager \
        --layers 2 --hidden 64 --batch 8 --warmup 20 --log-every 10 --windows 40 --give-up 2
"""

import argparse
import json
import lzma
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from jaxtyping import Float, Int
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

PAD, UNKNOWN, BEGIN, END, MASK = range(5)
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 8192
HELD_OUT_EVERY = 200  # of so many corpus documents one is evaluation text
HIDDEN_SHARE = 0.15  # of a window's tokens are predicted
SHOWN_MASK, SHOWN_RANDOM = 0.8, 0.1  # what stands in their place while training; the rest stay as they are
PLATEAU = 0.3  # nats under the entropy of single tokens: a loss above that has learnt no context
EVALUATION_SEED = 0
GAP = "The capital of France is the [MASK] of Paris."
STARTED = time.perf_counter()

Loss = Callable[[BertForMaskedLM, Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Prepare the data, or train, save and evaluate."""
    options = parsed_arguments()
    if options.prepare:
        prepare(options.corpus, options.prepare)
        return
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    corpus, held_out = (read_tokens(options.data, part) for part in ("train", "held_out"))
    counts = np.bincount(corpus, minlength=VOCABULARY)
    counts[: len(SPECIAL_TOKENS)] = 0
    say(f"{len(corpus):,} tokens to train on, {len(held_out):,} held out; entropy of one {entropy(counts):.3f} nats")

    model = initialised(options, counts).to(options.device)
    stream = torch.from_numpy(corpus.view(np.int16)).to(options.device)
    progress = train(model, stream, entropy(counts), options)
    save(model, options.data, options.output)
    saved = AutoModelForMaskedLM.from_pretrained(options.output, dtype=torch.float32).to(options.device).eval()
    record = {
        "parameters": saved.num_parameters(),
        "settings": {name: value for name, value in vars(options).items() if not isinstance(value, Path | None)},
        "corpus_tokens": len(corpus),
        "tokens": progress["steps"] * options.batch * options.length,
        "held_out": evaluated(saved, held_out, counts, options),
        **progress,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "python": platform.python_version(),
        "versions": {module.__name__: str(module.__version__) for module in (torch, transformers, tokenizers)},
        "seconds": round(time.perf_counter() - STARTED, 1),
    }
    (options.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    say(f"saved {saved.num_parameters():,} parameters; held-out: {record['held_out']}")
    say(f"{GAP} -> {filled(saved, options.output)}")


def parsed_arguments() -> argparse.Namespace:
    """The options; those after `--minutes` exist for dry runs and experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, help="folder for tokenizer and tokens; nothing is trained")
    parser.add_argument("--corpus", type=Path, help="for --prepare: xz file, UTF-8, documents separated by NUL")
    parser.add_argument("--data", type=Path, help="the folder that --prepare wrote")
    parser.add_argument("--output", type=Path, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=4.5, help="of training, without compilation and evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384, help="width; the heads are 64 wide, the MLP four times it")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window, [CLS] and [SEP] included")
    parser.add_argument("--batch", type=int, default=256, help="windows of a step")
    parser.add_argument("--warmup", type=int, default=3000, help="steps")
    parser.add_argument("--peak", type=float, default=5e-4, help="learning rate after the warm-up")
    parser.add_argument("--deviation", type=float, default=0.02, help="of the initial weights")
    parser.add_argument("--residual-scale", type=float, default=1.0, help="of the weights that write to the residual")
    parser.add_argument("--log-every", type=int, default=200, help="steps")
    parser.add_argument("--windows", type=int, default=1024, help="at most so many held-out windows")
    parser.add_argument("--give-up", type=float, default=0.4, help="share of the time after which a plateau ends it")
    options = parser.parse_args()
    if not (options.prepare and options.corpus) and not (options.data and options.output):
        parser.error("give --prepare with --corpus, or --data with --output")
    return options


def prepare(corpus: Path, folder: Path) -> None:
    """Write `tokenizer.json`, `train.npy.xz` and `held_out.npy.xz` (uint16, `[SEP]` after each document)."""
    documents = lzma.decompress(corpus.read_bytes()).decode("utf-8").split("\0")
    held_out = documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    del documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    tokenizer = trained_tokenizer(documents)
    say(f"tokenizer trained on {len(documents)} documents; {len(held_out)} are held out")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for part, texts in (("train", documents), ("held_out", held_out)):
        tokens = encoded(tokenizer, texts)
        path = folder / f"{part}.npy.xz"
        with lzma.open(path, "wb") as file:
            np.save(file, tokens)
        unknown = np.mean(tokens == UNKNOWN)
        say(f"{path}: {len(tokens):,} tokens, {path.stat().st_size / 2**20:.1f} MiB, {unknown:.3%} unknown")


def trained_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """BERT's tokenizer: lower case, accents stripped, WordPiece of `VOCABULARY` pieces, `[CLS]` and `[SEP]` around."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, limit_alphabet=400, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", BEGIN), ("[SEP]", END)],
    )
    return tokenizer


def encoded(tokenizer: Tokenizer, texts: Sequence[str], chunk: int = 500) -> NDArray[np.uint16]:
    """All texts as one stream, `[SEP]` after each. In chunks, because encodings are large."""
    pieces = []
    for first in range(0, len(texts), chunk):
        encodings = tokenizer.encode_batch_fast(list(texts[first : first + chunk]))
        pieces += [np.array(encoding.ids[1:], dtype=np.uint16) for encoding in encodings]
    return np.concatenate(pieces)


def read_tokens(folder: Path, part: str) -> NDArray[np.uint16]:
    """One part of what `prepare` wrote."""
    with lzma.open(folder / f"{part}.npy.xz", "rb") as file:
        return np.load(file)


def entropy(counts: NDArray[np.int64]) -> float:
    """Of a token drawn with these counts, in nats: the loss of a model that sees no context."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def initialised(options: argparse.Namespace, counts: NDArray[np.int64]) -> BertForMaskedLM:
    """A stock BERT without dropout that starts from the frequencies of the tokens.

    They go into the output's bias: learning them otherwise drives the embeddings into one direction, and a small
    encoder may stay there, on the plateau where it knows frequencies and no context. `--residual-scale` shrinks what
    each branch adds at first.
    """
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        max_position_embeddings=options.length,
        initializer_range=options.deviation,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        model.cls.predictions.bias.copy_(torch.from_numpy((counts + 1) / (counts + 1).sum()).log())
        for name, weight in model.bert.encoder.named_parameters():
            if name.endswith("output.dense.weight"):
                weight.mul_(options.residual_scale)
    return model


def masked_loss(
    model: BertForMaskedLM,
    tokens: Int[Tensor, "batch length"],
    positions: Int[Tensor, "hidden"],
    answers: Int[Tensor, "hidden"],
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of `answers` at `positions` of the flattened batch; the other logits are not made.

    Walks the layers itself: the model's own `forward` builds a mask when compiled, which rules flash attention out.
    """
    hidden = model.bert.embeddings(tokens)
    for layer in model.bert.encoder.layer:
        hidden = layer.feed_forward_chunk(layer.attention(hidden)[0])
    logits = model.cls(hidden.flatten(0, 1).index_select(0, positions))
    return cross_entropy(logits.float(), answers)


def drawn(stream: Int[Tensor, "tokens"], length: int, batch: int, dice: torch.Generator) -> Int[Tensor, "batch length"]:
    """Random windows of `length` tokens, `[CLS]` and `[SEP]` around the text."""
    chance = torch.rand(batch, generator=dice, device=stream.device, dtype=torch.float64)
    starts = (chance * (len(stream) - length + 2)).long()
    return framed(stream[starts[:, None] + torch.arange(length - 2, device=stream.device)].long())


def framed(text: Int[Tensor, "batch text"]) -> Int[Tensor, "batch text+2"]:
    """Each row with `[CLS]` before and `[SEP]` after it."""
    column = text.new_ones(len(text), 1)
    return torch.cat([column * BEGIN, text, column * END], dim=1)


def hide(
    windows: Int[Tensor, "batch length"], dice: torch.Generator, masks: float, randoms: float
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "hidden"], Int[Tensor, "hidden"]]:
    """The windows with some tokens hidden, the hidden positions of the flattened batch, and what stood there.

    In every window the same number is hidden, `HIDDEN_SHARE` of its text, and no special token: of these, the share
    `masks` becomes `[MASK]`, the share `randoms` any token.
    """
    few = round(HIDDEN_SHARE * (windows.shape[1] - 2))
    order = torch.rand(windows.shape, generator=dice, device=windows.device)
    chosen = order.masked_fill(windows < len(SPECIAL_TOKENS), -1).topk(few, dim=1).indices
    positions = (chosen + torch.arange(len(windows), device=windows.device)[:, None] * windows.shape[1]).flatten()
    answers = windows.flatten()[positions]
    kind = torch.rand(answers.shape, generator=dice, device=windows.device)
    anything = torch.randint(len(SPECIAL_TOKENS), VOCABULARY, answers.shape, generator=dice, device=windows.device)
    shown = torch.where(kind < masks, MASK, torch.where(kind < masks + randoms, anything, answers))
    return windows.flatten().index_copy(0, positions, shown).view_as(windows), positions, answers


def train(model: BertForMaskedLM, stream: Int[Tensor, "tokens"], plain: float, options: Any) -> dict[str, Any]:
    """Train `model` in place for `options.minutes`; the steps and the losses on the way, means since the last one.

    The learning rate warms up over steps and falls linearly with the clock, so that it reaches zero on any machine.
    `plain` is the entropy of single tokens: a run that does not get below it by `options.give_up` ends the script.
    """
    optimizer = adamw(model, options.peak)
    dice = torch.Generator(options.device).manual_seed(options.seed)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        return hide(drawn(stream, options.length, options.batch, dice), dice, SHOWN_MASK, SHOWN_RANDOM)

    loss_of = masked_loss if options.eager else compiled_loss(model, batch(), options.device)
    history: list[dict[str, float]] = []
    total, step, passed, seconds = torch.zeros((), device=options.device), 0, 0.0, 60 * options.minutes
    began = time.perf_counter()
    while passed < 1:
        step += 1
        rate = options.peak * min(1.0, step / options.warmup) * (1 - passed)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with mixed_precision(options.device):
            loss = loss_of(model, *batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        passed = (time.perf_counter() - began) / seconds
        if step % options.log_every == 0:
            mean = finite(total / options.log_every, step)  # waits for the device
            total.zero_()
            history.append({"step": step, "seconds": round(passed * seconds, 1), "loss": round(mean, 4)})
            say(f"step {step}: loss {mean:.3f}, rate {rate:.1e}")
            if passed > options.give_up and mean > plain - PLATEAU:
                raise SystemExit(f"loss {mean:.3f} at step {step}: still on the plateau of single tokens ({plain:.3f})")
    return {"steps": step, "entropy_of_single_tokens": round(plain, 4), "history": history}


def compiled_loss(model: BertForMaskedLM, batch: tuple[Tensor, Tensor, Tensor], device: str) -> Loss:
    """`masked_loss` compiled, tried on one batch; as it is when the compiler fails, because device time is short."""
    compiled = torch.compile(masked_loss, dynamic=False)
    try:
        for _ in range(3):
            with mixed_precision(device):
                loss = compiled(model, *batch)
            loss.backward()
            float(loss.detach())
        say("compiled")
        return compiled
    except RuntimeError as failure:
        say(f"not compiled, training goes on without: {failure}"[:500])
        return masked_loss
    finally:
        model.zero_grad(set_to_none=True)


def adamw(model: BertForMaskedLM, peak: float) -> torch.optim.AdamW:
    """The optimizer; biases and norms are not decayed."""
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-8, fused=True)


def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 autocast on a GPU; on a CPU, where it is slower than float32, nothing."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def finite(loss: Tensor, step: int) -> float:
    """`loss` as a number; ends the run when it is none."""
    value = float(loss)
    if not math.isfinite(value):
        raise SystemExit(f"the loss is {value} at step {step}: use a lower --peak")
    return value


def save(model: BertForMaskedLM, data: Path, output: Path) -> None:
    """Write model (bfloat16, files of at most 15 MB) and tokenizer as Hugging Face reads them. `model` changes too."""
    model.to(torch.bfloat16).save_pretrained(output, max_shard_size="15MB")
    for file in output.glob("*.safetensors"):
        file.chmod(0o644)  # they are written for their owner alone
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    FastTokenizer(
        tokenizer_file=str(data / "tokenizer.json"),
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **names,
    ).save_pretrained(output)


@torch.no_grad()
def evaluated(
    model: BertForMaskedLM, held_out: NDArray[np.uint16], counts: NDArray[np.int64], options: argparse.Namespace
) -> dict[str, float | int]:
    """The saved model by its own `forward` on hidden tokens of held-out windows, all `[MASK]`, the same in every run.

    Beside it what the most frequent token and the frequencies of the training text reach on the same tokens.
    """
    dice = torch.Generator().manual_seed(EVALUATION_SEED)
    text = options.length - 2
    whole = torch.from_numpy(held_out.astype(np.int64))[: len(held_out) // text * text].view(-1, text)
    tokens, positions, answers = hide(framed(whole[: options.windows]), dice, masks=1.0, randoms=0.0)
    places, wanted = positions.view(len(tokens), -1), answers.view(len(tokens), -1)
    nats, right = 0.0, 0
    for part, place, want in zip(tokens.split(32), places.split(32), wanted.split(32), strict=True):
        logits = model(part.to(model.device)).logits.cpu().float().flatten(0, 1)
        rows = logits[place.flatten() - place[0, 0] // options.length * options.length]
        nats += float(cross_entropy(rows, want.flatten(), reduction="sum"))
        right += int((rows.argmax(-1) == want.flatten()).sum())
    shares = (counts + 1) / (counts + 1).sum()
    return {
        "windows": len(tokens),
        "masked_tokens": len(answers),
        "accuracy": round(right / len(answers), 4),
        "perplexity": round(math.exp(nats / len(answers)), 3),
        "accuracy_of_most_frequent_token": round(float((answers == int(counts.argmax())).float().mean()), 4),
        "perplexity_of_frequencies": round(float(np.exp(-np.log(shares[answers.numpy()]).mean())), 3),
    }


@torch.no_grad()
def filled(model: BertForMaskedLM, folder: Path) -> str:
    """The five words that the model in `folder` likes best in a gap: something for a person to look at."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(GAP, return_tensors="pt").to(model.device)
    gap = model(**tokens).logits[tokens["input_ids"] == MASK][0]
    return ", ".join(tokenizer.decode([token]) for token in gap.topk(5).indices.tolist())


def say(line: str) -> None:
    """A line of the log, with the seconds since the script began."""
    print(f"{time.perf_counter() - STARTED:6.1f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
