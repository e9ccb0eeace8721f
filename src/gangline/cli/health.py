"""The lines of ``gangline doctor``: what is there, what is missing, and what to do about it."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gangline.core.sizes import format_size

Status = Literal["ok", "info", "warn", "FAIL"]

_EXTRAS = {
    "demo": ("gguf", "the model named 'demo'"),
    "gguf": ("gguf", "GGUF files"),
    "serve": ("fastapi", "the HTTP server"),
    "plot": ("matplotlib", "pictures"),
    "eval": ("lm_eval", "lm-eval"),
    "quant": ("compressed_tensors", "compressed-tensors checkpoints"),
    "train": ("peft", "fine-tuning"),
}
_LITTLE_DISK = 10 * 2**30


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        status: only ``FAIL`` changes the exit code.
        name: what was looked at.
        detail: what was found, and for ``warn`` and ``FAIL`` what to do.
    """

    status: Status
    name: str
    detail: str


def health(folder: Path) -> Iterator[Line]:
    """Yield one line per thing that gangline needs or can use; ``folder`` is where expert packs will lie."""
    yield Line("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    yield from _libraries()
    yield from _processor()
    yield from _load()
    yield _memory()
    yield from _gpu()
    yield from _disk(folder)
    yield from _extras()


def _libraries() -> Iterator[Line]:
    from packaging.requirements import Requirement

    try:
        wanted = importlib.metadata.requires("gangline") or []
    except importlib.metadata.PackageNotFoundError:
        yield Line("info", "gangline", "runs from a source folder, so its dependencies are not checked")
        return
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Line("FAIL", requirement.name, f"not installed; pip install '{requirement}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Line("ok", requirement.name, version)
        else:
            yield Line("FAIL", requirement.name, f"{version} found; pip install '{requirement}'")


def _processor() -> Iterator[Line]:
    from gangline.kernels.cpu import cpu_features, native
    from gangline.runtime.machine import hardware

    machine = hardware()
    features = " ".join(sorted(name for name, there in cpu_features().items() if there))
    yield Line(
        "ok", "processor", f"{machine.cpu}, {machine.cores} cores, {features or 'no known extensions'}"
    )
    if native() is None:
        yield Line(
            "info",
            "native core",
            "not built: experts are computed by torch, packed formats much slower; "
            "install a C++20 compiler and Python's headers, and gangline again",
        )
    else:
        yield Line("ok", "native core", "built and loaded")


def _load() -> Iterator[Line]:
    """Warn where other programs are at work: what is measured now would be too slow."""
    from gangline.runtime.machine import hardware

    if not hasattr(os, "getloadavg"):
        return
    load, cores = os.getloadavg()[0], hardware().cores
    if load > cores / 2:
        yield Line(
            "warn",
            "load",
            f"{load:.1f} on {cores} cores: other programs are at work, so speeds measured now are too low; "
            "measure again when it is quiet",
        )


def _memory() -> Line:
    import psutil

    memory = psutil.virtual_memory()
    return Line("ok", "memory", f"{format_size(memory.total)}, {format_size(memory.available)} available")


def _gpu() -> Iterator[Line]:
    import torch

    if not torch.cuda.is_available():
        yield Line("info", "gpu", "none that torch can use; everything runs on the processor")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Line("ok", f"gpu {index}", f"{found.name}, {format_size(found.total_memory)}")


def _disk(folder: Path) -> Iterator[Line]:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield Line(
            "FAIL",
            "cache",
            f"{folder} cannot be written ({error.strerror}); set GANGLINE_HOME to another folder",
        )
        return
    free = shutil.disk_usage(folder).free
    status: Status = "ok" if free >= _LITTLE_DISK else "warn"
    advice = "" if status == "ok" else "; big models need more, see 'gangline cache ls'"
    yield Line(status, "cache", f"{folder}, {format_size(free)} free{advice}")


def _extras() -> Iterator[Line]:
    for extra, (module, purpose) in _EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Line(
                "info", f"extra {extra}", f"not installed; pip install 'gangline[{extra}]' for {purpose}"
            )
        else:
            yield Line("ok", f"extra {extra}", "installed")
