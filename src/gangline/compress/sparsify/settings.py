"""What a sparsification is asked to do."""

from dataclasses import dataclass
from typing import Literal, get_args

from gangline.core.errors import UsageError
from gangline.formats.registry import sparse_codec
from gangline.formats.samoyeds import SparseCodec
from gangline.formats.samoyeds_pattern import SparsePattern

Method = Literal["magnitude", "wanda", "sparsegpt", "alps"]
METHODS: tuple[Method, ...] = get_args(Method)
PRECISIONS = {"stored": "bf16", "bf16": "bf16", "fp16": "fp16", "int8": "int8g64", "int4": "int4g32"}


@dataclass(frozen=True)
class SparsifySettings:
    """Pattern, method and how much text to look at.

    Attributes:
        pattern: ``1:2:32``, ``3:4:64``, ``2:4``, ... (``formats/samoyeds_pattern.py``).
        method: how weights are chosen and the others corrected.
        precision: of the values that are kept: ``bf16``, ``fp16``, ``int8``, ``int4``, or with a group
            ``int4g64``. ``stored`` is ``fp16`` for experts that are stored so, ``bf16`` for all others.
        min_tokens: an expert with fewer routed tokens is calibrated on a sample of all the layer's tokens
            instead, and the report says so.
        damping: share of the mean of the diagonal that is added to a second-moment matrix.
        permute: put the intermediate channels of an expert in an order that keeps more.
        reconstruct: how often to go through the experts of a layer and fit their down projections to what
            the layer puts out in the model before pruning (``reconstruct.py``); 0 for not at all.
        distill_tokens: on so many tokens the pruned experts learn from the model before pruning
            (``distill.py``); 0 for not at all.
        distill_text: share of the text's own next tokens in what is learned then, the rest being what the
            model before pruning says.
    """

    pattern: str = "2:4"
    method: Method = "sparsegpt"
    precision: str = "stored"
    min_tokens: int = 128
    damping: float = 0.01
    permute: bool = False
    reconstruct: int = 0
    distill_tokens: int = 0
    distill_text: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; choose {', '.join(METHODS)}")
        if self.min_tokens < 1 or not 0 < self.damping < 10:
            raise UsageError("min_tokens must be at least 1, and damping above 0 and below 10")
        if self.reconstruct < 0 or self.distill_tokens < 0:
            raise UsageError("reconstruct and distill_tokens must be 0 or more")
        if not 0 <= self.distill_text <= 1:
            raise UsageError("distill_text is a share, from 0 to 1")
        if self.distill_text and not self.distill_tokens:
            raise UsageError("distill_text is a share of what is learned: give distill_tokens too")
        _ = self.codec

    @property
    def codec(self) -> SparseCodec:
        """The codec that holds the result; FormatError if there is none."""
        values = PRECISIONS.get(self.precision, self.precision)
        return sparse_codec(f"samoyeds:{SparsePattern.parse(self.pattern)}/{values}")

    @property
    def needs_tokens(self) -> bool:
        """Whether the choice of weights depends on the text."""
        return self.method != "magnitude"
