"""A progress bar over layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def layer_bar(layers: int, show: bool, title: str = "converting") -> Iterator[Callable[[], object]]:
    """Yield a function to call after each layer; the bar goes to stderr if that is a terminal."""
    with tqdm(total=layers, desc=title, unit="layer", disable=None if show else True) as bar:
        yield lambda: bar.update(1)
