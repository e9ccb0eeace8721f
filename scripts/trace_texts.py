"""Texts to record traces of: English, French, Python code, and parallel paragraphs of two languages.

They come from Debian packages, so that everyone can make the same traces:

    python scripts/trace_texts.py texts
    for name in english french python; do
        gangline trace demo --data texts/$name.jsonl -o traces/$name --logits --predictions
    done
    gangline trace demo --data texts/parallel.jsonl -o traces/parallel --logits
    gangline report traces/english traces/french traces/python traces/parallel -o report

debian-handbook
    the handbook in 25 languages, one folder of HTML each (``usr/share/doc/debian-handbook/html/fr-FR``). A
    paragraph has the same place in every language; paragraphs that nobody translated yet are left out.
libpython3.11-stdlib
    Python sources (``usr/lib/python3.11``).

Each file holds documents of about ``--words`` words, and as many as make up ``--documents``.
"""

import argparse
import json
import re
from pathlib import Path

from demo_text import html_to_text, unpack

HANDBOOK = "usr/share/doc/debian-handbook/html"
SOURCES = "usr/lib/python3.11"
SECOND = "fr-FR"
LEAST_WORDS = 25

Paragraphs = dict[tuple[str, int], str]


def paragraphs(folder: Path) -> Paragraphs:
    """Return the paragraphs of a handbook by page and number."""
    found = {}
    for page in sorted(folder.glob("*.html")):
        parts = re.split(r'<div class="para">', page.read_text(encoding="utf-8"))[1:]
        for number, part in enumerate(parts):
            inside = re.split(r"</div>|<pre", part, maxsplit=1)[0]
            found[page.stem, number] = " ".join(html_to_text(f"<p>{inside}</p>").split())
    return found


def translated(one: Paragraphs, other: Paragraphs) -> list[tuple[str, int]]:
    """Return the places at which both languages have a paragraph of their own."""
    return [
        place
        for place, text in one.items()
        if other.get(place, text) != text and min(len(text.split()), len(other[place].split())) >= LEAST_WORDS
    ]


def pages(text: Paragraphs, places: list[tuple[str, int]]) -> list[str]:
    """Join the paragraphs of each page."""
    names = dict.fromkeys(page for page, _ in places)
    return ["\n\n".join(text[place] for place in places if place[0] == name) for name in names]


def cut(texts: list[str], words: int, documents: int) -> list[str]:
    """Cut texts into pieces of ``words`` words, taken from the texts in turn."""
    pieces = [re.findall(rf"(?:\S+\s*){{1,{words}}}", text) for text in texts]
    pieces = [[p for p in parts if len(p.split()) >= words // 2] for parts in pieces]
    rounds = max(map(len, pieces), default=0)
    return [parts[n] for n in range(rounds) for parts in pieces if n < len(parts)][:documents]


def python_sources(folder: Path) -> list[str]:
    """Return public modules of the standard library, without the licence and the summary on top."""
    paths = [path for path in sorted(folder.glob("[a-z]*.py")) if path.is_file()]
    return [path.read_text(encoding="utf-8")[3000:] for path in paths]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} documents, {sum(len(row['text'].split()) for row in rows)} words")


def main() -> None:
    """Write all texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--words", type=int, default=250)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument(
        "--packages", type=Path, help="where to unpack the packages (default: OUTPUT/packages)"
    )
    options = parser.parse_args()
    work = options.packages or options.output / "packages"
    options.output.mkdir(parents=True, exist_ok=True)
    handbook = unpack("debian-handbook", work) / HANDBOOK
    english, second = paragraphs(handbook / "en-US"), paragraphs(handbook / SECOND)
    places = translated(english, second)
    # A reader of one language must not meet the very paragraphs that the other one reads.
    names = list(dict.fromkeys(page for page, _ in places))
    halves = [[p for p in places if names.index(p[0]) % 2 == half] for half in (0, 1)]
    for name, text, half in (("english", english, halves[0]), ("french", second, halves[1])):
        pieces = cut(pages(text, half), options.words, options.documents)
        write(options.output / f"{name}.jsonl", [{"text": piece, "domain": name} for piece in pieces])
    sources = python_sources(unpack("libpython3.11-stdlib", work) / SOURCES)
    pieces = cut(sources, options.words, options.documents)
    write(options.output / "python.jsonl", [{"text": piece, "domain": "python"} for piece in pieces])
    step = max(1, len(places) // options.pairs)
    rows = [
        {"text": text[place], "lang": lang, "pair": f"{place[0]}:{place[1]}"}
        for place in places[::step][: options.pairs]
        for lang, text in (("en", english), ("fr", second))
    ]
    write(options.output / "parallel.jsonl", rows)


if __name__ == "__main__":
    main()
