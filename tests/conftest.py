"""Rules for every test: fresh seeds that can be repeated, a private cache folder, no network, GPU skips."""

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Set before transformers and huggingface_hub are imported: they read it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and idle ones that spin take the other tests' cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

RUN_SEED = int(os.environ.get("GANGLINE_TEST_SEED", random.SystemRandom().randrange(2**32)))

# Speed is a benchmark, never a test: no deadline.
settings.register_profile(
    "gangline", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gangline")


def pytest_report_header() -> str:
    return f"gangline: seed {RUN_SEED}; repeat this run with GANGLINE_TEST_SEED={RUN_SEED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none here"))


@pytest.fixture(scope="session", autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep everything that gangline caches in a folder of this run."""
    home = tmp_path_factory.mktemp("gangline-home")
    before = os.environ.get("GANGLINE_HOME")
    os.environ["GANGLINE_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["GANGLINE_HOME"]
    else:
        os.environ["GANGLINE_HOME"] = before


def _seed_of(request: pytest.FixtureRequest) -> int:
    digest = hashlib.sha256(f"{RUN_SEED}:{request.node.nodeid}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Whatever a test draws without asking for a seed can be repeated as well."""
    random.seed(_seed_of(request))
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(_seed_of(request))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that is fresh in every run and differs between tests; the header says how to repeat it.

    Asking for it also seeds torch, so ``torch.randn`` in the test is covered.
    """
    import torch

    value = _seed_of(request)
    torch.manual_seed(value)
    return value
