"""MultiModal Insight Engine: a book you can import. Public names are found on first use, so `import mmie` brings in no torch."""
__version__ = "0.1.0"

import importlib as _importlib
from typing import Any as _Any


def _index() -> dict[str, dict[str, tuple[str, str]]]:
    """Module → its definitions, as nbdev lists them on export."""
    from mmie._modidx import d
    return d["syms"]  # type: ignore[return-value]


def _chapters() -> set[str]:
    """The modules and packages directly below this one: `core`, `tokenization`, …"""
    return {module.split(".")[1] for module in _index() if "." in module}


def _homes() -> dict[str, list[str]]:
    """Public name → the modules that define it."""
    homes: dict[str, list[str]] = {}
    for module, definitions in _index().items():
        for path in definitions:
            name = path.removeprefix(module + ".")
            if "." not in name and not name.startswith("_"):
                homes.setdefault(name, []).append(module)
    return homes


def __getattr__(name: str) -> _Any:
    if not name.startswith("_"):
        if name in _chapters():  # before functions of the same name: importing the module would put it here anyway
            return _importlib.import_module(f"mmie.{name}")
        homes = sorted(_homes().get(name, []))
        if len(homes) > 1:
            raise AttributeError(f"{name!r} is defined in {' and in '.join(homes)}: import it from the one you mean")
        if homes:
            return globals().setdefault(name, getattr(_importlib.import_module(homes[0]), name))
    raise AttributeError(f"module 'mmie' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_chapters(), *_homes()})
