import json
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from halfbyte.calibration.encoders import Frame
from halfbyte.calibration.text import tokenize
from halfbyte.errors import CalibrationError, ModelError
from halfbyte.evaluation.drift import negative_log_likelihood
from halfbyte.evaluation.perplexity import evaluate, text_windows
from tiny_models import VOCABULARY, tiny
from tiny_tokenizer import prose, tiny_tokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
TEXT = prose(120)


def pair(seed: int = 0, **overrides):
    return tiny("llama", seed=seed, **overrides), tiny_tokenizer()


@pytest.fixture
def reference_model() -> Path:
    folder = SHARED / "models" / "ref-llama-22m"
    assert folder.is_dir(), f"the reference models are missing: {folder}"
    return folder


def test_the_reference_model_has_its_known_perplexity(reference_model):
    """The expected value was computed once with transformers' own loss over the same four windows."""
    found = evaluate(
        reference_model, text=SHARED / "data" / "wiki" / "test.txt", window=256, limit_windows=4, device="cpu"
    )
    assert found.perplexity == pytest.approx(37.0324, abs=1e-3)
    assert (found.tokens, found.window, found.dtype, found.bos) == (1024, 256, "float32", False)


def by_transformers(model, tokenizer, window: int) -> float:
    ids = tokenize(TEXT, tokenizer)
    windows = ids[: len(ids) // window * window].view(-1, window)
    losses = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in windows]
    return math.exp(sum(losses) / len(losses))


def test_perplexity_is_the_mean_of_transformers_own_loss():
    expected = by_transformers(*pair(), 33)
    assert evaluate(pair(), text=TEXT, window=33).perplexity == pytest.approx(expected, rel=1e-5)


def unshifted(logits, targets):
    return negative_log_likelihood(logits, targets.roll(1))


def in_bits(logits, targets):
    return negative_log_likelihood(logits, targets) / math.log(2)


def without_the_last_token(logits, targets):
    return negative_log_likelihood(logits[:-1], targets[:-1])


@pytest.mark.parametrize("bug", [unshifted, in_bits, without_the_last_token])
def test_the_comparison_with_transformers_notices(bug, monkeypatch):
    expected = by_transformers(*pair(), 33)
    monkeypatch.setattr("halfbyte.evaluation.perplexity.negative_log_likelihood", bug)
    assert evaluate(pair(), text=TEXT, window=33).perplexity != pytest.approx(expected, rel=1e-3)


def test_accuracy_is_the_share_of_next_tokens_that_are_held_most_likely():
    model, tokenizer = pair()
    (ids,) = text_windows(TEXT, tokenizer, 60, limit=1)
    right = (model(input_ids=ids[None]).logits[0, :-1].argmax(1) == ids[1:]).sum()
    assert evaluate((model, tokenizer), text=TEXT, window=60, limit_windows=1).accuracy == int(right) / 59


def test_windows_do_not_overlap_and_the_last_partial_one_is_dropped():
    ids = tokenize(TEXT, tiny_tokenizer())
    windows = text_windows(TEXT, tiny_tokenizer(), 50)
    assert len(windows) == len(ids) // 50 > 3
    assert torch.equal(windows.flatten(), ids[: windows.numel()])
    assert torch.equal(text_windows(TEXT, tiny_tokenizer(), 50, limit=2), windows[:2])


