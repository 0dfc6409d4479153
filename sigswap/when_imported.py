"""Setting up another package when it is imported, at once or later, without importing it."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class WhenImported(importlib.abc.MetaPathFinder):
    """A finder that calls ``set_up(module)`` at the end of the import of the module ``target``, and then goes.

    It finds nothing itself. Where that import was under way before, in the thread that imports sigswap, the next import
    of any module does it. ``set_up`` may run more than once, but not in two threads at a time.
    """

    def __init__(self, target: str, set_up: Callable[[ModuleType], None]) -> None:
        self.target, self._set_up = target, set_up
        self._at_work = threading.Lock()

    def install(self) -> None:
        """Sets up at once if the module is imported, else when it will be. If another thread imports it just now, this
        waits for that thread.
        """
        module = sys.modules.get(self.target)
        if module is not None and _is_being_imported(module):
            with contextlib.suppress(Exception):  # an import that fails is its importer's to report
                importlib.import_module(self.target)
            module = sys.modules.get(self.target)
        if module is not None and not _is_being_imported(module):
            self._run(module)
        elif not any(self._is_alike(finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.target:
            module = sys.modules.get(self.target)
            if module is not None and not _is_being_imported(module):
                self._run(module)
            return None
        for finder in [other for other in sys.meta_path if not self._is_alike(other)]:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if spec.loader is not None:
                    self._follow(spec.loader)
                return spec
        return None

    def _follow(self, loader: Any) -> None:
        """Sets up when ``loader`` has executed its module."""
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self._run(module)

        loader.exec_module = exec_module

    def _run(self, module: ModuleType) -> None:
        if not self._at_work.acquire(blocking=False):
            return  # by another thread, or for an import that this has made; to wait here could be for oneself
        try:
            self._set_up(module)
        finally:
            if any(self._is_alike(finder) for finder in sys.meta_path):
                # Another list: imports that are under way, in this or other threads, are going through this one.
                sys.meta_path = [finder for finder in sys.meta_path if not self._is_alike(finder)]
            self._at_work.release()

    def _is_alike(self, finder: object) -> bool:
        return isinstance(finder, WhenImported) and finder.target == self.target


def _is_being_imported(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
