"""Proofs that a loaded model passed before: the same files on the same machine need not prove the same again.

``check_conformance`` and ``check_native`` compute with the model, which takes as long as a short answer does.
What they say depends on the weights, on the code that computes and on the processor. All of it is written
down beside the verdict; a record of anything else is not believed. Only what passed is kept.
"""

import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import gangline
from gangline.core.home import cache_dir, write_record
from gangline.kernels.cpu import cpu_features, native

logger = logging.getLogger(__name__)

SCHEMA = 1
# Environment variables that choose kernels inside the libraries which compute.
_SWITCHES = ("ATEN_", "DNNL_", "GANGLINE_CPU", "MKL_", "ONEDNN_")
_OWN_FOLDERS = ("core", "formats", "kernels", "kernels/cpu", "models", "models/adapters", "runtime")
_THEIR_FOLDERS = (".", "generation", "integrations")


class Proofs:
    """The checks that a model has passed.

    Args:
        facts: everything that the verdicts depend on; None keeps nothing, so that every check runs.
    """

    def __init__(self, facts: dict[str, Any] | None = None) -> None:
        self._facts = facts
        self._file: Path | None = None
        self._passed: list[str] = []
        if facts is None:
            return
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        try:
            self._file = cache_dir("proofs") / f"{key}.json"
        except OSError as error:
            logger.debug("what a model proves cannot be kept: %s", error)
            return
        self._passed = _read(self._file, facts)

    def once(self, name: str, check: Callable[[], None]) -> None:
        """Run ``check``, which raises where it fails, unless it is on record that it passed."""
        if name in self._passed:
            return
        check()
        self._passed.append(name)
        if self._file is not None:
            _write(self._file, {"facts": self._facts, "passed": self._passed})


def proof_facts(model: PreTrainedModel, identity: str, codec: str | None) -> dict[str, Any]:
    """Return what verdicts about a freshly loaded model depend on, as plain JSON.

    Args:
        model: with its dense weights.
        identity: of its files (:attr:`gangline.runtime.opened.OpenedModel.identity`).
        codec: into which its dense weights were packed, None for as stored.
    """
    core = native()
    facts = {
        "schema": SCHEMA,
        "files": identity,
        "config": model.config.to_dict(),
        "attention": str(model.config._attn_implementation),
        "class": _name(type(model)),
        "dtype": str(model.dtype),
        "codec": codec,
        "versions": {
            "gangline": gangline.__version__,
            "python": platform.python_version(),
            "torch": [torch.__version__, str(torch.version.git_version)],
            "transformers": transformers.__version__,
        },
        "code": _digest(_sources(model)),
        "modules": _digest(_functions(model)),
        "processor": [platform.machine(), *sorted(name for name, on in cpu_features().items() if on)],
        "kernels": [
            "torch" if core is None else str(core.kernels_name()),
            torch.backends.cpu.get_cpu_capability(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
            torch.are_deterministic_algorithms_enabled(),
        ],
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_SWITCHES)},
    }
    # As it will be read back: tuples are lists there, and numbers that are keys are text.
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def _sources(model: PreTrainedModel) -> Iterator[str]:
    """Name, size and time of every file whose code takes part: ours, and transformers' for this model."""
    own = Path(gangline.__file__).parent
    theirs = Path(transformers.__file__).parent
    folders = [own / name for name in _OWN_FOLDERS] + [theirs / name for name in _THEIR_FOLDERS]
    folders += sorted({Path(file).parent for file in _module_files(model)} - set(folders))
    for folder in folders:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda item: item.name):
                if entry.name.endswith((".py", ".so", ".pyd")):
                    stat = entry.stat()
                    yield f"{entry.path}|{stat.st_size}|{stat.st_mtime_ns}"


def _module_files(model: PreTrainedModel) -> set[str]:
    """Files of the classes of all modules, except torch's own."""
    homes = {type(module).__module__ for module in model.modules()}
    found = (
        getattr(sys.modules.get(home), "__file__", None) for home in homes if home.split(".")[0] != "torch"
    )
    return {file for file in found if file is not None}


def _functions(model: PreTrainedModel) -> Iterator[str]:
    """The code that runs, and not only the files it came from: somebody may have replaced a function.

    Of every class among the modules its methods, and the functions of the Python modules they are in.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    for kind in sorted(kinds, key=_name):
        if kind.__module__.split(".")[0] not in ("torch", "builtins"):
            yield from _codes(_name(kind), vars(kind))
    for home in sorted({kind.__module__ for kind in kinds} & sys.modules.keys()):
        if home.split(".")[0] not in ("torch", "builtins"):
            yield from _codes(home, vars(sys.modules[home]))


def _codes(where: str, names: Mapping[str, Any]) -> Iterator[str]:
    for name, value in sorted(names.items()):
        if isinstance(value, FunctionType):
            yield f"{where}.{name}={value.__module__}:{_code(value.__code__)}"


def _code(code: CodeType) -> str:
    """A hash of what a function does, those within it as well."""
    parts = (code.co_code.hex(), *code.co_names, *(_constant(item) for item in code.co_consts))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _constant(item: object) -> str:
    if isinstance(item, CodeType):
        return _code(item)
    # The order of a set differs from process to process.
    return repr(sorted(map(repr, item)) if isinstance(item, frozenset) else item)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read(file: Path, facts: dict[str, Any]) -> list[str]:
    """Return the checks that a record says were passed; none if it is damaged, of other facts, not there."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(record, dict) or record.get("facts") != facts:
        return []
    passed = record.get("passed")
    return [str(name) for name in passed] if isinstance(passed, list) else []


def _write(file: Path, record: dict[str, Any]) -> None:
    try:
        write_record(file, record)
    except OSError as error:
        logger.debug("what a model proves cannot be kept: %s", error)
