"""A tokenizer for the tiny models, trained in memory on the text that the tests read; nothing is downloaded."""

import random
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny_models import VOCABULARY

SPECIAL = ["<pad>", "<s>", "</s>"]  # 0, 1, 2 as in the tiny models' configurations


def prose(words: int, seed: int = 0) -> str:
    """Random words of two to nine letters, in lines and paragraphs."""
    draw = random.Random(seed)
    return "".join(
        "".join(draw.choices("aeionrstlh", k=draw.randint(2, 9))) + draw.choices([" ", "\n", "\n\n"], [12, 2, 1])[0]
        for _ in range(words)
    )


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs over the letters of `prose`; every other byte has no token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([prose(2000)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )
