"""The one place that turns exceptions into a line on stderr and an exit code."""

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from gangline.cli.state import FAILED, INTERRUPTED, OK, USAGE, State
from gangline.core.errors import GanglineError, UsageError

# Typer keeps its click inside itself in newer releases; the base class is the same by any name.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class GanglineGroup(TyperGroup):
    """The top of the command line: every error becomes one line; a traceback only with ``--debug``."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; with ``standalone_mode`` exit the process, else return the exit code."""
        state = extra.setdefault("obj", State())
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            result = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            code = result if isinstance(result, int) else OK
        except BrokenPipeError:
            _close_pipe()
            code = FAILED
        except BaseException as error:  # noqa: BLE001 - the last place that can still speak plainly
            if state.debug and not isinstance(error, SystemExit):
                traceback.print_exc()
            code = _explain(error)
        if code == INTERRUPTED:
            _say("interrupted")
        if standalone_mode:
            sys.exit(code)
        return code


def _explain(error: BaseException) -> int:
    """Say in one line what went wrong and return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return INTERRUPTED
    if isinstance(error, _ClickException):
        context = getattr(error, "ctx", None)
        hint = f" (see '{context.command_path} --help')" if context is not None else ""
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        _say(f"error: {message}{hint}")
        return USAGE
    if isinstance(error, GanglineError):
        _say(f"error: {error}")
        return USAGE if isinstance(error, UsageError) else FAILED
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        _say(f"error: {error.strerror}{where}")
        return FAILED
    _say(f"error: {type(error).__name__}: {error} (unexpected; --debug shows where)")
    return FAILED


def _say(text: str) -> None:
    sys.stderr.write(" ".join(text.split()) + "\n")


def _close_pipe() -> None:
    # The reader of our output has gone: without this the interpreter complains when it flushes at exit.
    try:
        sys.stdout.close()
    except BrokenPipeError:
        return
