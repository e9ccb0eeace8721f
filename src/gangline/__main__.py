"""``python -m gangline`` is the command line."""

from gangline.cli.main import app

app()
