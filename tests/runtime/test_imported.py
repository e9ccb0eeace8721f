"""Whoever waits for a module learns that it was imported, and nobody else notices."""

import importlib
import importlib.util
import inspect
import sys

import pytest

from gangline.runtime.imported import Watch


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported, and is not yet."""
    name = f"watched_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def watch():
    watch = Watch()
    yield watch
    assert watch not in sys.meta_path


def test_calls_once_after_the_module_is_executed(module, watch):
    seen = []
    watch.when_imported(module, lambda it: seen.append((it.__name__, it.VALUE)))
    watch.when_imported(module, lambda it: seen.append("second"))
    assert watch in sys.meta_path and importlib.util.find_spec(module) is not None and not seen
    it = importlib.import_module(module)
    assert seen == [(module, 3), "second"]
    assert "exec_module" not in vars(it.__loader__)
    assert inspect.getsource(it) == "VALUE = 3\n"
    importlib.reload(it)
    assert len(seen) == 2


def test_an_error_of_a_caller_stops_no_import(module, watch):
    seen = []
    watch.when_imported(module, lambda it: 1 // 0)
    watch.when_imported(module, seen.append)
    assert importlib.import_module(module).VALUE == 3
    assert seen == [sys.modules[module]]


def test_forgets(module, watch):
    seen = []
    watch.when_imported(module, seen.append)
    watch.forget(module, seen.append)
    watch.forget(module, seen.append)
    assert watch not in sys.meta_path
    importlib.import_module(module)
    assert not seen


def test_a_module_that_fails_or_is_not_there_fails_as_ever(tmp_path, module, watch):
    seen = []
    (tmp_path / f"{module}.py").write_text("raise ValueError('mine')\n")
    watch.when_imported(module, seen.append)
    watch.when_imported(f"{module}_missing", seen.append)
    with pytest.raises(ValueError, match="mine"):
        importlib.import_module(module)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{module}_missing")
    assert not seen
    (tmp_path / f"{module}.py").write_text("VALUE = 44\n")
    importlib.invalidate_caches()
    assert importlib.import_module(module).VALUE == 44 and len(seen) == 1
    watch.forget(f"{module}_missing", seen.append)


@pytest.mark.parametrize("first", [True, False])
def test_lives_with_finders_that_ask_all_finders(module, watch, monkeypatch, first):
    class Asks:
        busy = False

        def find_spec(self, name, path=None, target=None):
            if name != module or self.busy:
                return None
            self.busy = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.busy = False

    seen = []
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    if first:
        watch.when_imported(module, seen.append)
    sys.meta_path.insert(0, Asks())
    if not first:
        watch.when_imported(module, seen.append)
    assert importlib.import_module(module).VALUE == 3
    assert len(seen) == 1


def test_a_loader_that_takes_nothing_works_as_ever(module, watch, monkeypatch):
    real = importlib.util.find_spec(module)

    class Loader:
        __slots__ = ()

        def create_module(self, spec):
            return None

        def exec_module(self, it):
            real.loader.exec_module(it)

    class Finder:
        def find_spec(self, name, path=None, target=None):
            return importlib.util.spec_from_loader(name, Loader()) if name == module else None

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    seen = []
    watch.when_imported(module, seen.append)
    assert importlib.import_module(module).VALUE == 3
    assert not seen
    watch.forget(module, seen.append)
