import os

import pytest
from typer.testing import CliRunner

from gangline.cli.main import app


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """No flag comes from the environment of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("GANGLINE_") and name not in ("GANGLINE_HOME", "GANGLINE_TEST_SEED"):
            monkeypatch.delenv(name)


@pytest.fixture
def gangline():
    """Run the command line in this process: ``gangline("plan", "demo")`` -> exit_code, stdout, stderr."""
    runner = CliRunner()

    def call(*arguments, **more):
        return runner.invoke(app, [str(argument) for argument in arguments], prog_name="gangline", **more)

    return call


@pytest.fixture
def only_error():
    """Assert that a result is one line on stderr and nothing on stdout, and return that line."""

    def check(result):
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    return check
