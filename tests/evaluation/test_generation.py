import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from evaluation.tiny_text import tiny_tokenizer
from gangline.benchmarks.shapes import shape_config
from gangline.evaluation.generation import fixed_length, generate_greedy
from gangline.evaluation.prompts import TEXT, prompt_ids
from near_ties import agree_unless_tied, is_tied, share_off
from tiny_models import VOCABULARY, tiny_model


def test_greedy_logits_are_those_of_one_forward_pass(seed):
    model = tiny_model("mixtral", seed)

    @torch.no_grad()
    def attempt(draw):
        ids_BP = torch.randint(3, VOCABULARY, (2, 7))
        found = generate_greedy(model, ids_BP, 5)
        assert found.tokens_BN.shape == (2, 5)
        assert found.logits_BNV.shape == (2, 5, VOCABULARY)
        assert torch.equal(found.tokens_BN, found.logits_BNV.argmax(-1))
        ids_BP = torch.cat([ids_BP, found.tokens_BN[:, :-1]], dim=1)

        def whole():
            return model(ids_BP).logits[:, 6:]

        if share_off(found.logits_BNV, whole()) < 5e-5:
            return None
        return torch.no_grad()(lambda: is_tied(model, whole, lambda a, b: not share_off(a, b) < 2e-4))

    agree_unless_tied(attempt)


def test_generation_settings_of_the_model_do_not_count(seed):
    model = tiny_model("mixtral", seed)
    ids_BP = torch.randint(3, VOCABULARY, (1, 6))
    plain = generate_greedy(model, ids_BP, 8)
    every_token_ends = list(range(VOCABULARY))
    own = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=9.0, eos_token_id=every_token_ends, max_length=2
    )
    model.generation_config = own
    again = generate_greedy(model, ids_BP, 8)
    assert torch.equal(plain.tokens_BN, again.tokens_BN)
    assert model.generation_config is own


def test_settings_come_back_after_an_error(seed):
    model = tiny_model("mixtral", seed)
    before = model.generation_config
    with pytest.raises(ZeroDivisionError), fixed_length(model, 3):
        raise ZeroDivisionError
    assert model.generation_config is before


def test_encoder_decoder_models_generate_too(seed):
    model = AutoModelForSeq2SeqLM.from_config(shape_config("tiny-switch")).eval()
    found = generate_greedy(model, torch.randint(3, model.config.vocab_size, (2, 7)), 4)
    assert found.tokens_BN.shape == (2, 4)
    assert torch.equal(found.tokens_BN, found.logits_BNV.argmax(-1))


def test_text_prompts_are_windows_of_the_text(seed):
    tokenizer = tiny_tokenizer()
    ids = prompt_ids(tokenizer, VOCABULARY, 4, 20, seed)
    assert ids.shape == (4, 20)
    for row in ids:
        assert tokenizer.decode(row) in tokenizer.decode(tokenizer(TEXT)["input_ids"])
    assert len({tuple(row.tolist()) for row in ids}) == 4
    assert torch.equal(ids, prompt_ids(tokenizer, VOCABULARY, 4, 20, seed))
    assert not torch.equal(ids, prompt_ids(tokenizer, VOCABULARY, 4, 20, seed + 1))


def test_a_prompt_may_be_longer_than_the_text(seed):
    ids = prompt_ids(tiny_tokenizer(), VOCABULARY, 2, 3 * len(TEXT), seed)
    assert ids.shape == (2, 3 * len(TEXT))


def test_random_prompts_without_a_tokenizer(seed):
    ids = prompt_ids(None, VOCABULARY, 3, 50, seed)
    assert ids.shape == (3, 50)
    assert 0 <= int(ids.min()) <= int(ids.max()) < VOCABULARY
    assert torch.equal(ids, prompt_ids(None, VOCABULARY, 3, 50, seed))
