"""Packages that only some of sigswap needs: imported where they are used, with the extra that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from sigswap.errors import Hint, SigswapError


def require(module: str, extra: str) -> ModuleType:
    """The optional package ``module``; a SigswapError that names the extra to install if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise SigswapError(
            f"This needs the package {module!r}, which is not installed.", hint=Hint(f"pip install 'sigswap[{extra}]'")
        ) from None
