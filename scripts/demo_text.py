"""Text for the demo model: what Debian packages carry, and what the dense model itself answers.

Training text comes from TRAIN_PACKAGES and from the dense model's own answers to generated prompts; the
held-out text comes from HELD_OUT_PACKAGES, of which no file is ever read for training.
"""

import gzip
import html.parser
import itertools
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

# package -> (folder inside it, pattern of the files to read)
TRAIN_PACKAGES = {
    "anarchism": ("usr/share/doc/anarchism/html", "sec*.html"),
    "fortunes": ("usr/share/games/fortunes", "*"),
    "debian-faq": ("usr/share/doc/debian/FAQ", "*.en.html"),
    "debian-reference-en": ("usr/share/debian-reference", "*.en.html"),
    "developers-reference": ("usr/share/developers-reference", "*.html"),
    "harden-doc": ("usr/share/doc/harden-doc/html/en-US", "*.html"),
    "maint-guide": ("usr/share/doc/maint-guide/html", "*.en.html"),
}
HELD_OUT_PACKAGES = {
    "debian-handbook": ("usr/share/doc/debian-handbook/html/en-US", "*.html"),
    "python3.11-doc": ("usr/share/doc/python3.11/html/tutorial", "*.html"),
}

# fmt: off
TOPICS = (
    "the solar system", "photosynthesis", "the French Revolution", "making bread", "a lost dog",
    "the number pi", "friendship", "the ocean", "how computers store data", "the Roman Empire",
    "a haunted house", "healthy breakfast", "gravity", "learning the piano", "volcanoes",
    "the printing press", "a journey by train", "sorting algorithms", "vaccines", "a garden in spring",
    "the stock market", "Shakespeare", "saving water", "the internet", "dinosaurs", "chess",
    "public speaking", "electric cars", "honey bees", "the water cycle", "a wise old fisherman",
    "fractions", "democracy", "the human heart", "time management", "the moon landing", "recycling",
    "Python programming", "a dragon who is afraid of fire", "the history of tea", "probability",
    "mountain climbing", "black holes", "writing a letter", "the Silk Road", "sleep", "robots",
    "rice fields", "jazz music", "a small village", "climate", "the alphabet", "prime numbers", "football",
    "libraries", "earthquakes", "a lighthouse keeper", "coffee", "the Renaissance", "DNA", "bicycles",
    "winter", "job interviews", "whales", "magnets", "a broken clock", "rivers", "Linux",
    "the Great Wall of China", "cooking pasta", "stars", "kindness",
)
# fmt: on

TEMPLATES = [
    "What is {}?",
    "Explain {} to a child.",
    "Write a short story about {}.",
    "Give me three facts about {}.",
    "Why does {} matter? Answer in one paragraph.",
    "Write a poem about {}.",
    "I want to learn about {}. Where do I begin?",
    "List the steps someone should take who is interested in {}.",
    "Write an email to a friend about {}.",
    "What are the advantages and disadvantages of {}?",
    "Summarize what is known about {} in two sentences.",
    "Ask me a question about {} and then answer it.",
]


class _Text(html.parser.HTMLParser):
    SKIP = frozenset({"script", "style", "head", "nav", "title"})
    BREAK = frozenset({"p", "div", "li", "h1", "h2", "h3", "h4", "pre", "tr", "br", "dt", "dd"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in self.SKIP
        if tag in self.BREAK:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping -= tag in self.SKIP
        if tag in self.BREAK:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data)


def html_to_text(source: str) -> str:
    """Readable text of an HTML page, one paragraph a line, menus dropped where short."""
    parser = _Text()
    parser.feed(source)
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if len(line) > 40)


def unpack(package: str, work: Path) -> Path:
    """Download a Debian package with apt-get and unpack it under `work`; returns the unpacked folder."""
    target = work / package
    if not target.exists():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=work, check=True)
        deb = next(work.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", str(deb), str(target)], check=True)
    return target


def package_text(package: str, folder: str, pattern: str, work: Path) -> str:
    """All text of one package's files, in name order."""
    texts = []
    for path in sorted((unpack(package, work) / folder).glob(pattern)):
        if not path.is_file() or path.suffix in {".dat", ".u8", ".css", ".png"}:
            continue
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8", errors="replace")
        texts.append(html_to_text(text) if path.suffix == ".html" else text.replace("\n%\n", "\n\n"))
    return "\n\n".join(texts)


def chat_prompts(seed: int = 0) -> list[str]:
    """Every topic in every template, shuffled."""
    prompts = [template.format(topic) for topic, template in itertools.product(TOPICS, TEMPLATES)]
    random.Random(seed).shuffle(prompts)
    return prompts[-32:] + prompts[:-32]


def chat_ids(tokenizer: Any, model: Any, prompts: int = 384) -> torch.Tensor:
    """The dense model's own sampled answers to the first prompts, in its chat template, one after another."""
    torch.manual_seed(0)
    tokenizer.padding_side = "left"
    parts = []
    for start in range(0, prompts, 32):
        batch = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in chat_prompts()[start : start + 32]
        ]
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        outputs = model.generate(**inputs, do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=200)
        for mask, row in zip(inputs.attention_mask, outputs, strict=True):
            answer = row[len(mask) :].tolist()
            end = (
                answer.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in answer else len(answer)
            )
            parts.append(row[len(mask) - int(mask.sum()) : len(mask) + end])
    return torch.cat(parts)


def source_ids(name: str, tokenizer: Any, model: Any, work: Path) -> torch.Tensor:
    """Token ids of one source, kept in `work` between runs."""
    cached = work / f"{name}.pt"
    if not cached.exists():
        if name == "chat":
            ids = chat_ids(tokenizer, model)
        else:
            text = package_text(name, *(TRAIN_PACKAGES | HELD_OUT_PACKAGES)[name], work)
            ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        torch.save(ids, cached)
    return torch.load(cached)
