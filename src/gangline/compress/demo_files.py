"""The shipped file of the demo model, and how files are told apart; finding the model needs no more."""

import hashlib
from pathlib import Path

FORMAT = "gangline-demo-2"
ARTIFACT = Path(__file__).with_name("demo_artifact.safetensors")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
