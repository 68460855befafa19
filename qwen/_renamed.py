"""Old names of renamed functions and classes. Using one warns; the next release removes them."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def old_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's `__getattr__` (PEP 562) that resolves old names with a DeprecationWarning.

    Args:
        module: `__name__` of the module.
        names: old name to new name, with its module if that is another one.
    """

    def resolve(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = names[name]
        warnings.warn(
            f"{module}.{name} is now {new}. The next release removes the old name.", DeprecationWarning, stacklevel=2
        )
        place, _, attribute = new.rpartition(".")
        return getattr(importlib.import_module(place or module), attribute)

    return resolve
