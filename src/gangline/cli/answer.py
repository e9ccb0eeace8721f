"""One answer of a model, streamed as it comes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from gangline.cli.loading import Loaded
from gangline.cli.options import option
from gangline.core.errors import ContextError
from gangline.runtime.deferred_imports import deferred_imports


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen."""

    max_new_tokens: Annotated[int, option("--max-new-tokens", "-n", help="Longest answer.", min=1)] = 256
    temperature: Annotated[
        float | None,
        option(
            "--temperature",
            help="0 takes the likeliest token. (Default: 0; 1 with --top-k or --top-p.)",
            min=0.0,
        ),
    ] = None
    top_k: Annotated[int | None, option("--top-k", help="Sample from the k likeliest tokens.", min=1)] = None
    top_p: Annotated[
        float | None,
        option(
            "--top-p", help="Sample from the likeliest tokens of this total probability.", min=0.0, max=1.0
        ),
    ] = None

    def generate_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of ``generate``; the model's own settings of sampling do not count."""
        narrowed = self.top_k is not None or self.top_p is not None
        temperature = (1.0 if narrowed else 0.0) if self.temperature is None else self.temperature
        if temperature == 0.0:
            return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        return {"do_sample": True, "temperature": temperature, "top_k": self.top_k or 0, "top_p": self.top_p}


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: without special tokens.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens of the answer.
        finished: whether the model ended it; else it was cut at the longest answer.
        first_token_seconds: from the prompt to the first token.
        decode_tokens_per_second: of the tokens after the first; None if there were none.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    finished: bool
    first_token_seconds: float
    decode_tokens_per_second: float | None

    def banner(self, runtime_banner: str) -> str:
        """Return the runtime's line with this answer's speed after its first part."""
        if self.decode_tokens_per_second is None:
            return runtime_banner
        first, *others = runtime_banner.split(" | ")
        return " | ".join([first, f"decode {self.decode_tokens_per_second:.1f} tok/s", *others])


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    """Return the tokens (1, P) of a conversation in the model's own chat template."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def prompt_ids(tokenizer: Any, prompt: str, *, raw: bool) -> Any:
    """Return the tokens (1, P) of a prompt: as a chat message where there is a template and not ``raw``."""
    if tokenizer.chat_template and not raw:
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def generate(
    loaded: Loaded,
    ids_1P: Any,
    options: SamplingOptions,
    ctx_size: int | None,
    emit: Callable[[str], None],
) -> Answer:
    """Answer a prompt, passing each piece of text to ``emit`` as soon as it is certain.

    Raises:
        ContextError: the prompt leaves no room for an answer.
    """
    import torch

    model, tokenizer = loaded.model, loaded.tokenizer
    pieces: list[str] = []

    def take(text: str) -> None:
        pieces.append(text)
        emit(text)

    times: list[float] = []
    prompt_tokens = int(ids_1P.shape[1])
    longest = _longest(model, prompt_tokens, options.max_new_tokens, ctx_size)
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    with torch.inference_mode(), deferred_imports():
        output = model.generate(
            ids_1P,
            attention_mask=torch.ones_like(ids_1P),
            streamer=_streamer(tokenizer, take, times),
            max_new_tokens=longest,
            eos_token_id=ends,
            pad_token_id=_pad(model, tokenizer, ends),
            **options.generate_arguments(),
        )
    is_decoder_only = not model.config.is_encoder_decoder
    new_tokens = int(output.shape[1]) - (prompt_tokens if is_decoder_only else 1)
    finished = int(output[0, -1]) in (ends if isinstance(ends, list) else [ends])
    return Answer(
        text="".join(pieces),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        finished=finished,
        first_token_seconds=times[1] - times[0],
        decode_tokens_per_second=(len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else None,
    )


def _streamer(tokenizer: Any, take: Callable[[str], None], times: list[float]) -> Any:
    """Return a streamer that passes text on and notes when the prompt was given and each token came."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())
            super().put(value)  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                take(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _longest(model: Any, prompt_tokens: int, wanted: int, ctx_size: int | None) -> int:
    """Return how long the answer may become within the context."""
    if model.config.is_encoder_decoder:
        return wanted
    plan = model.gangline.plan
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = plan.context if plan.budget is not None else ctx_size or own
    if context is None:
        return wanted
    if prompt_tokens >= context:
        raise ContextError(
            f"the prompt has {prompt_tokens} tokens and the context {context}; "
            f"shorten it, or give --ctx-size {prompt_tokens + wanted} if the model was made for it"
        )
    return int(min(wanted, context - prompt_tokens))


def _pad(model: Any, tokenizer: Any, ends: Any) -> int | None:
    for found in (model.generation_config.pad_token_id, tokenizer.pad_token_id):
        if found is not None:
            return int(found)
    end = ends[0] if isinstance(ends, list) else ends
    return None if end is None else int(end)
