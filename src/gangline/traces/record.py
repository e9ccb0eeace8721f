"""Record the routing of a model: on given text, or while it writes.

Shape suffixes: S tokens of one document.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from gangline.traces.hooks import Stack, observe
from gangline.traces.recorder import Recorder
from gangline.traces.texts import Item

OnItem = Callable[[Item], None]


def record_text(
    model: Any,
    recorder: Recorder,
    items: Iterable[Item],
    *,
    stack: Stack | None = None,
    predictions: bool = False,
    on_item: OnItem | None = None,
) -> None:
    """Record given text: each document goes through the model in one pass (teacher forcing).

    A causal model routes a token in the same way when it decodes it, so such a trace also tells about
    decoding: see :func:`gangline.traces.replay.one_by_one`.

    Args:
        model: plain, loaded or attached. Of an encoder-decoder model the encoder is run.
        recorder: where it goes.
        items: documents; each must fit into one pass.
        stack: ``encoder`` for encoder-decoder models.
        predictions: also note the likeliest next token of every position, which needs the logits of all.
        on_item: called after each document.
    """
    run = model.get_encoder() if stack == "encoder" else model
    extra: dict[str, Any] = {} if stack == "encoder" else {"use_cache": False}
    if not predictions and "logits_to_keep" in inspect.signature(type(run).forward).parameters:
        extra["logits_to_keep"] = 1
    with observe(model, recorder, stack):
        for item in items:
            with _document(recorder, item), torch.inference_mode():
                run(input_ids=torch.tensor([item.ids], device=model.device), **extra)
            if on_item is not None:
                on_item(item)


def record_generation(
    model: Any,
    recorder: Recorder,
    items: Iterable[Item],
    *,
    settings: Mapping[str, Any],
    seed: int = 0,
    stack: Stack | None = None,
    on_item: OnItem | None = None,
) -> None:
    """Record the model's own answers: prefill of each prompt, then one pass per new token.

    Args:
        model: plain, loaded or attached; it must generate.
        recorder: where it goes.
        items: prompts.
        settings: arguments of ``model.generate``, for example ``{"max_new_tokens": 64, "do_sample": False}``.
        seed: each prompt is sampled with this seed plus its number in the trace.
        stack: ``decoder`` for encoder-decoder models.
        on_item: called after each document.
    """
    with observe(model, recorder, stack):
        for item in items:
            torch.manual_seed(seed + recorder.writer.documents)
            ids_1S = torch.tensor([item.ids], device=model.device)
            with _document(recorder, item), torch.inference_mode():
                model.generate(ids_1S, attention_mask=torch.ones_like(ids_1S), **settings)
            if on_item is not None:
                on_item(item)


def _document(recorder: Recorder, item: Item) -> Any:
    return recorder.documents([item.source], {kind: [name] for kind, name in item.labels.items()})
