"""Record the routing of whatever a model computes inside a block, one document per sequence and run."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from gangline.traces.describe import describe_recording
from gangline.traces.header import Extra
from gangline.traces.hooks import observe
from gangline.traces.observer import LayerRouting, StepRouting
from gangline.traces.recorder import Recorder
from gangline.traces.writer import TraceWriter


class Generations:
    """An observer that begins new documents with every prompt: a pass of several tokens.

    Args:
        recorder: that writes them.
        about: what the documents are called.
    """

    def __init__(self, recorder: Recorder, about: str) -> None:
        self.wants: Collection[Extra] = recorder.wants
        self._recorder, self._about = recorder, about
        self._open = ExitStack()
        self._generations = self._sequences = 0

    def on_pass(self, ids_BS: Tensor | None, keep_BS: Tensor | None, shape: tuple[int, int]) -> None:
        """See RoutingObserver."""
        if shape[1] > 1 or shape[0] != self._sequences:
            self.close()
            self._generations += 1
            self._sequences = shape[0]
            sources = [f"{self._about}, run {self._generations}, sequence {row}" for row in range(shape[0])]
            self._open.enter_context(self._recorder.documents(sources))
        self._recorder.on_pass(ids_BS, keep_BS, shape)

    def on_routing(self, layer: int, routing: LayerRouting) -> None:
        """See RoutingObserver."""
        self._recorder.on_routing(layer, routing)

    def on_step(self, routing: StepRouting) -> None:
        """See RoutingObserver."""
        self._recorder.on_step(routing)

    def on_predicted(self, ids_BS: Tensor) -> None:
        """See RoutingObserver."""
        self._recorder.on_predicted(ids_BS)

    def close(self) -> None:
        """End the documents that are open."""
        self._open.close()


@contextmanager
def record(model: Any, folder: Path, about: str) -> Iterator[None]:
    """Write the routing of everything that ``model`` computes inside the block as a trace.

    Args:
        model: plain, loaded or attached; not of an encoder and a decoder.
        folder: new, of the trace.
        about: what the trace calls the model.

    Raises:
        TraceError: the folder holds something, or the model's passes cannot be recorded.
    """
    runtime = getattr(model, "gangline", None)
    sizes = None if runtime is None else [layout.nbytes for layout in runtime.catalog.layouts]
    header = describe_recording(model, about, source="generation", expert_bytes=sizes)
    with TraceWriter(folder, header) as writer:
        observer = Generations(Recorder(writer), about)
        with observe(model, observer):
            yield
        observer.close()
