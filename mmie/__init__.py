"""MultiModal Insight Engine: a book you can import. Public names are found on first use, so `import mmie` brings in no torch."""
__version__ = "0.1.0"

import importlib as _importlib


def _symbols() -> dict[str, list[str]]:
    """Public name → the modules that define it, from the index that nbdev generates."""
    from mmie._modidx import d
    found: dict[str, list[str]] = {}
    for module, names in d["syms"].items():
        for name in names:
            short = name.removeprefix(module + ".")
            if "." not in short and not short.startswith("_"):
                found.setdefault(short, []).append(module)
    return found


def _modules() -> set[str]:
    """The chapters and parts directly below the package: `core`, `tokenization`, …"""
    from mmie._modidx import d
    return {module.split(".")[1] for module in d["syms"] if "." in module}


def __getattr__(name: str) -> object:
    if not name.startswith("_"):
        if name in _modules():  # a part or chapter wins over a symbol of the same name, whatever was imported before
            return _importlib.import_module(f"mmie.{name}")
        modules = _symbols().get(name, [])
        if len(modules) == 1:
            value: object = getattr(_importlib.import_module(modules[0]), name)
            globals()[name] = value
            return value
        if modules:
            raise AttributeError(f"{name!r} is defined in {' and in '.join(sorted(modules))}: import it from the one you mean")
    raise AttributeError(f"module 'mmie' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_modules(), *_symbols()})
