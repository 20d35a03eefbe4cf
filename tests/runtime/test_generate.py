import pytest
import torch
from packed_folders import packed_folder

from halfbyte.errors import ModelError
from halfbyte.runtime.generate import generate
from tiny_models import tiny
from tiny_tokenizer import prose, tiny_tokenizer


def pair(**overrides):
    return tiny("llama", **overrides), tiny_tokenizer()


def test_it_continues_with_the_likeliest_tokens():
    model, tokenizer = pair(eos_token_id=None)
    prompt = prose(5)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(7):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(2)], dim=1)
    length = len(tokenizer(prompt)["input_ids"])
    assert generate((model, tokenizer), prompt, max_new_tokens=7) == tokenizer.decode(
        ids[0, length:], skip_special_tokens=True
    )


def test_sampling_is_repeatable_and_leaves_the_global_generator_alone():
    loaded, state = pair(), torch.get_rng_state()
    texts = [generate(loaded, prose(4), max_new_tokens=20, sample=True, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_packed_model_writes_from_its_folder(tmp_path):
    packed, dense = packed_folder(tmp_path, "mixtral")
    texts = [generate(folder, prose(4), max_new_tokens=8, device="cpu") for folder in (packed, dense)]
    assert texts[0] == texts[1]


def test_a_prompt_beyond_the_models_positions_is_refused():
    with pytest.raises(ModelError, match=r"\d+ tokens and 60 new ones are more than the model's 64 positions"):
        generate(pair(), prose(9), max_new_tokens=60)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ModelError, match="the prompt is empty"):
        generate(pair(), "")
