"""The code that a result depends on, as a hash: what a class's module is and imports, comments and docstrings aside."""

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from diffusion.plugins import declared_plugins

PACKAGES = frozenset({"attacks", "diffusion", "erasure", "evaluation", "experiments"})
"""The project's own packages; what is imported from elsewhere counts by no hash, but for a plugin's own package."""

CHANGES_NO_NUMBER = frozenset(
    {
        *("diffusion.progress", "diffusion.allocator", "diffusion.files", "diffusion.disk", "diffusion.leases"),
        *("diffusion.source_code", "diffusion.identity", "diffusion.plugins"),
    }
)
"""Modules that show, store and name what others compute."""


def code_of(thing: object) -> str:
    """16 hexadecimal digits for the code behind ``thing``, an object or a class.

    It is that of the module of its class and of all modules of the project that this one imports, directly or not; for
    a class of another package (a plugin) the modules of that package count as well. Comments, docstrings and white
    space do not. It is read once in a process, as modules are.
    """
    found = thing if isinstance(thing, type) else type(thing)
    module = found.__module__
    if module == "__main__" or _file(module) is None:
        return _digest([_normalised(_source(found))])
    return code_reached(module)


@cache
def code_reached(module: str) -> str:
    """The same for a module, by its dotted name."""
    packages = PACKAGES | {name.partition(".")[0] for name in (module, *declared_plugins())}
    return _digest([f"{name}\n{_read(name)[0]}" for name in sorted(reached(module, packages))])


def reached(module: str, packages: frozenset[str] = PACKAGES) -> set[str]:
    """Dotted names of ``module`` and of all modules in ``packages`` that it imports, directly or not."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or name in CHANGES_NO_NUMBER or name.partition(".")[0] not in packages or _file(name) is None:
            continue
        found.add(name)
        waiting += _read(name)[1]
    return found


def without_comments(source: str) -> str:
    r"""Python ``source`` without its comments, docstrings and layout.

    >>> without_comments('def f(x):\n    "Doc."\n    return x  # why') == without_comments('def f( x ): return x')
    True
    """
    return ast.unparse(_Bare().visit(ast.parse(source)))


class _Bare(ast.NodeTransformer):
    """Takes out every statement that is a text and nothing else."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)


@cache
def _read(module: str) -> tuple[str, tuple[str, ...]]:
    """The bare source of a module, and the modules that it may import."""
    file = _file(module)
    source = "" if file is None else file.read_text(encoding="utf-8")
    package = module if file is not None and file.name == "__init__.py" else module.rpartition(".")[0]
    return _normalised(source), tuple(dict.fromkeys(_imports(ast.parse(source), module, package)))


def _normalised(source: str) -> str:
    return without_comments(inspect.cleandoc("\n" + source))


def _imports(tree: ast.AST, module: str, package: str) -> Iterator[str]:
    yield from _with_parents(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            yield from _with_parents(origin)
            # What is imported may be a module itself; what is none has no file.
            for alias in node.names:
                yield f"{origin}.{alias.name}"


def _with_parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


@cache
def _file(module: str) -> Path | None:
    """Where a module's source lies; None if it is no module or has none. Nothing is imported to find out."""
    if (loaded := sys.modules.get(module)) is not None:
        origin = getattr(loaded, "__file__", None) or ""
        return Path(origin) if origin.endswith(".py") else None
    parent, _, name = module.rpartition(".")
    if not parent:
        spec = find_spec(module)
        origin = spec.origin if spec is not None and spec.origin is not None else ""
        return Path(origin) if origin.endswith(".py") else None
    package = _file(parent)
    if package is None or package.name != "__init__.py":
        return None
    candidates = (package.parent / name / "__init__.py", package.parent / f"{name}.py")
    return next((file for file in candidates if file.is_file()), None)


def _source(found: type) -> str:
    try:
        return inspect.getsource(found)
    except (OSError, TypeError):
        return f"{found.__module__}.{found.__qualname__}"


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
