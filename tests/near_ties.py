"""Comparisons that rounding does not decide: by size, and not where a choice is all but tied.

Sums in another order differ in the last bits. Where two experts, two indexed positions or two tokens are tied
to as many digits, those bits decide which of them is taken, and everything behind differs. A mismatch counts
unless noise of the size of such bits makes the plain model itself answer otherwise; then another draw must
agree.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gangline.models import find_moe

DRAWS = 4
_FP32_NOISE = 2e-7


def share_off(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest wanted value."""
    return float((got - want).abs().max() / want.abs().max())


@contextmanager
def noisy(model: Any, noise: float, seed: int) -> Iterator[None]:
    """Embeddings and outputs of experts are ``noise`` of their row's largest value away, at random."""
    generator = torch.Generator().manual_seed(seed)

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        out = output[0] if isinstance(output, tuple) else output
        size = noise * out.abs().amax(-1, keepdim=True)
        out = out + (size * torch.randn(out.shape, generator=generator)).to(out.dtype)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    modules = [model.get_input_embeddings(), *(block.experts for block in find_moe(model).blocks)]
    hooks = [module.register_forward_hook(add) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_tied(
    model: Any,
    run: Callable[[], Any],
    differ: Callable[[Any, Any], bool],
    *,
    noise: float = _FP32_NOISE,
    pairs: int = 8,
) -> bool:
    """Whether noise alone makes the plain model's answer differ: it hangs on a choice that is all but tied.

    The noise comes in both signs: of a pair, one pushes a given tie over unless the push is too small for it.
    """
    plain = run()
    for number in range(pairs):
        for sign in (1, -1):
            with noisy(model, sign * noise, number):
                if differ(run(), plain):
                    return True
    return False


def agree_unless_tied(attempt: Callable[[int], Callable[[], bool] | None]) -> None:
    """Make draws until one agrees; each that does not must be tied.

    ``attempt(draw)`` gives nothing where ours and the plain model agree, else whether it is tied.
    """
    for draw in range(DRAWS):
        tied = attempt(draw)
        if tied is None:
            return
        assert tied(), f"draw {draw} differs from the plain model, and no choice in it is tied"
    raise AssertionError(f"{DRAWS} draws differ from the plain model, all of them near a tie")
