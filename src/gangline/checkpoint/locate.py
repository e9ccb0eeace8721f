"""From what a user calls a model to files: a folder, a GGUF file, or a model on the Hugging Face Hub."""

from dataclasses import dataclass
from pathlib import Path

from gangline.checkpoint.hub import hub_errors
from gangline.checkpoint.safetensors_index import SafetensorsIndex
from gangline.core.errors import CheckpointError

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
SETTINGS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
NOT_THE_MODEL = ["*/*.safetensors", "*/*.json", "consolidated*"]
"""Copies in other layouts that repositories keep beside the transformers checkpoint."""


@dataclass(frozen=True)
class LocalCheckpoint:
    """A model whose files are on this machine.

    Attributes:
        name: what the user wrote.
        folder: holds the configuration, the tokenizer and (without ``gguf``) the safetensors files.
        gguf: the GGUF file, if the model is one.
    """

    name: str
    folder: Path
    gguf: Path | None = None


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A model on the Hub of which only ``config.json`` has been fetched.

    Attributes:
        name: what the user wrote.
        repo: its repository id.
        revision: branch, tag or commit; ``None`` for the default branch.
        config: the local copy of its ``config.json``.
    """

    name: str
    repo: str
    revision: str | None
    config: Path


def resolve_checkpoint(
    model: str | Path, revision: str | None = None, need_weights: bool = True
) -> LocalCheckpoint | RemoteCheckpoint:
    """Find the files of a model.

    Args:
        model: a folder, a ``.gguf`` file, a Hub id (``owner/name``), or ``owner/name:file.gguf``.
        revision: branch, tag or commit on the Hub.
        need_weights: download the weights of a Hub model that are not in the cache; without it a model that
            is not in the cache comes back as a :class:`RemoteCheckpoint`.

    Raises:
        CheckpointError: nothing of that name, no access to it, no network, or no weights that we can read.
    """
    name = str(model)
    path = Path(name).expanduser()
    if path.is_dir():
        return _local_folder(name, path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return LocalCheckpoint(name, path.parent, path)
        raise CheckpointError(
            f"{name}: a single file must be a .gguf file; for safetensors name the folder around it"
        )
    if (
        isinstance(model, Path)
        or path.is_absolute()
        or name.startswith((".", "~"))
        or name.endswith(".gguf:")
    ):
        raise CheckpointError(f"{name}: no such file or folder; check the path")
    repo, _, file = name.partition(":")
    if file:
        return _hub_gguf(name, repo, file, revision, need_weights)
    if name.lower().endswith(".gguf"):
        raise CheckpointError(f"{name}: no such file; for a file on the Hub write owner/name:file.gguf")
    return _hub_folder(name, revision, need_weights)


def _local_folder(name: str, folder: Path) -> LocalCheckpoint:
    if (folder / "config.json").is_file():
        return LocalCheckpoint(name, folder)
    gguf = sorted(folder.glob("*.gguf"))
    if len(gguf) == 1:
        return LocalCheckpoint(name, folder, gguf[0])
    if gguf:
        raise CheckpointError(
            f"{name}: the folder holds {len(gguf)} GGUF files; name one, for example {gguf[0]}"
        )
    raise CheckpointError(
        f"{name}: the folder has no config.json and no GGUF file; name the folder of a checkpoint"
    )


def _hub_gguf(name: str, repo: str, file: str, revision: str | None, need_weights: bool) -> LocalCheckpoint:
    from huggingface_hub import hf_hub_download

    if not file.lower().endswith(".gguf"):
        raise CheckpointError(f"{name}: only a .gguf file can follow the colon; write owner/name:file.gguf")
    with hub_errors(name):
        if need_weights:
            path = Path(hf_hub_download(repo, file, revision=revision))
        else:
            path = _cached_gguf(name, repo, file, revision)
    return LocalCheckpoint(name, path.parent, path)


def _cached_gguf(name: str, repo: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: a GGUF file is read only from this machine; run: hf download {repo} {file}"
        ) from error


def _hub_folder(name: str, revision: str | None, need_weights: bool) -> LocalCheckpoint | RemoteCheckpoint:
    from huggingface_hub import hf_hub_download

    with hub_errors(name):
        cached = _cached_snapshot(name, revision)
        if cached is not None and not need_weights:
            return LocalCheckpoint(name, cached)
        if not need_weights:
            return RemoteCheckpoint(
                name, name, revision, Path(hf_hub_download(name, "config.json", revision=revision))
            )
        folder = _snapshot(name, revision, local=False)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{name}: the repository has no safetensors files; for a GGUF file write {name}:file.gguf"
        )
    return LocalCheckpoint(name, folder)


def _snapshot(repo: str, revision: str | None, local: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted, unwanted = WEIGHTS + SETTINGS, NOT_THE_MODEL
    return Path(
        snapshot_download(
            repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=local
        )
    )


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The cached folder of a model if all its weights are in it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _snapshot(repo, revision, local=True)
        SafetensorsIndex.from_folder(folder)
    except (LocalEntryNotFoundError, CheckpointError):
        return None
    return folder if (folder / "config.json").is_file() else None
