"""The `demo` model: a real MoE on any machine, made on first use from the dense SmolLM2-135M-Instruct."""

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

from gangline.compress.demo_files import ARTIFACT, FORMAT, file_sha256
from gangline.compress.demo_source import GGUF_SHA256, find_gguf
from gangline.core.errors import CheckpointError, FormatError
from gangline.core.home import cache_dir

log = logging.getLogger("gangline.compress.demo")

_CHILD = """
import sys
from gangline.compress.demo import ensure_demo
from gangline.core.errors import GanglineError
from transformers.utils import logging
logging.disable_progress_bar()  # one bar, of the layers, says enough
try:
    ensure_demo(sys.argv[1] == "1")
except GanglineError as error:
    sys.exit(sys.stdout.write(str(error)) and 1)
"""


def demo_folder() -> Path:
    """Where the converted model lies, or will; named after the dense weights, the artifact, the format."""
    parts = (GGUF_SHA256, file_sha256(ARTIFACT), FORMAT)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return cache_dir("demo") / f"smollm2-135m-moe-{digest[:16]}"


def ensure_demo(progress: bool = True) -> Path:
    """Folder of the demo model (Mixtral architecture, bfloat16, with tokenizer); converts it on first use.

    Two processes wait for each other instead of converting twice; an interrupted one leaves nothing behind.

    Args:
        progress: show a progress bar on stderr while converting.

    Raises:
        CheckpointError: the dense weights are not at hand and cannot be downloaded.
        FormatError: the shipped artifact is damaged.
    """
    folder = demo_folder()
    if folder.is_dir():
        return folder
    from filelock import FileLock

    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            convert_demo(find_gguf(), folder, progress=progress)
    return folder


def demo_made_apart(progress: bool = True) -> Path:
    """The same as :func:`ensure_demo`, converting in a process of its own.

    What the conversion needs at its peak then does not count in the caller's memory budget.

    Raises:
        CheckpointError: as for :func:`ensure_demo`, or the other process failed.
    """
    folder = demo_folder()
    if folder.is_dir():
        return folder
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(int(progress))],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if child.returncode or not folder.is_dir():
        reason = (
            child.stdout.strip() or f"converting the demo model ended with exit status {child.returncode}"
        )
        raise CheckpointError(reason)
    return folder


def convert_demo(gguf: Path, folder: Path, *, artifact: Path = ARTIFACT, progress: bool = False) -> None:
    """Write the MoE that `artifact` makes of the dense model in `gguf` as the new folder `folder`."""
    from gangline.compress.demo_artifact import read_artifact
    from gangline.compress.dense_to_moe import complete_folder, load_dense, write_mixtral
    from gangline.compress.dense_to_moe.progress import layer_bar

    recipe = read_artifact(artifact)
    if recipe.source_sha256 != GGUF_SHA256:
        raise FormatError(f"{artifact}: made for other dense weights than {gguf}. Reinstall gangline.")
    log.info("converting %s to %s", gguf, folder)
    model, tokenizer = load_dense(gguf)
    with complete_folder(folder) as temporary, layer_bar(len(recipe.plans), progress, "making demo") as bar:
        write_mixtral(model, tokenizer, iter(recipe.plans), temporary, top_k=recipe.top_k, on_layer=bar)
