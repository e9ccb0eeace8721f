"""The quick way to import the libraries leaves them as the plain way does."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gangline.cli import startup
from gangline.runtime import libraries

PLAIN = """
import transformers, transformers.models, torch
"""
QUICK = """
import gc
from gangline.cli.startup import import_libraries
before = gc.isenabled()
import_libraries()
assert gc.isenabled() is before and gc.get_freeze_count() > 0
import transformers, transformers.models, torch
from transformers.utils import import_utils
assert hasattr(import_utils.create_import_structure_from_path, "cache_info")
"""
LIBRARY = """
import gc
assert gc.get_freeze_count() == 0
import gangline
assert callable(gangline.load) and gc.isenabled() and gc.get_freeze_count() == 0
import transformers, transformers.models, torch
"""
REPORT = """
import json
print(json.dumps({
    "models": {k: sorted(v) for k, v in sorted(transformers.models._import_structure.items())},
    "names": sorted(transformers.models.__all__),
    "sum": float(torch.arange(9.0).view(3, 3).mm(torch.ones(3, 3)).sum()),
    "threads": torch.get_num_threads(),
    "library": torch.__config__.parallel_info().splitlines()[0],
}))
"""


@pytest.mark.slow
def test_libraries_are_as_the_plain_import_leaves_them():
    plain, *others = (
        subprocess.run(
            [sys.executable, "-c", code + REPORT], capture_output=True, text=True, check=True
        ).stdout
        for code in (PLAIN, QUICK, QUICK, LIBRARY, "import torch\n" + LIBRARY)
    )
    for quick in others:
        assert json.loads(quick) == json.loads(plain)
    assert len(json.loads(plain)["models"]) > 100


def test_what_is_imported_is_left_alone(monkeypatch):
    pytest.importorskip("torch")
    frozen = gc.get_freeze_count()
    monkeypatch.setattr(startup, "import_module", lambda name: pytest.fail(f"imported {name} again"))
    startup.import_libraries()
    assert gc.get_freeze_count() == frozen


@pytest.mark.parametrize("missing", [None, "torch", "system", "dlopen", "files"])
def test_maps_what_is_there(monkeypatch, tmp_path, missing):
    opened = []

    def dlopen(path, flags):
        opened.append(Path(os.fsdecode(path)).name)

    here = SimpleNamespace() if missing == "dlopen" else SimpleNamespace(dlopen=dlopen)
    monkeypatch.setattr(libraries.ctypes, "CDLL", lambda name: here)
    spec = SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if missing == "torch" else spec)
    monkeypatch.setattr(libraries.sys, "platform", "plan9" if missing == "system" else "linux")
    names = ["libtorch_global_deps.so", "libtorch_cpu.so"]
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    for name in [] if missing == "files" else names:
        (tmp_path / "torch" / "lib" / name).write_bytes(b"")
    libraries._map_torch()
    assert opened == (names if missing is None else [])


def test_the_second_thread_does_something_else_meanwhile():
    code = (
        "import sys, threading\n"
        "from gangline.cli.startup import import_libraries\n"
        "done = threading.Event()\n"
        "def say():\n"
        "    print(threading.current_thread() is threading.main_thread()); done.set()\n"
        "import_libraries(say); done.wait(); import_libraries(say)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_library_that_cannot_be_mapped_stops_nobody():
    code = (
        "from gangline.cli import startup\n"
        "from gangline.runtime import libraries\n"
        "libraries._map_torch = lambda: 1 // 0\n"
        "startup.import_libraries()\n"
        "import torch; print(torch.ones(2).sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2.0"]
