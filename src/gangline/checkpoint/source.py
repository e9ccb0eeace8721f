"""What every kind of checkpoint offers to the runtime: the bytes of the experts, layer by layer or in place.

Neither class knows a file format: ``resolve`` makes sources from safetensors, ``gguf`` from GGUF files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gangline.core.layout import ExpertCatalog, ExpertLayout, ModuleField


class ExpertSource(Protocol):
    """The experts of one checkpoint.

    Attributes:
        layouts: one layout per MoE layer, exactly as the bytes are delivered.
        experts: number of experts E of each layer.
        catalog: where every expert lies, if its bytes can be used as the files hold them; ``None`` if any
            expert has to be converted on the way.
        notes: one sentence for each kind of conversion, for the user.
    """

    @property
    def layouts(self) -> tuple[ExpertLayout, ...]:
        """One layout per MoE layer, in execution order."""
        ...

    @property
    def experts(self) -> tuple[int, ...]:
        """Number of experts of each layer."""
        ...

    @property
    def catalog(self) -> ExpertCatalog | None:
        """Byte ranges of every expert, or ``None`` if the bytes must be converted."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be converted, in sentences for the user."""
        ...

    def read_layer(self, layer: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yield ``(expert, fields)`` in ascending expert id, each field a 1-D uint8 tensor in slot order.

        At most one layer is in memory. A tensor may be a view that later steps of the iterator leave alone.
        """
        ...


@dataclass(frozen=True)
class ExpertsModule:
    """One experts module of a model, described without the module.

    Attributes:
        prefix: its path in the model, for example ``model.layers.3.mlp.experts``.
        experts: number of experts E.
        params: shapes of the parameters that hold one slice per expert, in slot order
            (``{"gate_up_proj": (E, 2F, D), "down_proj": (E, D, F)}``).
        transposed: whether each slice is stored as ``(in, out)``.
        has_gate: whether the first parameter holds gate and up.
        interleaved: whether its rows alternate between gate and up.
        matrices: the fields, where ``params`` and the flags do not say all (flat parameters, experts that are
            modules of their own, fields stored differently); empty otherwise.
    """

    prefix: str
    experts: int
    params: dict[str, tuple[int, ...]]
    transposed: bool
    has_gate: bool
    interleaved: bool
    matrices: tuple[ModuleField, ...] = ()

    @property
    def fields(self) -> tuple[ModuleField, ...]:
        """The matrices of one expert in slot order."""
        if self.matrices:
            return self.matrices
        first = ["gate_up"] if self.has_gate else ["up"]
        names = [*(first if len(self.params) == 2 else ["gate", "up"]), "down"]
        return tuple(
            ModuleField(name, parameter, (shape[-2], shape[-1]), self.transposed)
            for name, (parameter, shape) in zip(names, self.params.items(), strict=True)
        )
