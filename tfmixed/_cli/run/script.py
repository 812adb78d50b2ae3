"""Runs a script as `python` does, in this process: its arguments, its `__main__`, its exit code and its tracebacks.

The public functions of `runpy` put the old `__main__` back as soon as the script's last line has run, while its
threads, its `atexit` handlers and whatever pickles still need it; so the module is made here.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, cast

from tfmixed._cli.run import ending
from tfmixed._cli.run.saying import refuse
from tfmixed.errors import UsageError


@dataclass(frozen=True)
class Script:
    """What is to be run.

    Args:
        target: A file, a folder or zip file with a `__main__.py`, or the name of a module.
        arguments: Those after it.
        is_module: Whether `target` is a module, as after `python -m`.
    """

    target: str
    arguments: tuple[str, ...] = ()
    is_module: bool = False

    @property
    def name(self) -> str:
        """A word for it: `train` for `src/train.py`."""
        path = Path(self.target).resolve()
        return self.target if self.is_module else path.stem if path.is_file() else path.name

    def check(self) -> None:
        """Refuses what cannot be run, before anything is. Modules are looked for when all is prepared.

        Raises:
            UsageError: There is no such file, it is not Python, or has no `__main__.py`.
        """
        if self.is_module:
            return
        spec = self._spec()
        try:
            _code(spec)
        except (SyntaxError, ValueError) as error:
            if isinstance(error, ValueError) or not self.target.endswith((".py", ".pyw")):
                raise UsageError(f"SCRIPT must be Python, received {self.target!r}: {error}") from error
        except OSError as error:
            raise UsageError(f"SCRIPT must be a file that can be read, received {self.target!r}: {error}") from error

    def run(self, prepare: Callable[[], None], finish: Callable[[BaseException | None], None]) -> None:
        """Runs it to its end, and lets the process end as `python` would.

        Args:
            prepare: Called when `sys.path` is the script's.
            finish: Called after its last output, once its threads have ended, with the exception that ended it or
                None. Not called in a process that it forked.
        """
        has_begun = False

        def end(reason: BaseException | None) -> None:
            if has_begun:
                finish(reason)

        with ending.as_python_does(end):
            sys.argv[:] = [self.target, *self.arguments]
            self._enter()
            prepare()
            main, code = self._main()
            has_begun = True
            exec(code, vars(main))

    @property
    def _is_plain(self) -> bool:
        """Whether it is a file that is read from its first line to its last."""
        return (
            not self.is_module
            and Path(self.target).is_file()
            and pkgutil.get_importer(os.path.abspath(self.target)) is None
        )

    def _enter(self) -> None:
        """Makes the first place where modules are looked for the script's instead of the launcher's."""
        if not sys.flags.safe_path:
            del sys.path[0]
        elif self.is_module or self._is_plain:
            return
        home = os.getcwd() if self.is_module else os.path.abspath(self.target)
        sys.path.insert(0, os.path.dirname(os.path.realpath(self.target)) if self._is_plain else home)

    def _main(self) -> tuple[ModuleType, CodeType]:
        """Returns the module `__main__`, which is entered in `sys.modules`, and its code."""
        try:
            spec = _module(self.target) if self.is_module else self._spec()
        except UsageError as error:
            refuse(str(error))
        code, main = _code(spec), importlib.util.module_from_spec(spec)
        vars(main).update(__name__="__main__", __builtins__=builtins)
        if self._is_plain:
            vars(main).update(__spec__=None, __package__=None, __cached__=None)
        elif self.is_module:
            sys.argv[0] = str(spec.origin)
        sys.modules["__main__"] = main
        return main, code

    def _spec(self) -> ModuleSpec:
        if not os.path.exists(self.target):
            raise UsageError(f"SCRIPT must be a Python file, received {self.target!r}: there is no such file")
        if self._is_plain:
            return _of_file(os.path.abspath(self.target))
        importer = pkgutil.get_importer(os.path.abspath(self.target))
        inside = cast("Any", importer).find_spec("__main__") if importer is not None else None
        if inside is None:
            raise UsageError(
                f"SCRIPT must be a Python file, received {self.target!r}, a folder or archive without __main__.py"
            )
        return cast("ModuleSpec", inside)


def _of_file(path: str) -> ModuleSpec:
    spec = importlib.util.spec_from_file_location("__main__", path, loader=SourceFileLoader("__main__", path))
    assert spec is not None
    return spec


def _module(name: str) -> ModuleSpec:
    """Returns where a module is, or what of a package is to be run."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and something that it imports is not
        spec = None
    except ValueError:  # relative, or a module of this process without a spec
        spec = None
    if spec is None or spec.loader is None:
        raise UsageError(f"-m must be given the name of a module, received {name!r}: there is none of that name")
    return spec


def _code(spec: ModuleSpec) -> CodeType:
    loader = spec.loader
    if spec.name == "__main__" and isinstance(loader, SourceFileLoader):
        # `get_code` would leave a compiled copy beside the script.
        return loader.source_to_code(loader.get_data(str(spec.origin)), str(spec.origin))
    code = cast("Any", loader).get_code(spec.name)
    if code is None:
        raise UsageError(f"SCRIPT must be Python, received {spec.origin!r}, of which there is no code")
    return cast("CodeType", code)
