"""``--config FILE`` and ``--show-config``: where the value of each flag comes from.

Precedence: command line, variable, file, default. Click itself applies it; this file fills its
``default_map`` and reads back the sources.
"""

import difflib
from pathlib import Path
from typing import Any

import typer

_FILE_ONLY = ("config", "show-config", "help")
_SOURCES = {"COMMANDLINE": "command line", "DEFAULT": "default"}


def read_config(ctx: typer.Context, value: str | None) -> str | None:
    """Make the keys of a YAML file the defaults of this command (callback of ``--config``).

    Keys of other commands are allowed, so that one file serves several commands.

    Raises:
        typer.BadParameter: the file cannot be read, is not a mapping, or has a key that no command knows.
    """
    if value is None or ctx.resilient_parsing:
        return value
    names = _flags(ctx.command)
    others = _flags_of_all(ctx)
    defaults: dict[str, Any] = {}
    for key, setting in _mapping(value).items():
        if key in names and key not in _FILE_ONLY:
            defaults[names[key]] = setting
        elif key not in others:
            raise typer.BadParameter(f"{value}: no flag --{key}{_nearest(str(key), {**others, **names})}")
    ctx.default_map = defaults
    return value


def settings(ctx: typer.Context) -> list[dict[str, Any]]:
    """Return one row per flag of the running command: ``key``, ``value``, ``source``."""
    rows = []
    for param in ctx.command.params:
        if param.name is None or param.name in ("help", "show_config"):
            continue
        source = ctx.get_parameter_source(param.name)
        name = source.name if source is not None else "DEFAULT"
        if name == "ENVIRONMENT":
            text = f"variable {param.envvar}"
        elif name == "DEFAULT_MAP":
            text = f"file {ctx.params['config']}"
        else:
            text = _SOURCES.get(name, name.lower())
        rows.append({"key": _key(param), "value": ctx.params[param.name], "source": text})
    return rows


def _mapping(file: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {file}: {error}") from error
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise typer.BadParameter(
            f"{file} must hold lines such as 'memory: 6GiB', not a {type(content).__name__}"
        )
    return content


def _key(param: Any) -> str:
    long = [flag for flag in param.opts if flag.startswith("--")]
    return str(long[0].removeprefix("--") if long else param.name)


def _flags(command: Any) -> dict[str, str]:
    return {_key(param): param.name for param in command.params if param.name is not None}


def _flags_of_all(ctx: typer.Context) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting: list[Any] = [ctx.find_root().command]
    while waiting:
        command = waiting.pop()
        found.update(_flags(command))
        waiting.extend(getattr(command, "commands", {}).values())
    return {key: name for key, name in found.items() if key not in _FILE_ONLY}


def _nearest(key: str, known: dict[str, str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
