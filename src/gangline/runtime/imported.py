"""Know when somebody imports a module."""

import logging
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

Call = Callable[[ModuleType], None]


class Watch:
    """Calls those who wait for a module right after it was executed; a finder only as long as one waits."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Call]] = {}
        self._searches = threading.local()

    def when_imported(self, name: str, call: Call) -> None:
        """Call once, with the module, when anybody imports it from now on."""
        self._waiting.setdefault(name, []).append(call)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def forget(self, name: str, call: Call) -> None:
        """Do not call any more."""
        waiting = self._waiting.get(name, [])
        if call in waiting:
            waiting.remove(call)
        if not waiting:
            self._take(name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find what the other finders find, and learn when it has been executed."""
        if name not in self._waiting or name in vars(self._searches):
            return None
        setattr(self._searches, name, True)
        try:
            for finder in list(sys.meta_path):
                search = getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = None if search is None else search(name, path, target)
                if spec is not None:
                    self._follow(name, spec.loader)
                    return spec
        finally:
            delattr(self._searches, name)
        return None

    def _follow(self, name: str, loader: Any) -> None:
        execute: Callable[[ModuleType], object] | None = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            execute(module)
            if module.__name__ == name:
                self._tell(module)

        with suppress(AttributeError, TypeError):  # a loader that takes nothing works as ever
            loader.exec_module = exec_module

    def _tell(self, module: ModuleType) -> None:
        for call in self._take(module.__name__):
            try:
                call(module)
            except Exception as error:  # noqa: BLE001 - nobody's import may fail because of us
                logger.debug("%s was imported: %s", module.__name__, error)

    def _take(self, name: str) -> list[Call]:
        waiting = self._waiting.pop(name, [])
        if not self._waiting:
            with suppress(ValueError):
                sys.meta_path.remove(self)
        return waiting


WATCH = Watch()
