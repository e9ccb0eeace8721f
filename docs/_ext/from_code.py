"""Write the parts of the reference that follow from the code, before Sphinx reads what includes them."""

import subprocess
import sys
from pathlib import Path

from sphinx.application import Sphinx


def write_cli(folder: Path) -> None:
    """Every command and flag, by typer's own generator."""
    command = [sys.executable, "-m", "typer", "gangline.cli.main", "utils", "docs", "--name", "gangline"]
    subprocess.run([*command, "--output", str(folder / "cli.md")], check=True, stdout=subprocess.DEVNULL)


def write_codecs(folder: Path) -> None:
    """Every format of expert weights with its true size."""
    from gangline.formats import codec_names, get_codec

    lines = ["| name | bits per weight, scales included |", "|---|---|"]
    lines += [f"| `{name}` | {get_codec(name).bits:g} |" for name in codec_names()]
    (folder / "codecs.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_policies(folder: Path) -> None:
    """Every composition with its parts."""
    from gangline.policies.compositions import COMPOSITIONS

    lines = [
        "| name | cache | slots | predictor | reads ahead | live | differs from the paper, or is left out |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in COMPOSITIONS.items():
        predictor = "" if found.predictor == "none" else f"`{found.predictor}`"
        if predictor and found.ahead:
            predictor += f", {found.ahead} ahead"
        prefetcher = "" if found.prefetcher is None else f"`{found.prefetcher}`"
        scope = "per layer" if found.scope == "layer" else "one pool"
        live = "exact" if found.exact else "approximate: `--mode mixed`"
        cells = (f"`{name}`", f"`{found.cache}`", scope, predictor, prefetcher, live, found.left_out)
        lines.append(f"| {' | '.join(cells)} |")
    (folder / "policies.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def generate(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "reference" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    write_cli(folder)
    write_codecs(folder)
    write_policies(folder)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
