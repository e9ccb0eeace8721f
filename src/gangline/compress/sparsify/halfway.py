"""A folder for what a long sparsification has done so far: called again, it goes on from there.

``pruned.safetensors`` holds the packed experts and, in its header, the reports; ``learning.safetensors`` the
parameters that learn, the moments of Adam and the losses so far. Both name what they belong to: the model,
the settings and the text.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gangline.compress.distillation import Progress
from gangline.compress.sparsify.expert import PackedExpert
from gangline.compress.sparsify.report import ExpertReport, LayerReport, MatrixReport
from gangline.core.errors import CheckpointError, UsageError
from gangline.core.keys import ExpertKey
from gangline.formats.samoyeds import SparseCodec

PRUNED, LEARNING = "pruned.safetensors", "learning.safetensors"


def key_of(*parts: object) -> str:
    """A short hash of what a result depends on; tensors count by their bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:24]


class Halfway:
    """What is kept in a folder.

    Args:
        folder: made when there is something to keep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def pruned(
        self, key: str, codec: SparseCodec
    ) -> tuple[dict[ExpertKey, PackedExpert], tuple[LayerReport, ...]] | None:
        """The experts and reports of a pruning; None if there are none yet.

        Raises:
            UsageError: the folder belongs to another run.
            CheckpointError: the file cannot be read.
        """
        found = self._read(PRUNED, key)
        if found is None:
            return None
        tensors, note = found
        shapes = {name: tuple(shape) for name, shape in note["shapes"].items()}
        experts: dict[ExpertKey, PackedExpert] = {}
        for layer, number, fields in note["experts"]:
            names = [f"{layer}.{number}.{field}" for field in range(fields)]
            raws, sizes = [tensors[name] for name in names], [shapes[name] for name in names]
            experts[ExpertKey(layer, number)] = PackedExpert.of(raws, sizes, codec)
        return experts, tuple(_layer(document) for document in note["layers"])

    def keep_pruned(
        self, key: str, experts: Mapping[ExpertKey, PackedExpert], layers: Sequence[LayerReport]
    ) -> None:
        """Note a finished pruning."""
        tensors, shapes, numbers = {}, {}, []
        for at, expert in experts.items():
            numbers.append([at.layer, at.expert, len(expert.raws)])
            for field, (raw, shape) in enumerate(zip(expert.raws, expert.shapes, strict=True)):
                name = f"{at.layer}.{at.expert}.{field}"
                tensors[name], shapes[name] = raw, shape
        note = {"experts": numbers, "shapes": shapes, "layers": [asdict(layer) for layer in layers]}
        self._write(PRUNED, key, tensors, note)

    def begun(self, key: str, parameters: Sequence[nn.Parameter]) -> Progress | None:
        """Give the parameters the values that were kept; where learning stands, None if at its beginning.

        Raises:
            UsageError: the folder belongs to another run.
            CheckpointError: the file cannot be read.
        """
        found = self._read(LEARNING, key)
        if found is None:
            return None
        tensors, note = found
        for number, parameter in enumerate(parameters):
            parameter.data.copy_(tensors[f"{number}.value"])
        moments = [(tensors[f"{n}.mean"], tensors[f"{n}.square"]) for n in range(len(parameters))]
        return Progress(note["step"], note["rates"], moments, note["losses"])

    def keep_learning(self, key: str, parameters: Sequence[nn.Parameter], progress: Progress) -> None:
        """Note where learning stands."""
        tensors: dict[str, Tensor] = {}
        for number, (parameter, (mean, square)) in enumerate(zip(parameters, progress.moments, strict=True)):
            tensors[f"{number}.value"] = parameter.detach()
            tensors[f"{number}.mean"], tensors[f"{number}.square"] = mean, square
        note = {"step": progress.step, "rates": progress.rates, "losses": progress.losses}
        self._write(LEARNING, key, tensors, note)

    def _write(self, name: str, key: str, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        half = self._folder / f"{name}.part"
        save_file(tensors, half, metadata={"key": key, "note": json.dumps(note)})
        half.replace(self._folder / name)

    def _read(self, name: str, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self._folder / name
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != key:
                    raise UsageError(
                        f"{path} is of another model, other settings or other text; "
                        "name another folder, or remove this one"
                    )
                tensors = {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118
            return tensors, json.loads(metadata["note"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({str(error)[:80]}); remove it") from error


def _layer(document: dict[str, Any]) -> LayerReport:
    experts = tuple(
        ExpertReport(
            **{
                **expert,
                "matrices": tuple(MatrixReport(**matrix) for matrix in expert["matrices"]),
                "permuted": None if expert["permuted"] is None else tuple(expert["permuted"]),
            }
        )
        for expert in document["experts"]
    )
    fitted = document["reconstructed"]
    return LayerReport(
        document["layer"], document["name"], experts, None if fitted is None else (fitted[0], fitted[1])
    )
