"""A tokenizer of single characters, small enough for the tiny models."""

from pathlib import Path

from tiny_models import VOCABULARY, tiny_model

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


def tiny_tokenizer(*, chat: bool = True):
    """Return a tokenizer whose tokens are characters; ids below the tiny models' vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = "\n" + "".join(chr(code) for code in range(32, 123))
    words = ["<pad>", "<s>", "</s>", "<unk>", *characters][:VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if chat:
        found.chat_template = CHAT
    return found


def saved_model(
    folder: Path, family: str, seed: int, *, text: bool = True, chat: bool = True, shard: str = "1GB", **more
) -> Path:
    """Save a tiny random model, with a tokenizer unless ``text`` is false, and return its folder."""
    tiny_model(family, seed, **more).save_pretrained(folder, max_shard_size=shard)
    if text:
        tiny_tokenizer(chat=chat).save_pretrained(folder)
    return folder
