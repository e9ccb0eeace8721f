"""A tiny dense Llama on disk, and the demo model made once per session."""

import shutil
from pathlib import Path

import pytest
import torch

from gangline.compress.demo import ensure_demo


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(125)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(autouse=True)
def seeded(seed):
    """Every test here draws from torch: seed it."""


@pytest.fixture
def tiny_llama(tmp_path_factory, tokenizer, seeded) -> Path:
    """Random Llama, 3 layers, grouped-query attention, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def words(seeded) -> str:
    """Random text in the tiny tokenizer's vocabulary."""
    return " ".join(f"w{int(i)}" for i in torch.randint(0, 125, (2000,)))


@pytest.fixture(scope="session")
def demo() -> Path:
    """The real demo model: converted into the user's cache once, found there later."""
    return ensure_demo(progress=False)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache folder of gangline."""
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
