"""Start-up hook of `tfmixed run`. Its folder is first in PYTHONPATH, so Python imports it before the script."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_FOLDER = Path(__file__).parent

sys.path.remove(str(_FOLDER))
if (_spec := PathFinder.find_spec(__name__)) is not None and _spec.loader is not None:
    # The sitecustomize of the environment, which this one hides.
    sys.modules[__name__] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])

sys.path.insert(0, str(_FOLDER.parents[3]))  # tfmixed may be a checkout that is not installed
from tfmixed._cli.run import startup  # noqa: E402  # needs the path

sys.path.remove(str(_FOLDER.parents[3]))
startup.start()
