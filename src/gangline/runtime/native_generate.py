"""The loop of ``generate()`` around native steps, where one token follows another and all experts are in RAM.

``generate()`` stays transformers': it prepares the prompt, the cache, the logits processors and the stopping
criteria, and hands them to a decoding loop. Where nothing but tokens is asked for and they end at a length or
at an end token, that loop is the one below, which gives the same tokens with less work between them (see
``native_session.py``). Everything else goes through transformers' own loop.

Shape suffixes: B sequences, P prompt tokens, V vocabulary.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from gangline.runtime.native_decode import NativeDecode

BeforeStep = Callable[[int, int], None]


def enable_native_generate(model: PreTrainedModel, decode: NativeDecode, before_step: BeforeStep) -> None:
    """Let ``model.generate`` decode through native sessions where it can.

    Args:
        model: whose ``forward`` already goes through ``decode``.
        decode: the native step. before_step: as ``NativeSession`` calls it.
    """
    if not model.can_generate() or "generate" in model.__dict__:
        return
    original: Callable[..., Any] = model.generate  # type: ignore[assignment]

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= 1 and kwargs.get("custom_generate") is None and _is_plain(model, kwargs):
            loop = functools.partial(_decode, decode, before_step, streamer=kwargs.get("streamer"))
            kwargs["custom_generate"] = loop
        with decode.generating():
            return original(*args, **kwargs)

    model.__dict__["generate"] = generate
    decode.on_close(lambda: model.__dict__.pop("generate", None))


def _is_plain(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``generate`` samples, or takes the likeliest token, and nothing else."""
    config = copy.copy(kwargs.get("generation_config") or model.generation_config)
    if not isinstance(config, GenerationConfig):
        return False
    for name in config.to_dict().keys() & kwargs.keys():
        setattr(config, name, kwargs[name])
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    return mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass
class _Ends:
    """When sequences end.

    Attributes:
        length: prompt and answer together. tokens: that end a sequence. pad: follows them.
    """

    length: int
    tokens: frozenset[int]
    pad: int

    @classmethod
    def of(cls, criteria: Sequence[Any], config: GenerationConfig) -> "_Ends | None":
        """The same as the stopping criteria, if they are of the two common kinds."""
        length, tokens = None, frozenset[int]()
        for one in criteria:
            if type(one) is MaxLengthCriteria:
                if one.max_length > (one.max_position_embeddings or one.max_length):
                    return None  # their loop warns where the model's positions end
                length = min(one.max_length, length or one.max_length)
            elif type(one) is EosTokenCriteria:
                tokens |= frozenset(one.eos_token_id.flatten().tolist())
            else:
                return None
        pad = config._pad_token_tensor
        if length is None or (tokens and pad is None):
            return None
        return cls(length, tokens, 0 if pad is None else int(pad))


class _Answer:
    """The tokens chosen so far."""

    def __init__(
        self, ids_BP: Tensor, ends: _Ends, config: GenerationConfig, processors: Any, streamer: Any
    ) -> None:
        batch, prompt = ids_BP.shape
        self._ids_BL = torch.empty(batch, max(prompt + 1, ends.length), dtype=ids_BP.dtype)
        self._ids_BL[:, :prompt] = ids_BP
        self._length = prompt
        self._ends, self._is_sampled = ends, bool(config.do_sample)
        self._processors, self._streamer = processors, streamer
        self._finished = [False] * len(ids_BP)
        self._scores_BV: Tensor | None = None

    def choose(self, logits_BV: Tensor) -> list[int]:
        """Choose the next token of every sequence, as transformers' loop does."""
        if self._scores_BV is None:
            self._scores_BV = torch.empty(logits_BV.shape, dtype=torch.float32)
        scores_BV = self._scores_BV.copy_(logits_BV)
        if self._processors:
            scores_BV = self._processors(self.tokens(), scores_BV)
        if self._is_sampled:
            next_B = torch.multinomial(scores_BV.softmax(-1), num_samples=1).squeeze(1)
        else:
            next_B = scores_BV.argmax(-1)
        tokens: list[int] = next_B.tolist()
        if self._ends.tokens:
            for row, token in enumerate(tokens):
                if self._finished[row]:
                    tokens[row] = self._ends.pad
                elif token in self._ends.tokens:
                    self._finished[row] = True
        next_B = torch.tensor(tokens)
        self._ids_BL[:, self._length] = next_B
        self._length += 1
        if self._streamer is not None:
            self._streamer.put(next_B)
        return tokens

    @property
    def is_complete(self) -> bool:
        return self._length >= self._ends.length or all(self._finished)

    def tokens(self) -> Tensor:
        """Prompts and answers, int64; good until more is chosen."""
        return self._ids_BL[:, : self._length]


def _decode(
    decode: NativeDecode,
    before_step: BeforeStep,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """A decoding loop as transformers calls it; its names of arguments are theirs."""
    theirs = functools.partial(
        type(model)._sample,
        model,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        synced_gpus=synced_gpus,
        streamer=streamer,
    )
    ends = _Ends.of(stopping_criteria, generation_config)
    asked_more = generation_config.return_dict_in_generate or generation_config.is_assistant or synced_gpus
    if ends is None or asked_more or not decode.serves_sessions:
        return theirs(input_ids, **model_kwargs)
    answer = _Answer(input_ids, ends, generation_config, logits_processor, streamer)
    outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    tokens = answer.choose(outputs.logits[:, -1])
    del outputs
    if not answer.is_complete:
        inputs = model.prepare_inputs_for_generation(answer.tokens(), next_sequence_length=1, **model_kwargs)
        session = decode.session(inputs, before_step)
        if session is None:  # their loop goes on behind the first token; by the mask it sees what is new
            if model_kwargs.get("attention_mask") is None:
                model_kwargs["attention_mask"] = torch.ones_like(answer.tokens())
            return theirs(answer.tokens().clone(), **model_kwargs)
        with closing(session):
            decode.compute_alone()
            while not answer.is_complete:
                tokens = answer.choose(session.step(tokens))
    if streamer is not None:
        streamer.end()
    return answer.tokens().clone()
