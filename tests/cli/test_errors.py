"""Every error is one line on stderr with the right exit code; a traceback only where it is asked for."""

import os
import signal
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from gangline.cli.command import command
from gangline.cli.group import GanglineGroup
from gangline.core import errors

RAISED = {
    "gangline": (
        errors.PackError("pack is damaged;\n make it again"),
        1,
        "error: pack is damaged; make it again",
    ),
    "budget": (errors.BudgetError("needs 3 GiB", smallest=3), 1, "error: needs 3 GiB"),
    "usage": (errors.UsageError("cannot read the size '6'"), 2, "error: cannot read the size '6'"),
    "parameter": (
        typer.BadParameter("no such key."),
        2,
        "error: Invalid value: no such key (see 'gangline fail --help')",
    ),
    "disk": (
        OSError(28, "No space left on device", "/some/file"),
        1,
        "error: No space left on device: /some/file",
    ),
    "memory": (MemoryError("16 GiB"), 1, "error: MemoryError: 16 GiB (unexpected; --debug shows where)"),
    "bug": (KeyError("x"), 1, "error: KeyError: 'x' (unexpected; --debug shows where)"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted"),
    "abort": (typer.Abort(), 130, "interrupted"),
}


@pytest.fixture
def failing():
    """Run a command that raises the error of that name."""
    app = typer.Typer(cls=GanglineGroup, pretty_exceptions_enable=False)

    def fail(out, what: str) -> None:
        raise RAISED[what][0]

    @app.callback()
    def top() -> None:
        """Keep the program a group although it has one command."""

    command(app, "fail")(fail)
    return lambda *arguments: CliRunner().invoke(app, ["fail", *arguments], prog_name="gangline")


@pytest.mark.parametrize("what", RAISED)
def test_one_line_and_the_exit_code(failing, what):
    _, code, line = RAISED[what]
    result = failing(what)
    assert (result.exit_code, result.stderr, result.stdout) == (code, f"{line}\n", "")


def test_exit_codes_of_a_command_pass_through():
    app = typer.Typer(cls=GanglineGroup)

    @app.callback()
    def top() -> None:
        """Keep the program a group although it has one command."""

    @app.command("check")
    def check() -> None:
        raise typer.Exit(3)

    result = CliRunner().invoke(app, ["check"])
    assert (result.exit_code, result.stderr) == (3, "")


def test_debug_shows_the_traceback(failing):
    result = failing("bug", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: KeyError")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["run"],
        ["run", "m"],
        ["run", "m", "p", "extra"],
        ["run", "m", "p", "--memory"],
        ["run", "m", "p", "--precision", "int5"],
        ["run", "m", "p", "--ctx-size", "0"],
        ["run", "m", "p", "--ctx-size", "1.5"],
        ["run", "m", "p", "--threads", "-1"],
        ["run", "m", "p", "--dtype", "float8"],
        ["run", "m", "p", "--io", "fast"],
        ["run", "m", "p", "--temperature", "-1"],
        ["run", "m", "p", "--top-p", "2"],
        ["run", "m", ""],
        ["run", "m", "p", "--memory", "6"],
        ["run", "m", "p", "--memory", "six GiB"],
        ["run", "m", "p", "--memory", "0GiB"],
        ["chat", "m", "--memory", "6XB"],
        ["check", "m", "--share", "0"],
        ["check", "m", "--share", "1.5"],
        ["check", "m", "--batch", "0"],
        ["bench"],
        ["bench", "m", "--shape", "olmoe-1b-7b"],
        ["bench", "--shape", "no-such-shape"],
        ["bench", "--shape", "olmoe-1b-7b:0"],
        ["bench", "--shape", "olmoe-1b-7b:many"],
        ["bench", "m", "--new-tokens", "1"],
        ["convert", "m"],
        ["convert", "m", "o", "--to", "onnx"],
        ["cache"],
        ["cache", "rm"],
        ["cache", "rm", "packs/absent"],
        ["cache", "rm", "../outside", "--yes"],
        ["cache", "rm", "name", "--all"],
        ["cache", "verify", "packs/absent"],
        ["doctor", "--folder", "/no/such/folder"],
    ],
)
def test_wrong_usage(gangline, only_error, arguments):
    result = gangline(*arguments)
    assert result.exit_code == 2, result.stderr
    only_error(result)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "absent.gguf", "owner/name:file.bin"])
@pytest.mark.parametrize(
    "verb", [["run", "NAME", "hello"], ["chat", "NAME"], ["check", "NAME"], ["bench", "NAME"]]
)
def test_no_such_model(gangline, only_error, verb, name):
    result = gangline(*[name if word == "NAME" else word for word in verb])
    assert result.exit_code == 1
    assert name in only_error(result)


def test_nothing_given_prints_help(gangline):
    result = gangline()
    assert result.exit_code == 0
    assert "doctor" in result.stdout


def test_version(gangline):
    import gangline as package

    assert gangline("--version").stdout == f"gangline {package.__version__}\n"


def program(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from gangline.cli.main import app\n"
        "try:\n"
        "    app(['--help'])\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    process = program(code)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "Exit codes" in out
    assert err == "[]\n"


def test_no_colour_off_a_terminal():
    process = program("from gangline.cli.main import app; app(['cache', 'ls'])")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "\x1b" not in out + err


def test_interrupt_is_one_line():
    code = (
        "import signal, time, gangline.cli.cmd_cache as c\n"
        # A shell starts its background jobs, and so perhaps these tests, with interrupts ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def slow(): print('ready', flush=True); time.sleep(60)\n"
        "c.entries = slow\n"
        "from gangline.cli.main import app; app(['cache', 'ls'])\n"
    )
    process = program(code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_reader_that_goes_away_is_no_error():
    code = (
        "import gangline.cli.cmd_cache as c\n"
        "from gangline.cli.main import app\n"
        "def wait(out):\n"
        "    input()\n"
        "    for _ in range(10000): out.stream('x' * 100)\n"
        "from gangline.cli.command import command\n"
        "command(app, 'pour')(wait)\n"
        "app(['pour'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    err = process.stderr.read()
    assert process.wait(timeout=30) == 1
    assert err == ""
