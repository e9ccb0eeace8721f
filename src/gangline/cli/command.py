"""``@command``: registers a function as a command and gives it the options that all commands share."""

import dataclasses
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

import typer

from gangline.cli.config import settings
from gangline.cli.options import OutputOptions
from gangline.cli.output import Output

Body = Callable[..., None]


def command(app: typer.Typer, name: str) -> Callable[[Body], Body]:
    """Register a function as the command ``name`` of ``app``.

    The first parameter of the function is the :class:`Output`. A parameter annotated with a dataclass of
    options is replaced by that dataclass's fields; the function gets the filled dataclass. The fields of
    :class:`OutputOptions` are added to every command.
    """

    def register(body: Body) -> Body:
        hints = get_type_hints(body, include_extras=True)
        own = list(inspect.signature(body).parameters.values())[1:]
        groups = {item.name: hints[item.name] for item in own if dataclasses.is_dataclass(hints[item.name])}
        parameters = [_keyword("ctx", typer.Context)]
        for item in own:
            if item.name not in groups:
                parameters.append(_keyword(item.name, hints[item.name], item.default))
        for group in (*groups.values(), OutputOptions):
            parameters.extend(_fields(group))

        def run(ctx: typer.Context, **values: Any) -> None:
            common = _take(OutputOptions, values)
            output = Output(json=common.json)
            if common.show_config:
                _show_config(ctx, output)
                return
            _prepare(common.debug)
            filled = {key: _take(group, values) for key, group in groups.items()}
            body(output, **filled, **values)

        run.__doc__ = body.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in parameters}
        app.command(name)(run)
        return body

    return register


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _fields(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_keyword(field.name, hints[field.name], field.default) for field in dataclasses.fields(group)]


def _take(group: Any, values: dict[str, Any]) -> Any:
    return group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})


def _show_config(ctx: typer.Context, output: Output) -> None:
    rows = settings(ctx)
    if output.json:
        output.data({"command": ctx.command_path, "settings": rows})
        return
    from rich.table import Table

    table = Table("setting", "value", "source", box=None)
    for row in rows:
        table.add_row(row["key"], "" if row["value"] is None else str(row["value"]), row["source"])
    output.show(table)


def _prepare(debug: bool) -> None:
    """Send the library's log to stderr, and keep transformers' chatter out of it unless asked."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(name)s: %(message)s" if debug else "%(levelname)s: %(message)s",
        force=True,
    )
    if not debug and "TRANSFORMERS_VERBOSITY" not in os.environ:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        if "transformers" in sys.modules:  # it reads the variable only once, as it is imported
            from transformers.utils import logging as chatter

            chatter.set_verbosity_error()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
