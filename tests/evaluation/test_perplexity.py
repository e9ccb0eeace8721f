import math

import pytest
import torch

from evaluation.tiny_text import tiny_tokenizer
from gangline.core.errors import UsageError
from gangline.evaluation.perplexity import perplexity
from tiny_models import tiny_model

TEXT = "the quick brown fox jumps over the lazy dog; " * 3


def test_equals_the_mean_over_windows(seed):
    model, tokenizer = tiny_model("mixtral", seed), tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    losses = []
    for start in range(0, len(ids), 32):
        window = torch.tensor([ids[start : start + 32]])
        if window.shape[1] > 1:
            with torch.no_grad():
                loss = model(window, labels=window).loss
            losses += [loss.item()] * (window.shape[1] - 1)
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model, tokenizer, TEXT, window=32) == pytest.approx(expected, rel=1e-4)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(seed):
    model, tokenizer = tiny_model("mixtral", seed), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, tokenizer, TEXT, window=16) == pytest.approx(model.config.vocab_size, rel=1e-4)


def test_last_window_of_one_token_is_left_out(seed):
    model, tokenizer = tiny_model("mixtral", seed), tiny_tokenizer()
    assert perplexity(model, tokenizer, "a" * 33, window=32) == pytest.approx(
        perplexity(model, tokenizer, "a" * 32, window=32), rel=1e-6
    )


@pytest.mark.parametrize(("text", "window"), [("", 8), ("a", 8), ("abc", 1), ("abc", 0)])
def test_nothing_to_predict_is_refused(text, window):
    with pytest.raises(UsageError, match="2 or more"):
        perplexity(None, tiny_tokenizer(), text, window=window)
