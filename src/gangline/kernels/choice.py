"""Which kernel computes the experts of a layer: the native core where it knows the bytes, else torch."""

import logging
from functools import cache
from typing import Any

from gangline.core.layout import ExpertLayout
from gangline.kernels.cpu import native
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.kernels.reference import ExpertMath, ReferenceKernel

_log = logging.getLogger(__name__)


def expert_kernel(layout: ExpertLayout, expert_math: ExpertMath) -> NativeKernel | ReferenceKernel:
    """Return the fastest kernel for experts that lie as ``layout`` says and compute ``expert_math``."""
    reason = NativeKernel.supports(layout, expert_math)
    if reason is None:
        return NativeKernel(layout, expert_math)
    _say_once(reason)
    return ReferenceKernel(layout, expert_math)


def set_native_threads(threads: int) -> None:
    """Let the native core compute with this many threads; nothing where it was not built."""
    core: Any = native()
    if core is not None:
        core.set_threads(threads)


@cache
def _say_once(reason: str) -> None:
    _log.info("experts are computed by torch, slower than the native core: %s", reason)
