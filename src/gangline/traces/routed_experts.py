"""Exchange routing with other engines: the ``routed_experts`` arrays of vLLM, and SGLang's base64 form.

vLLM returns, per request, int16 ids ``[tokens, MoE layers, K]``: one row per token that went through the
model, prompt first; the last sampled token never goes through it. Over HTTP the same array comes as a
base64 ``.npy`` file. SGLang sends little-endian int32 of the same shape, base64, without a header.

Shape suffixes: R tokens of one request, L MoE layers, K slots per token.
"""

import base64
import binascii
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gangline.traces.header import TraceError, TraceHeader
from gangline.traces.rows import UNKNOWN, Array, LayerRows, TokenTable
from gangline.traces.shards import Document
from gangline.traces.trace import Trace
from gangline.traces.writer import TraceWriter


@dataclass(frozen=True)
class RoutedRequest:
    """One request of another engine.

    Attributes:
        ids_RLK: chosen experts.
        prompt_tokens: how many of the rows are the prompt.
        token_ids: input token of each row, if known.
        source: where it comes from, in words.
    """

    ids_RLK: Array
    prompt_tokens: int
    token_ids: Sequence[int] | None = None
    source: str = "imported"


def export_routed_experts(trace: Trace, document: int) -> Array:
    """Return int16 ids ``[tokens, MoE layers, K]`` of one document, in the order of its positions.

    Raises:
        TraceError: no such document, layers with different K, empty slots, or ids above int16.
    """
    part = trace.select(documents=[document])
    layers = [part.layer(number) for number in part.layers]
    if len(set(trace.header.top_k)) != 1:
        raise TraceError(f"{trace.name}: layers differ in experts per token; export them one by one")
    if any(rows.keep_RK is not None and not rows.keep_RK.all() for rows in layers):
        raise TraceError(f"{trace.name}: document {document} has empty slots, which this layout cannot show")
    order = np.argsort(part.tokens.position, kind="stable")
    return np.stack([rows.ids_RK[order] for rows in layers], axis=1).astype(np.int16)


def import_routed_experts(writer: TraceWriter, request: RoutedRequest) -> None:
    """Append one request to a trace in mode ``ids``: its prompt as one pass, then one pass per token.

    Raises:
        TraceError: the array does not fit the header of the trace.
    """
    header, ids_RLK = writer.header, np.asarray(request.ids_RLK)
    problem = _misfit(header, request, ids_RLK)
    if problem:
        raise TraceError(f"{request.source}: {problem}; import it into a trace of its own model")
    rows = len(ids_RLK)
    prompt = request.prompt_tokens
    decode_R = np.arange(rows) >= prompt
    # Rows of the prompt share a pass; a request without one begins with its first token.
    step_R = writer.steps + np.maximum(0, np.arange(rows) - max(prompt, 1) + 1)
    input_R = np.full(rows, UNKNOWN) if request.token_ids is None else np.asarray(request.token_ids)
    tokens = TokenTable(
        input_id=input_R,
        next_id=np.append(input_R[1:], UNKNOWN),
        pred_id=np.full(rows, UNKNOWN),
        doc=np.full(rows, writer.documents),
        position=np.arange(rows),
        step=step_R,
        phase=decode_R.astype(np.uint8),
        is_special=np.zeros(rows, dtype=bool),
    )
    digest = hashlib.sha256(input_R.astype("<i4").tobytes()).hexdigest()
    document = Document(writer.documents, request.source, rows, digest)
    writer.add([document], tokens, [LayerRows(ids_RLK[:, layer]) for layer in range(len(header.layers))])


def _misfit(header: TraceHeader, request: RoutedRequest, ids_RLK: Array) -> str | None:
    if header.mode == "full":
        return "the layout has no weights, so the trace must have mode ids or counts"
    if ids_RLK.ndim != 3 or ids_RLK.dtype.kind not in "iu" or not len(ids_RLK):
        return f"routed experts must be whole numbers [tokens, layers, K], not {ids_RLK.shape}"
    if ids_RLK.shape[1] != len(header.layers) or {ids_RLK.shape[2]} != set(header.top_k):
        return f"{ids_RLK.shape[1:]} layers and experts per token, the trace has {header.top_k}"
    over = [n for n, layer in enumerate(header.layers) if int(ids_RLK[:, n].max()) >= layer.experts]
    if over or int(ids_RLK.min()) < 0:
        return f"expert ids outside of layer {over[0] if over else 0}"
    if not 0 <= request.prompt_tokens <= len(ids_RLK):
        return f"{request.prompt_tokens} prompt tokens of {len(ids_RLK)} rows"
    if request.token_ids is not None and len(request.token_ids) != len(ids_RLK):
        return f"{len(request.token_ids)} token ids for {len(ids_RLK)} rows"
    return None


def to_base64(ids_RLK: Array, form: str = "npy") -> str:
    """Encode ids as a response carries them: ``npy`` (vLLM) or ``int32`` (SGLang)."""
    if form == "int32":
        return base64.b64encode(np.ascontiguousarray(ids_RLK, dtype="<i4").tobytes()).decode()
    buffer = io.BytesIO()
    np.save(buffer, ids_RLK.astype(np.int16), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def from_base64(text: str, shape: tuple[int, int] | None = None) -> Array:
    """Decode what :func:`to_base64` writes.

    Args:
        text: base64.
        shape: MoE layers and experts per token of ``int32`` data, which does not say; None reads ``npy``.

    Raises:
        TraceError: it is neither.
    """
    try:
        data = base64.b64decode(text, validate=True)
        if shape is None:
            found: Any = np.load(io.BytesIO(data), allow_pickle=False)
            return np.asarray(found)
        return np.frombuffer(data, dtype="<i4").reshape(-1, *shape)
    except (binascii.Error, ValueError, EOFError) as error:
        raise TraceError(f"these are not routed experts ({error}); pass the field as it was sent") from error
