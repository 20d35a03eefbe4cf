"""A tokenizer for the tiny encoder, made in memory: BERT's special tokens, and pieces of one to three letters."""

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tiny_models import VOCABULARY, tiny
from tiny_tokenizer import prose

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
PAD, UNKNOWN, BEGIN, END, MASK = range(len(SPECIAL))
LETTERS = "aeionrstlh"  # those of `prose`


def encoder_tokenizer(**changes: str | None) -> PreTrainedTokenizerFast:
    """`[CLS]` before and `[SEP]` after a text. `changes`: special tokens by role, None for one that is missing."""
    return PreTrainedTokenizerFast(tokenizer_object=_words(), model_max_length=64, **{**SPECIAL, **changes})


@cache
def _words() -> Tokenizer:
    pieces = [*SPECIAL.values(), *LETTERS, *("##" + letter for letter in LETTERS)]
    pieces += ["##" + one + other for one in LETTERS for other in LETTERS]
    tokenizer = Tokenizer(
        models.WordPiece({piece: place for place, piece in enumerate(pieces[:VOCABULARY])}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", BEGIN), ("[SEP]", END)]
    )
    return tokenizer


def save_encoder(folder: Path, **changes: Any) -> Path:
    """A tiny BERT, its tokenizer, and text.txt."""
    tiny("bert", **changes).save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(prose(600))
    return folder
