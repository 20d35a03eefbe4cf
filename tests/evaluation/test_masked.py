"""What an encoder is asked, and what it is found to know."""

import json
import math
import re

import pytest
import torch
from typer.testing import CliRunner

from halfbyte.calibration.encoders import HIDDEN_SHARE, masking_of
from halfbyte.calibration.text import tokenize
from halfbyte.cli import app
from halfbyte.errors import CalibrationError, ModelError
from halfbyte.evaluation.drift import drift
from halfbyte.evaluation.masked import Question, masked_questions
from halfbyte.evaluation.perplexity import evaluate, text_windows
from halfbyte.runtime.generate import generate
from tiny_encoder import BEGIN, END, MASK, encoder_tokenizer, save_encoder
from tiny_models import VOCABULARY, tiny
from tiny_tokenizer import prose, tiny_tokenizer

TEXT = prose(150)


def pair(seed: int = 0, **overrides):
    return tiny("bert", seed=seed, **overrides), encoder_tokenizer()


def asked(window: int = 40, limit: int | None = None, seed: int = 0) -> list[Question]:
    masking = masking_of(encoder_tokenizer())
    return masked_questions(text_windows(TEXT, encoder_tokenizer(), window, limit, masking.frame), masking, seed)


def by_transformers(model, window: int) -> tuple[float, float]:
    """Perplexity by transformers' own loss over labels, and accuracy, window by window."""
    losses, hits = [], []
    for question in asked(window):
        labels = torch.full_like(question.shown, -100)
        labels[question.places] = question.answers
        found = model(input_ids=question.shown[None], labels=labels[None])
        losses.append(float(found.loss))
        hits += (found.logits[0].argmax(dim=1) == labels)[labels >= 0].tolist()
    return math.exp(sum(losses) / len(losses)), sum(hits) / len(hits)


def knowing(model):
    """The model with an output that knows frequencies, so that its accuracy is not that of chance."""
    count = torch.bincount(tokenize(TEXT, encoder_tokenizer()), minlength=VOCABULARY)
    model.cls.predictions.bias.copy_((count + 1).log())
    return model


def test_perplexity_and_accuracy_are_those_of_transformers_own_loss():
    model, tokenizer = pair()
    expected = by_transformers(knowing(model), 40)
    found = evaluate((model, tokenizer), text=TEXT, window=40)
    assert (found.perplexity, found.accuracy) == pytest.approx(expected, rel=1e-5)
    assert found.accuracy > 0


def beside(texts, masking, seed):
    return [Question(q.shown, q.places - 1, q.answers) for q in masked_questions(texts, masking, seed)]


def unhidden(texts, masking, seed):
    return [
        Question(q.shown.index_copy(0, q.places, q.answers), q.places, q.answers)
        for q in masked_questions(texts, masking, seed)
    ]


def what_is_shown(texts, masking, seed):
    return [Question(q.shown, q.places, q.shown[q.places]) for q in masked_questions(texts, masking, seed)]


@pytest.mark.parametrize("bug", [beside, unhidden, what_is_shown])
def test_the_comparison_with_transformers_notices(bug, monkeypatch):
    model, tokenizer = pair()
    expected = by_transformers(knowing(model), 40)
    monkeypatch.setattr("halfbyte.evaluation.perplexity.masked_questions", bug)
    found = evaluate((model, tokenizer), text=TEXT, window=40)
    assert found.perplexity != pytest.approx(expected[0], rel=1e-3)


def test_windows_are_framed_and_their_texts_do_not_overlap():
    ids, questions = tokenize(TEXT, encoder_tokenizer()), asked(40)
    assert len(questions) == len(ids) // 38
    whole = torch.cat([q.shown.index_copy(0, q.places, q.answers)[1:-1] for q in questions])
    assert torch.equal(whole, ids[: len(whole)])
    assert all((q.shown[0], q.shown[-1]) == (BEGIN, END) for q in questions)
    assert all((q.shown == MASK).sum() == len(q.places) == round(HIDDEN_SHARE * 38) for q in questions)


def test_the_seed_hides_the_same_tokens_however_many_windows_are_measured():
    few, many, other = asked(40, limit=2), asked(40), asked(40, seed=1)
    assert all(torch.equal(one.shown, two.shown) for one, two in zip(few, many, strict=False))
    assert any(not torch.equal(one.places, two.places) for one, two in zip(many, other, strict=True))