def test_with_bos_every_token_of_the_text_is_predicted():
    bos = Frame((tiny_tokenizer().bos_token_id,))
    windows = text_windows(TEXT, tiny_tokenizer(), 50, frame=bos)
    assert torch.equal(windows.flatten(), tokenize(TEXT, tiny_tokenizer())[: len(windows) * 49])
    assert bos.around(windows)[:, 0].tolist() == [tiny_tokenizer().bos_token_id] * len(windows)
    with_bos, without = (evaluate(pair(), text=TEXT, window=50, bos=bos) for bos in (True, False))
    assert (with_bos.bos, without.bos) == (True, False)
    assert (with_bos.predicted, without.predicted) == (len(windows) * 49, without.tokens // 50 * 49)
    assert with_bos.perplexity != without.perplexity


def test_a_model_is_no_distance_from_itself():
    found = evaluate(pair(), against=pair(), text=TEXT, window=40)
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_drift_grows_with_the_disturbance():
    original = pair()
    small, large = (pair()[0] for _ in range(2))
    for model, strength in ((small, 0.01), (large, 0.1)):
        weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        weight.add_(strength * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    near, far = (
        evaluate((model, tiny_tokenizer()), against=original, text=TEXT, window=40) for model in (small, large)
    )
    means, quantiles, agreements = zip(*((e.kl_mean, e.kl_p99, e.top1_agreement) for e in (near, far)), strict=True)
    assert 0 < means[0] < means[1]
    assert means[0] < quantiles[0] < quantiles[1]
    assert agreements[1] <= agreements[0] <= 1


def test_json_has_exactly_the_promised_keys():
    found = evaluate(pair(), text=TEXT, window=40, limit_windows=1)
    told = json.loads(json.dumps(found.to_json()))
    assert set(told) == {
        "perplexity", "accuracy", "task", "tokens", "predicted", "window", "kl_mean", "kl_p99", "top1_agreement", "model",
        "recipe", "against", "kv_cache", "bos", "seed", "dtype", "seconds",
    }  # fmt: skip
    assert (told["kl_mean"], told["kl_p99"], told["top1_agreement"], told["against"]) == (None, None, None, None)
    assert (told["task"], told["predicted"], told["seed"]) == ("next", 39, None)
    assert told["model"] == "LlamaForCausalLM"


def test_progress_counts_the_windows():
    told = []
    evaluate(pair(), text=TEXT, window=40, limit_windows=3, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_text_may_be_a_path_its_name_or_the_text_itself(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    found = [
        evaluate(pair(), text=text, window=40).perplexity
        for text in (TEXT, tmp_path / "text.txt", str(tmp_path / "text.txt"))
    ]
    assert len(set(found)) == 1


def test_a_text_too_short_for_one_window_says_so_in_numbers(tmp_path):
    with pytest.raises(CalibrationError, match=r"no file of that name\) has \d+ tokens and one window needs 2048"):
        evaluate(pair(), text=str(tmp_path / "tset.txt"))
    (tmp_path / "short.txt").write_text(prose(3))
    tokens = len(tokenize(prose(3), tiny_tokenizer()))
    with pytest.raises(CalibrationError, match=rf"the text has {tokens} tokens and one window needs 63"):
        evaluate(pair(), text=tmp_path / "short.txt", window=64, bos=True)


def test_a_missing_file_is_not_taken_for_a_text(tmp_path):
    with pytest.raises(CalibrationError, match="no text file"):
        evaluate(pair(), text=tmp_path / "tset.txt")


@pytest.mark.parametrize(("window", "limit"), [(1, None), (40, 0)])
def test_windows_that_predict_nothing_are_refused(window, limit):
    with pytest.raises(CalibrationError, match="predict nothing"):
        evaluate(pair(), text=TEXT, window=window, limit_windows=limit)


def test_a_window_beyond_the_models_positions_is_refused():
    with pytest.raises(CalibrationError, match=r"65 tokens are longer than the model's 64 positions: .*--window"):
        evaluate(pair(), text=TEXT, window=65)


def test_models_of_different_vocabularies_cannot_be_compared():
    with pytest.raises(ModelError, match=f"vocabularies of {VOCABULARY} and {VOCABULARY + 8} tokens"):
        evaluate(pair(), against=pair(vocab_size=VOCABULARY + 8), text=TEXT, window=40)
    other = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, unk_token="<new>")
    with pytest.raises(ModelError, match="number their tokens differently"):
        evaluate(pair(), against=(pair()[0], other), text=TEXT, window=40)


def test_the_wrong_tokenizer_is_noticed():
    with pytest.raises(CalibrationError, match="wrong"):
        evaluate(pair(vocab_size=20), text=TEXT, window=40)


def test_a_tokenizer_without_bos_cannot_begin_windows_with_it():
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(CalibrationError, match="no BOS"):
        evaluate((pair()[0], bare), text=TEXT, window=40, bos=True)


def test_a_model_that_answers_nan_is_not_measured():
    model, tokenizer = pair()
    model.get_parameter("model.norm.weight").fill_(torch.nan)
    with pytest.raises(ModelError, match="window 1 with NaN or Inf"):
        evaluate((model, tokenizer), text=TEXT, window=40)
