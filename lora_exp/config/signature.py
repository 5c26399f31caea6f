"""The arguments of a `_target_`, read from its source: nothing, not even torch, is imported.

Knows nothing of configs; `validation.py` compares them with the signatures.
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
    open: bool  # takes **kwargs: a misspelt argument would go unnoticed
    defaults: dict[str, ast.expr] = field(default_factory=dict)  # those that have one


@cache
def signature(target: str) -> Signature | None:
    """Return the signature of a dotted name; None: no class or function has that name."""
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        if _file(module) is not None:
            definition = _find(module, parts[length]) if length == len(parts) - 1 else None
            return _signature(*definition) if definition else None
    return None


@cache
def _file(module: str) -> Path | None:
    """Return a module's source file, found by walking folders: find_spec would import parents."""
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
            definition = _find(source, original) if source != module and _file(source) else None
            if definition:
                return definition
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
        definition = _find(module, base.id) if isinstance(base, ast.Name) else None
        if definition:
            inherited = _signature(*definition)
            arguments |= inherited.arguments
            defaults |= inherited.defaults
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if "ClassVar" in ast.unparse(statement.annotation) or _not_init(statement.value):
                continue
            arguments[statement.target.id] = statement.annotation
            defaults |= _default(statement.target.id, statement.value)
    return Signature(module, arguments, open=False, defaults=defaults)


def _default(name: str, value: ast.expr | None) -> dict[str, ast.expr]:
    """Return the default of a dataclass's field, if the source has one."""
    if not isinstance(value, ast.Call):
        return {name: value} if value is not None else {}
    defaults = [k.value for k in value.keywords if k.arg == "default"]
    return {name: defaults[0]} if defaults else {}


def _not_init(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and any(
        k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False
        for k in value.keywords
    )


def _from_function(module: str, node: ast.FunctionDef, skip: int) -> Signature:
    parameters = node.args
    positional = [*parameters.posonlyargs, *parameters.args][skip:]
    accepted = [*positional, *parameters.kwonlyargs]
    arguments = {a.arg: _unaliased(module, a.annotation) for a in accepted}
    with_default = positional[len(positional) - len(parameters.defaults) :]
    defaults = dict(zip((a.arg for a in with_default), parameters.defaults, strict=True))
    keywords = zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)
    defaults |= {a.arg: value for a, value in keywords if value is not None}
    return Signature(module, arguments, open=parameters.kwarg is not None, defaults=defaults)


def _unaliased(module: str, annotation: ast.expr | None) -> ast.expr | None:
    """Return the `Literal` for which an annotation's name stands in a module, if it is ours."""
    if not isinstance(annotation, ast.Name):
        return annotation
    body = _tree(module).body
    assignments = (n for n in body if isinstance(n, ast.Assign))
    values = (n.value for n in assignments if ast.unparse(n.targets[0]) == annotation.id)
    if literal := next((v for v in values if ast.unparse(v).startswith("Literal[")), None):
        return literal
    imports = (n for n in body if isinstance(n, ast.ImportFrom) and n.module and not n.level)
    names = (n.module for n in imports if any(a.name == annotation.id for a in n.names))
    origin = next((str(m) for m in names if str(m).startswith("lora_exp.")), None)
    return _unaliased(origin, annotation) if origin else annotation


@cache
def members(target: str) -> frozenset[str]:
    """Return the values of an enumeration of strings, read from its source."""
    module, _, name = target.rpartition(".")
    definition = _find(module, name)
    body = definition[1].body if definition else []
    values = [n.value for n in body if isinstance(n, ast.Assign)]
    return frozenset(str(v.value) for v in values if isinstance(v, ast.Constant))


@cache
def texts_compared_with(target: str, name: str) -> frozenset[str]:
    """Return the strings that a class or its bases compare a variable or attribute with."""
    module, _, class_name = target.rpartition(".")
    definition = _find(module, class_name)
    if definition is None:
        return frozenset()
    texts: set[Any] = set()
    for base in definition[1].bases if isinstance(definition[1], ast.ClassDef) else ():
        if isinstance(base, ast.Name) and base.id != class_name:
            texts |= texts_compared_with(f"{definition[0]}.{base.id}", name)
    for node in ast.walk(definition[1]):
        if isinstance(node, ast.Compare) and ast.unparse(node.left).rpartition(".")[2] == name:
            nodes = [n for side in node.comparators for n in ast.walk(side)]
            texts |= {n.value for n in nodes if isinstance(n, ast.Constant)}
    return frozenset(text for text in texts if isinstance(text, str))


@cache
def texts_in(target: str) -> frozenset[str]:
    """Return every string in the source of a class and of its bases."""
    module, _, class_name = target.rpartition(".")
    definition = _find(module, class_name)
    if definition is None:
        return frozenset()
    nodes = ast.walk(definition[1])
    strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for base in definition[1].bases if isinstance(definition[1], ast.ClassDef) else ():
        if isinstance(base, ast.Name) and base.id != class_name:
            strings |= texts_in(f"{definition[0]}.{base.id}")
    return frozenset(strings)


@cache
def functions(module: str) -> tuple[str, ...]:
    """Return the public functions of a module, as dotted names."""
    names = (n.name for n in _tree(module).body if isinstance(n, ast.FunctionDef))
    return tuple(f"{module}.{name}" for name in names if not name.startswith("_"))


def fits(value: Any, annotation: ast.expr | None) -> bool:
    """Return whether a value fits an annotation; in doubt it does."""
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
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return isinstance(value, list) and all(fits(element, inner) for element in value)
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, element])):
            return isinstance(value, dict) and all(
                fits(k, key) and fits(v, element) for k, v in value.items()
            )
        case ast.Subscript(value=ast.Name(id=name)):
            return fits(value, ast.Name(name))
        case ast.Name(id=name) if name in TYPES:
            return isinstance(value, TYPES[name]) and (
                name == "bool" or not isinstance(value, bool)
            )
    return True


def _tuple(node: ast.expr) -> ast.Tuple:
    return ast.Tuple([node])
