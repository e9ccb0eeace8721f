"""Record, store and replay routing; the simulator that drives the engine's policies; bounds."""

from gangline.traces.counts import RoutingCounts, load_counts
from gangline.traces.header import TraceError, TraceHeader, TraceLayer, read_header
from gangline.traces.rows import LayerRows, TokenTable
from gangline.traces.shards import Document
from gangline.traces.trace import Trace, open_trace
from gangline.traces.writer import TraceWriter

__all__ = [
    "Document",
    "LayerRows",
    "RoutingCounts",
    "TokenTable",
    "Trace",
    "TraceError",
    "TraceHeader",
    "TraceLayer",
    "TraceWriter",
    "load_counts",
    "open_trace",
    "read_header",
]
