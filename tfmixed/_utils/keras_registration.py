"""Imports the modules that register Keras classes right after Keras itself is imported.

`keras.models.load_model` finds registered classes only, but importing Keras early would make `import tfmixed` slow. A
finder in `sys.meta_path` waits for Keras instead. Keras is found and loaded as without it, and no error of our modules
reaches its import. (wrapt's `when_imported` takes five times as long to import as the rest of this package.)
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec


def import_with_keras(modules: Sequence[str]) -> None:
    """Imports modules now if Keras is already imported, else right after it."""
    if sys.modules.get("keras"):
        _import(modules)
    else:
        sys.meta_path.insert(0, _KerasFinder(modules))


class _KerasFinder:
    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules
        self.is_idle = False

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> ModuleSpec | None:
        if name != "keras" or self.is_idle:
            return None
        self.is_idle = True  # lets the other finders find Keras
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.is_idle = False
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _KerasLoader(spec.loader, self))
        return spec


class _KerasLoader:
    """Loader that wraps the actual one, which is not modified: modules of a zip file share theirs."""

    def __init__(self, loader: Loader, finder: _KerasFinder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_loader"), name)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.is_idle = True
        _import(self._finder.modules)


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            with contextlib.suppress(Exception):  # warnings may be errors
                warnings.warn(
                    f"Saved models that need `{module}` cannot be loaded, because this version of tfmixed does not "
                    f"work with this version of Keras. Received: {type(error).__name__}: {error}",
                    stacklevel=3,
                )
