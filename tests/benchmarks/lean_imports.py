"""Imports training/ on machines that lack packages which a measurement never calls, such as a lent GPU."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

# Top-level imports of training/ that only reading, preparing and publishing data call.
_NOT_CALLED = ("babel", "datatrove", "langcodes", "pandas", "pyarrow", "xxhash")


class _StandIn(ModuleType):
    """A module, and whatever is taken from it; calls are accepted while modules are loaded, and never afterwards."""

    __path__ = ()
    loading = False

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(f"{self.__name__}.{name}")

    def __call__(self, *args, **kwargs):
        if not _StandIn.loading:
            raise ImportError(f"{self.__name__} was called, but its package is not installed")
        return self


class _Finder:
    """Finds the listed packages where no other finder does."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in _NOT_CALLED:
            return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


@contextmanager
def stand_ins():
    """Import in this context; nothing of it is left to others, who may look for optional packages."""
    finder = _Finder()
    sys.meta_path.append(finder)
    _StandIn.loading = True
    try:
        yield
    finally:
        _StandIn.loading = False
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]
