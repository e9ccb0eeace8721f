"""Our side of a measurement: a model loaded within its budget, timed run by run."""

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from gangline.evaluation.bound import Weights, weights_of
from gangline.evaluation.speed_run import Sample, timed_generation


@dataclass(frozen=True)
class Facts:
    """What a report says about our side.

    Attributes:
        banner: precision, dtype and share of experts in memory, in words.
        vocabulary: number of token ids.
        threads: that compute.
        weights: what a decoding step reads.
        peak_resident_bytes: largest resident memory of the process so far.
    """

    banner: str
    vocabulary: int
    threads: int
    weights: Weights
    peak_resident_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the facts that :meth:`to_dict` made, also after a way through JSON."""
        weights = data["weights"]
        spread = tuple((one, whole) for one, whole in weights["spread"])
        return cls(
            **(data | {"weights": Weights(**weights | {"spread": spread, "files": tuple(weights["files"])})})
        )


class OurSide:
    """A loaded model.

    Args:
        model: folder, GGUF file or Hub id.
        batch: sequences decoded at once.
        loading: options of :func:`gangline.load`.
    """

    def __init__(self, model: str | Path, *, batch: int = 1, **loading: Any) -> None:
        from gangline.runtime.load import load_model

        self.model: Any = load_model(model, **{"native_only": True, **loading})
        if batch > 1 and getattr(self.model.generation_config, "prefill_chunk_size", None):
            # Planned for so many rows in all, and transformers cuts each sequence of the batch.
            settings = self.model.generation_config
            settings.prefill_chunk_size = max(1, settings.prefill_chunk_size // batch)

    def run(self, ids_BP: Tensor, new_tokens: int, following_BN: Tensor | None) -> Sample:
        """See :func:`~gangline.evaluation.speed_run.timed_generation`."""
        return timed_generation(self.model, ids_BP, new_tokens, following_BN)

    def facts(self) -> Facts:
        """Return what a report says about this side, now."""
        import torch

        from gangline.runtime.runtime import peak_resident

        return Facts(
            banner=self.model.gangline.banner(),
            vocabulary=self.model.get_input_embeddings().num_embeddings,
            threads=torch.get_num_threads(),
            weights=weights_of(self.model),
            peak_resident_bytes=peak_resident(),
        )

    def close(self) -> None:
        """Free it."""
        self.model.gangline.close()
        del self.model
        gc.collect()
