"""Start-up hook of `tfmixed run`. Its folder is first in PYTHONPATH, so Python imports it before the script."""

import os
import sys
import traceback
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_FOLDER = Path(__file__).parent
_ROOT = str(_FOLDER.parents[3])

sys.path.remove(str(_FOLDER))
sys.path.insert(0, _ROOT)  # tfmixed may be a checkout that is not installed
try:
    from tfmixed._cli.run import startup

    startup.start()
except Exception:  # Python would ignore it, and run the script without tfmixed
    traceback.print_exc()
    os._exit(2)
sys.path.remove(_ROOT)

if (_spec := PathFinder.find_spec(__name__)) is not None and _spec.loader is not None:
    # The sitecustomize of the environment, which this one hides.
    sys.modules[__name__] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