def test_the_window_is_all_that_the_encoder_reads_unless_given():
    found = evaluate(pair(), text=TEXT)
    assert (found.window, found.task, found.seed, found.bos) == (64, "masked", 0, False)
    assert found.tokens % 64 == 0
    assert found.predicted == found.tokens // 64 * round(HIDDEN_SHARE * 62)
    assert evaluate(pair(max_position_embeddings=32), text=TEXT).window == 32


def test_a_model_is_no_distance_from_itself_and_drift_grows_with_the_disturbance():
    same = evaluate(pair(), against=pair(), text=TEXT, window=40)
    assert (same.kl_mean, same.kl_p99, same.top1_agreement) == (0.0, 0.0, 1.0)
    found = []
    for strength in (0.02, 0.2):
        model, tokenizer = pair()
        weight = model.get_parameter("bert.encoder.layer.0.output.dense.weight")
        weight.add_(strength * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        found.append(evaluate((model, tokenizer), against=pair(), text=TEXT, window=40))
    assert 0 < found[0].kl_mean < found[1].kl_mean
    assert found[1].top1_agreement <= found[0].top1_agreement <= 1


def test_drift_is_measured_at_the_masks_alone(monkeypatch):
    seen = []

    def noticed(original, quantized):
        seen.append((len(original), len(quantized)))
        return drift(original, quantized)

    monkeypatch.setattr("halfbyte.evaluation.perplexity.drift", noticed)
    evaluate(pair(), against=pair(), text=TEXT, window=40, limit_windows=2)
    assert seen == [(round(HIDDEN_SHARE * 38),) * 2] * 2


def test_a_window_beyond_what_the_encoder_reads_is_refused():
    with pytest.raises(CalibrationError, match=r"65 tokens are longer than the 64 that this encoder .*--window"):
        evaluate(pair(), text=TEXT, window=65)
    with pytest.raises(CalibrationError, match=r"40 tokens are longer than the 32 that this encoder .*--window"):
        evaluate(pair(), against=pair(max_position_embeddings=32), text=TEXT, window=40)


def test_a_window_without_room_for_text_is_refused():
    with pytest.raises(CalibrationError, match="windows of 2 tokens predict nothing: ask for 1 of 3 tokens at least"):
        evaluate(pair(), text=TEXT, window=2)


def test_a_text_too_short_for_one_window_says_so_in_numbers():
    with pytest.raises(CalibrationError, match=r"has \d+ tokens and one window needs 62: give a longer text"):
        evaluate(pair(), text=prose(3))


def test_a_tokenizer_without_a_mask_token_is_refused():
    with pytest.raises(CalibrationError, match="no mask token: use the tokenizer in the model's own folder"):
        evaluate((tiny("bert"), encoder_tokenizer(mask_token=None)), text=TEXT)


def test_bos_is_for_decoders():
    with pytest.raises(CalibrationError, match="leave --bos out"):
        evaluate(pair(), text=TEXT, bos=True)


def test_an_encoder_and_a_decoder_cannot_be_compared():
    with pytest.raises(ModelError, match="one of the models fills masks and the other predicts the next token"):
        evaluate(pair(), against=(tiny("llama"), tiny_tokenizer()), text=TEXT)


def test_an_encoder_that_answers_nan_is_not_measured():
    model, tokenizer = pair()
    model.cls.predictions.bias.fill_(torch.nan)
    with pytest.raises(ModelError, match="window 1 with NaN or Inf"):
        evaluate((model, tokenizer), text=TEXT)


def test_an_encoder_generates_nothing_and_is_sent_elsewhere():
    with pytest.raises(ModelError, match=r"BertForMaskedLM fills masks .*\[MASK\] in it, or measure it"):
        generate(pair(), "the rain")


def test_the_command_line_tells_what_was_found(tmp_path):
    folder = save_encoder(tmp_path / "bert")
    words = [
        "evaluate",
        folder,
        "--against",
        folder,
        "--text",
        folder / "text.txt",
        "--limit-windows",
        3,
        "--json",
        "-",
    ]
    result = CliRunner().invoke(
        app, [str(word) for word in [*words, "--device", "cpu"]], env={"COLUMNS": "200", "NO_COLOR": "1"}
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["task"], found["tokens"], found["predicted"], found["kl_mean"]) == ("masked", 192, 27, 0.0)
    assert re.search(r"hidden tokens found +\d+\.\d\d %", result.stderr)
    assert "27 hidden, seed 0" in result.stderr
