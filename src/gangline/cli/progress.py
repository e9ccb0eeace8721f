"""Progress bars on stderr: only on a terminal, and off where the Hub's own bars are switched off."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield ``progress(done, total)``, both in bytes, which draws a bar with speed and time left."""
    from tqdm import tqdm

    off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    with tqdm(desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=off or None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
