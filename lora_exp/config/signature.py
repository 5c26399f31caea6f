"""What a `_target_` takes, read from its source: nothing is imported, so torch is not paid for.

Knows nothing of configs; `validation.py` compares them with what is found here.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Definition = ast.ClassDef | ast.FunctionDef
TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int, "float": (int, float), "bool": bool, "str": str, "list": list, "dict": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """The arguments of a function or class, and the module that defines it."""

    module: str
    arguments: dict[str, ast.expr | None]  # name -> annotation
    open: bool  # takes **kwargs: a misspelt argument would vanish
    defaults: dict[str, ast.expr] = field(default_factory=dict)  # those that have one


@cache
def signature(target: str) -> Signature | None:
    """Find a dotted target's arguments, or None where no class or function has that name."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        if _file(module) is not None:
            found = _find(module, parts[cut]) if cut == len(parts) - 1 else None
            return _signature(*found) if found else None
    return None


@cache
def _file(module: str) -> Path | None:
    """Return the source of a module by walking folders: find_spec would import the parents."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except ValueError:
        return None
    if spec is None or spec.origin is None:
        return None
    if not spec.submodule_search_locations:
        return Path(spec.origin) if not rest and spec.origin.endswith(".py") else None
    stem = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    options = (stem / "__init__.py", stem.parent / f"{stem.name}.py")
    return next((path for path in options if path.is_file()), None)


@cache
def _tree(module: str) -> ast.Module:
    path = _file(module)
    return ast.parse(path.read_text(encoding="utf-8")) if path else ast.Module([], [])


def _find(module: str, name: str) -> tuple[str, Definition] | None:
    """Follow re-exports (also those only for type checkers) to the definition of a name."""
    for node in _tree(module).body:
        if isinstance(node, Definition) and node.name == name:
            return module, node
    for node in ast.walk(_tree(module)):  # type: ignore[assignment]
        if isinstance(node, ast.ImportFrom) and any(
            (a.asname or a.name) == name for a in node.names
        ):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            source = _absolute(module, node)
            found = _find(source, original) if source != module and _file(source) else None
            if found:
                return found
    return None


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    path = _file(module)
    drop = node.level - (1 if path is not None and path.name == "__init__.py" else 0)
    package = module.split(".")[: len(module.split(".")) - drop]
    return ".".join([*package, *([node.module] if node.module else [])])


def _signature(module: str, node: Definition) -> Signature:
    if isinstance(node, ast.FunctionDef):
        return _from_function(module, node, skip=0)
    init = next(
        (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None
    )
    if init is not None:
        return _from_function(module, init, skip=1)
    arguments: dict[str, ast.expr | None] = {}
    defaults: dict[str, ast.expr] = {}
    for base in node.bases:
        found = _find(module, base.id) if isinstance(base, ast.Name) else None
        if found:
            inherited = _signature(*found)
            arguments |= inherited.arguments
            defaults |= inherited.defaults
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            if "ClassVar" in ast.unparse(line.annotation) or _not_init(line.value):
                continue
            arguments[line.target.id] = line.annotation
            defaults |= _default(line.target.id, line.value)
    return Signature(module, arguments, open=False, defaults=defaults)


def _default(name: str, value: ast.expr | None) -> dict[str, ast.expr]:
    """Return the default of a dataclass's field, where it is written down."""
    if not isinstance(value, ast.Call):
        return {name: value} if value is not None else {}
    written = [k.value for k in value.keywords if k.arg == "default"]
    return {name: written[0]} if written else {}


def _not_init(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and any(
        k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False
        for k in value.keywords
    )


def _from_function(module: str, node: ast.FunctionDef, skip: int) -> Signature:
    spec = node.args
    positional = [*spec.posonlyargs, *spec.args][skip:]
    every = [*positional, *spec.kwonlyargs]
    arguments = {a.arg: _unaliased(module, a.annotation) for a in every}
    last = positional[len(positional) - len(spec.defaults) :]
    defaults = dict(zip((a.arg for a in last), spec.defaults, strict=True))
    keywords = zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    defaults |= {a.arg: value for a, value in keywords if value is not None}
    return Signature(module, arguments, open=spec.kwarg is not None, defaults=defaults)


def _unaliased(module: str, annotation: ast.expr | None) -> ast.expr | None:
    """Return what a name stands for, where the module assigns it a type of several texts."""
    if not isinstance(annotation, ast.Name):
        return annotation
    assigned = (n for n in _tree(module).body if isinstance(n, ast.Assign))
    found = (n.value for n in assigned if ast.unparse(n.targets[0]) == annotation.id)
    return next((v for v in found if ast.unparse(v).startswith("Literal[")), annotation)


@cache
def members(target: str) -> frozenset[str]:
    """Return the values of an enumeration of texts, read from its source."""
    module, _, name = target.rpartition(".")
    found = _find(module, name)
    assigned = [n.value for n in found[1].body if isinstance(n, ast.Assign)] if found else []
    return frozenset(str(v.value) for v in assigned if isinstance(v, ast.Constant))


@cache
def compared(target: str, name: str) -> frozenset[str]:
    """Return the texts that a class, or one it stands on, compares a variable or attribute with."""
    module, _, own = target.rpartition(".")
    found = _find(module, own)
    if found is None:
        return frozenset()
    texts: set[Any] = set()
    for base in found[1].bases if isinstance(found[1], ast.ClassDef) else ():
        if isinstance(base, ast.Name) and base.id != own:
            texts |= compared(f"{found[0]}.{base.id}", name)
    for node in ast.walk(found[1]):
        if isinstance(node, ast.Compare) and ast.unparse(node.left).rpartition(".")[2] == name:
            inside = [n for side in node.comparators for n in ast.walk(side)]
            texts |= {n.value for n in inside if isinstance(n, ast.Constant)}
    return frozenset(text for text in texts if isinstance(text, str))


@cache
def texts(target: str) -> frozenset[str]:
    """Return every text written in the source of a class, and of those that it stands on."""
    module, _, own = target.rpartition(".")
    found = _find(module, own)
    if found is None:
        return frozenset()
    nodes = ast.walk(found[1])
    inside = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for base in found[1].bases if isinstance(found[1], ast.ClassDef) else ():
        if isinstance(base, ast.Name) and base.id != own:
            inside |= texts(f"{found[0]}.{base.id}")
    return frozenset(inside)


@cache
def functions(module: str) -> tuple[str, ...]:
    """Return the public functions of a module, as dotted names."""
    found = (n.name for n in _tree(module).body if isinstance(n, ast.FunctionDef))
    return tuple(f"{module}.{name}" for name in found if not name.startswith("_"))


def fits(value: Any, annotation: ast.expr | None) -> bool:
    """Say whether a value may have this annotation; what is not plainly wrong fits."""
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(text)):  # a quoted annotation
            return fits(value, ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return fits(value, left) or fits(value, right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return value is None or fits(value, inner)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=options)):
            return any(fits(value, option) for option in options)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            options = ast.literal_eval(inner if isinstance(inner, ast.Tuple) else _tuple(inner))
            # peft writes a pattern as a member: "pissa_niter_[number of iters]"
            patterns = [o.partition("[")[0] for o in options if isinstance(o, str) and "[" in o]
            return value in options or any(str(value).startswith(p) for p in patterns)
        case ast.Subscript(value=ast.Name(id=name)):
            return fits(value, ast.Name(name))
        case ast.Name(id=name) if name in TYPES:
            return isinstance(value, TYPES[name]) and (
                name == "bool" or not isinstance(value, bool)
            )
    return True


def _tuple(node: ast.expr) -> ast.Tuple:
    return ast.Tuple([node])
