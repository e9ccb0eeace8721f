"""The largest size that still works, by trying."""

from collections.abc import Callable


def largest(works: Callable[[int], bool], most: int, *, parts: int = 16) -> int:
    """Return the largest of the tried sizes at which ``works`` is true; 0 if it is nowhere.

    Sizes are doubled until one fails, then the gap is halved until it is a ``parts``-th of what works.

    Args:
        works: whether so many fit; true below a size and false above it.
        most: the largest size of interest.
        parts: how fine the answer is.
    """
    good, bad = 0, most + 1
    size = 1
    while size < bad:
        if works(size):
            good = size
            if size == most:
                break
            size = min(2 * size, most)
        else:
            bad = size
    while bad - good > max(1, good // parts):
        size = (good + bad) // 2
        if works(size):
            good = size
        else:
            bad = size
    return good
