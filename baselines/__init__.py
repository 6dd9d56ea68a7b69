"""Baselines to compare with, each an adapter over the package that people use.

Importing this package registers all of them and imports none of those packages. A file here whose
name does not begin with an underscore is a baseline.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    if not _module.name.startswith(f"{__name__}._"):
        importlib.import_module(_module.name)
