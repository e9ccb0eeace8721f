"""What one invocation of the command line remembers across commands, and its exit codes."""

from dataclasses import dataclass

import typer

OK = 0
FAILED = 1
USAGE = 2
NOT_PASSED = 3  # a check ran to its end, and did not pass
INTERRUPTED = 130


@dataclass
class State:
    """One invocation; click hands it to every command as ``ctx.obj``."""

    debug: bool = False


def set_debug(ctx: typer.Context, value: bool) -> bool:
    """Remember ``--debug`` where the error handling finds it (callback of the option)."""
    if isinstance(ctx.obj, State):
        ctx.obj.debug = value
    return value
