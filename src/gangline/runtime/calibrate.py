"""What computing costs here, measured on the very kernels and layers that a loaded model runs.

Two kinds of figures: seconds per weight of an expert in each format, by rows; and what a layer and an expert
cost apart from their weights (attention glue, routing, the store), from a model so small that its weights
cost nothing.

Shape suffixes: T tokens, P pairs, D hidden.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gangline.core.errors import FormatError
from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import DenseCodec, get_codec
from gangline.kernels.choice import expert_kernel
from gangline.kernels.reference import ExpertMath
from gangline.runtime.attach import attach_model
from gangline.runtime.machine import ExpertSpeed, LayerCost
from gangline.runtime.opened import PRECISIONS

CODECS = (
    *("bf16", "fp16", "fp32"),
    *(codec for codec in PRECISIONS.values() if codec is not None),
    *("mxfp4", "ggml:Q4_0", "ggml:Q8_0", "ggml:Q4_K", "ggml:Q6_K"),
)
ROWS = (1, 16, 64)
WIDTH = 1024  # of the expert that is measured, hidden and intermediate
POOL_BYTES = 192 << 20  # experts are taken in turn from more memory than caches hold
_AT_ONCE = 8  # experts of one call, as many as a token of most models uses
_GLUE_LAYERS = 8
_GLUE_EXPERTS = 32


def expert_speeds(seconds: float, codecs: tuple[str, ...] = CODECS) -> Iterator[ExpertSpeed]:
    """Measure the experts' kernel in every format, about ``seconds`` for each format and number of rows."""
    for codec in codecs:
        yield from _speeds_of(codec, seconds)


def _speeds_of(codec: str, seconds: float) -> Iterator[ExpertSpeed]:
    names = ("gate", "up", "down")
    shape = (WIDTH, WIDTH)
    spec = [FieldSpec(name, shape, codec, get_codec(codec).nbytes(shape)) for name in names]
    layout = ExpertLayout(tuple(spec))
    kernel: Any = expert_kernel(layout, ExpertMath(_gate))
    raws = [_encoded(codec, shape) for _ in names]
    count = max(_AT_ONCE, POOL_BYTES // layout.nbytes)
    pool = [kernel.bind([raw.clone() for raw in raws]) for _ in range(count)]
    found = get_codec(codec)
    dtype = found.stored if isinstance(found, DenseCodec) else torch.bfloat16
    for rows in ROWS:
        x_TD = torch.randn(rows, WIDTH).to(dtype)
        token_P = torch.arange(rows).repeat(_AT_ONCE)
        starts = [rows * n for n in range(_AT_ONCE + 1)]

        def one(turn: int, x_TD: torch.Tensor = x_TD, token_P: torch.Tensor = token_P) -> None:
            first = turn * _AT_ONCE % (count - _AT_ONCE + 1)
            weights = pool[first : first + _AT_ONCE]
            kernel.pairs(x_TD, token_P, starts, weights, range(_AT_ONCE))  # noqa: B023 - called in this turn

        cost = typical_seconds(one, seconds) / (_AT_ONCE * 3 * WIDTH * WIDTH)
        yield ExpertSpeed(codec, rows, cost)


def _gate(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _encoded(codec: str, shape: tuple[int, int]) -> torch.Tensor:
    weight = torch.randn(shape) * 0.02
    try:
        return get_codec(codec).encode(weight).clone()
    except (FormatError, NotImplementedError):  # a format that we only read: zeros take the same time
        return torch.zeros(get_codec(codec).nbytes(shape), dtype=torch.uint8)


def layer_cost(tokens: int = 24) -> LayerCost:
    """Measure what layers and experts cost apart from their weights, on a tiny model with all experts in
    memory."""
    with torch.random.fork_rng(devices=[]):
        few, _ = _tiny_times(1, tokens)
        many, prompt = _tiny_times(_AT_ONCE, tokens)
    expert = max(0.0, (many - few) / (_GLUE_LAYERS * (_AT_ONCE - 1)))
    layer = max(0.0, few / _GLUE_LAYERS - expert)
    return LayerCost(
        layer=layer,
        expert=expert,
        prompt_expert=max(0.0, (prompt / _GLUE_LAYERS - layer) / _GLUE_EXPERTS),
    )


def _tiny_times(top_k: int, tokens: int) -> tuple[float, float]:
    """Return seconds of a decoded token, and of a prompt that uses every expert with a few rows."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=_GLUE_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=_GLUE_EXPERTS,
        num_experts_per_tok=top_k,
        max_position_embeddings=1024,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = OlmoeForCausalLM(config).eval()
    with attach_model(model, ctx_size=1024, check=False), torch.inference_mode():
        prompts, decodes = [], []
        for _ in range(3):
            start = time.perf_counter()
            out = model(torch.randint(64, (1, 64)), use_cache=True)
            prompts.append(time.perf_counter() - start)
            for _ in range(tokens):
                start = time.perf_counter()
                token = torch.randint(64, (1, 1))
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                decodes.append(time.perf_counter() - start)
    return lower_quartile(decodes), lower_quartile(prompts)


def typical_seconds(call: Callable[[int], object], seconds: float) -> float:
    """Return the lower quartile of the durations of ``call(turn)``, called for about ``seconds`` and at least
    three times: other programs only ever add to a duration.
    """
    times: list[float] = []
    with torch.inference_mode():
        call(0)
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            call(len(times))
            times.append(time.perf_counter() - start)
    return lower_quartile(times)


def lower_quartile(times: Sequence[float]) -> float:
    """Return the value below which a quarter of the times lies."""
    return sorted(times)[len(times) // 4]
