"""Progress bars of steps that move bytes; quiet off a terminal and where the Hub's bars are switched off."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def byte_bar(title: str, show: bool | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show bytes done, rate and time left on stderr; yields ``update(done, total)``.

    Args:
        title: what is being done.
        show: True or False; None shows the bar on a terminal unless HF_HUB_DISABLE_PROGRESS_BARS is set.
    """
    if show is None:
        show = sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    with tqdm(desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=not show) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
