"""A tokenizer written into a GGUF file splits text in llama.cpp as it does in transformers."""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from checkpoint.gguf_models import tiny_model
from gangline.checkpoint.gguf import GGUFCheckpoint
from gangline.checkpoint.gguf_header import Strings, read_header
from gangline.checkpoint.gguf_writer import write_gguf
from gangline.core.errors import CheckpointError, GanglineError

_CORPUS = [
    "It's 1234 dogs pulling the sled's rope; they'd run 56 miles.",
    "ünïcode and   spaces\n\nlines",
    "x = y[12]",
] * 4
_TEXTS = ["The dogs' rope isn't 1234 miles", "  two  spaces\nline 7", "ünï 漢字 done.", "y = x[56];"]


def _byte_level(*steps: pre_tokenizers.PreTokenizer, regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *raw])
    pieces.train_from_iterator(_CORPUS, trainer)
    model = json.loads(pieces.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = pieces.normalizer
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


_KINDS = {
    "gpt-2": lambda: _byte_level(regex=True),
    "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "qwen2": lambda: _byte_level(pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), regex=False),
    "default": _byte_fallback,
}


def _folder(tmp_path: Path, tokenizer: Tokenizer, family: str = "olmoe", vocab_size: int = 450) -> Path:
    tiny_model(family, vocab_size=vocab_size, bos_token_id=None, eos_token_id=None).save_pretrained(tmp_path)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("rule", _KINDS)
def test_llama_cpp_splits_alike(tmp_path: Path, rule: str, seed: int) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = _folder(tmp_path, _KINDS[rule]())
    path = write_gguf(folder, tmp_path / "m.gguf", type="f32")
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    reference = AutoTokenizer.from_pretrained(folder)
    for text in _TEXTS:
        expected = reference(text)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == expected, text
    assert llama.token_bos() == reference.bos_token_id
    assert llama.token_eos() == reference.eos_token_id


@pytest.mark.parametrize("rule", ["gpt-2", "qwen2"])
def test_vocabulary_in_the_file(tmp_path: Path, rule: str, seed: int) -> None:
    path = write_gguf(_folder(tmp_path, _KINDS[rule]()), tmp_path / "m.gguf")
    metadata = read_header(path).metadata
    assert metadata["tokenizer.ggml.pre"] == rule
    assert metadata["tokenizer.ggml.tokens"] == Strings(450)
    kinds = metadata["tokenizer.ggml.token_type"]
    assert isinstance(kinds, tuple)
    assert kinds[:3] == (3, 3, 1)
    assert kinds[-1] == 5


@pytest.mark.parametrize("rule", _KINDS)
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_tokenizer_comes_back(tmp_path: Path, family: str, rule: str, seed: int) -> None:
    folder = _folder(tmp_path / "source", _KINDS[rule](), family)
    checkpoint = GGUFCheckpoint.open(write_gguf(folder, tmp_path / "m.gguf"))
    tokenizer, reference = checkpoint.tokenizer(), AutoTokenizer.from_pretrained(folder)
    assert tokenizer is not None
    # transformers reads spaces at the start of a text in another way than the tokenizer that was written.
    texts = [text for text in _TEXTS if rule != "default" or not text.startswith(" ")]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == reference(text)["input_ids"], text
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_tokenizer_beside_a_file_without_vocabulary(tmp_path: Path, seed: int) -> None:
    folder = _folder(tmp_path, _byte_level(pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), regex=False))
    checkpoint = GGUFCheckpoint.open(write_gguf(folder, tmp_path / "m.gguf"))
    tokenizer, reference = checkpoint.tokenizer(), AutoTokenizer.from_pretrained(folder)
    assert tokenizer is not None
    assert tokenizer("a dog")["input_ids"] == reference("a dog")["input_ids"]


def test_no_vocabulary_is_no_tokenizer(tmp_path: Path, seed: int) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    assert GGUFCheckpoint.open(write_gguf(tmp_path, tmp_path / "m.gguf")).tokenizer() is None


def test_unknown_splitting_rule_in_a_file_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    path = write_gguf(_folder(tmp_path / "source", _byte_level(regex=True)), tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0gpt-9"))
    with caplog.at_level(logging.WARNING, logger="gangline"):
        assert GGUFCheckpoint.open(path).tokenizer() is not None
    assert "'gpt-9'" in caplog.text


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = _folder(tmp_path_factory.mktemp("vocabulary") / "source", _byte_fallback())
    return write_gguf(folder, folder.parent / "m.gguf").read_bytes()


@settings(max_examples=40)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20))
def test_fuzzed_vocabulary_gives_a_tokenizer_or_our_error(tmp_path_factory, vocabulary_file, places) -> None:
    data = bytearray(vocabulary_file)
    first, last = data.index(b"tokenizer.ggml"), data.index(b"token_embd.weight")
    for place, value in places:
        data[first + int(place * (last - first - 1))] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed" / "vocabulary.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    try:
        tokenizer = GGUFCheckpoint.open(path).tokenizer()
        assert tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerFast)
    except GanglineError as error:
        assert "\n" not in str(error)


def test_unknown_rule_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    tokenizer = _byte_level(pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), regex=False)
    with caplog.at_level(logging.WARNING, logger="gangline"):
        path = write_gguf(_folder(tmp_path, tokenizer), tmp_path / "m.gguf")
    assert "without a vocabulary" in caplog.text
    assert read_header(path).metadata["tokenizer.ggml.model"] == "none"


def test_tokenizer_larger_than_the_model(tmp_path: Path, seed: int) -> None:
    with pytest.raises(CheckpointError, match="the model has 100"):
        write_gguf(_folder(tmp_path, _byte_level(regex=True), vocab_size=100), tmp_path / "m.gguf")


def test_broken_tokenizer_file(tmp_path: Path, seed: int) -> None:
    folder = _folder(tmp_path, _byte_level(regex=True))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        write_gguf(folder, tmp_path / "m.gguf")
