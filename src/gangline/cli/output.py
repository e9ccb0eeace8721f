"""Where a command writes: data on stdout, everything else on stderr, colour only on a terminal."""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_WIDTH_OFF_TERMINAL = 140


class Output:
    """What a command prints, as text for people or as one JSON document.

    Attributes:
        json: whether the user asked for JSON; then nothing but :meth:`data` reaches stdout.
    """

    def __init__(self, *, json: bool) -> None:
        self.json = json

    def data(self, document: dict[str, Any]) -> None:
        """Print ``document`` on stdout if JSON was asked for."""
        if self.json:
            sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
            sys.stdout.flush()

    def show(self, renderable: "RenderableType") -> None:
        """Print text or a rich table on stdout, unless JSON was asked for."""
        if not self.json:
            _console(stderr=False).print(
                renderable, markup=False, highlight=False, soft_wrap=isinstance(renderable, str)
            )

    def stream(self, text: str) -> None:
        """Print a piece of an answer on stdout at once, unless JSON was asked for."""
        if not self.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Print a line for people on stderr."""
        _console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_WIDTH_OFF_TERMINAL)
