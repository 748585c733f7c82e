"""Which names of TensorRT's an adapter uses, read from its source.

A name is used as `self.trt.X.Y` (or `trt.X.Y`, where a function is handed the module), or as an attribute of something
that is annotated with one of the vendor's classes. An attribute of anything else that TensorRT gave us would go unseen,
so that is a finding too: every value in the adapters is either annotated, or one of `OWN`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType, ModuleType

from edge_sdk.backends.tensorrt import vendor

CLASSES = {name for name in vars(vendor) if name not in ("Any", "TypeAlias", "annotations")}

NESTED = {"Severity": "ILogger.Severity"}
"""Classes that are not the module's own."""

OWN = {
    "self", "said", "phases", "options", "draft", "shapes", "sizes", "reasons", "left", "target", "name", "item",
    "compute_capability", "_log", "_ADVICE", "_HARDWARE", "_NUMPY", "logs",
}  # fmt: skip
"""Names of ours whose attributes are ours too."""


@dataclass
class Use:
    """What was found in an adapter's source."""

    names: set[str] = field(default_factory=set)
    optional: set[str] = field(default_factory=set)
    """Enumerations of which a member is looked up by a name that is worked out."""
    unknown: set[str] = field(default_factory=set)
    """Attributes of something that nothing tells the class of."""


def used_by(adapter: type) -> Use:
    """Everything that the methods of `adapter` use, those inherited and those reached with super() included."""
    use = Use()
    seen: set[FunctionType] = set()
    waiting = [function for name in dir(adapter) for function in _methods(adapter, name)]
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        _read(tree, use)
        waiting += _called(tree, function)
    return use


def _methods(adapter: type, name: str) -> Iterator[FunctionType]:
    """The method that `name` is, and those behind it that it reaches with super()."""
    for owner in adapter.__mro__:
        if name not in vars(owner) or not owner.__module__.startswith("edge_sdk"):
            continue
        found = vars(owner)[name]
        function = getattr(found, "func", found)  # a cached_property's
        if not isinstance(function, FunctionType):
            return
        yield function
        if f"super().{name}(" not in inspect.getsource(function):
            return


def _called(tree: ast.AST, function: FunctionType) -> Iterator[FunctionType]:
    """The functions of ours, not methods, that a function calls by name or as a module's, and that may be handed
    something of TensorRT's."""
    scope = function.__globals__
    for node in ast.walk(tree):
        found: object = None
        if isinstance(node, ast.Name):
            found = scope.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = scope.get(node.value.id)
            found = getattr(module, node.attr, None) if isinstance(module, ModuleType) else None
        ours = isinstance(found, FunctionType) and found.__module__.startswith("edge_sdk.backends.tensorrt")
        if isinstance(found, FunctionType) and ours and {"trt", *CLASSES} & set(_described(found)):
            yield found


def _described(function: FunctionType) -> Iterator[str]:
    """The names of a function's parameters, and of what they are annotated with."""
    for parameter in inspect.signature(function).parameters.values():
        yield from (parameter.name, str(parameter.annotation))


def _read(tree: ast.AST, use: Use) -> None:
    classes = _annotated(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _read_attribute(node, classes, use)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            use.optional.update(filter(None, [_of_module(node.args[0])]))


def _read_attribute(node: ast.Attribute, classes: dict[str, str], use: Use) -> None:
    if (dotted := _of_module(node)) is not None:
        use.names.add(dotted)
        return
    value = node.value
    if node.attr.startswith("__"):
        return
    if isinstance(value, ast.Name) and value.id in classes:
        use.names.add(NESTED.get(classes[value.id], f"{classes[value.id]}.{node.attr}"))
    elif not _is_own(value):
        use.unknown.add(ast.unparse(node))


def _annotated(tree: ast.AST) -> dict[str, str]:
    """Parameter or variable -> the vendor's class that it is annotated with."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            name, annotation = node.arg, node.annotation
        elif isinstance(node, ast.AnnAssign):
            name, annotation = ast.unparse(node.target), node.annotation
        else:
            continue
        if isinstance(annotation, ast.Name) and annotation.id in CLASSES:
            found[name] = annotation.id
    return found


def _of_module(node: ast.expr) -> str | None:
    """`X.Y` of `self.trt.X.Y` or `trt.X.Y`; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        if node.attr == "trt":
            break
        parts.append(node.attr)
        node = node.value
    is_module = (isinstance(node, ast.Attribute) and node.attr == "trt") or (
        isinstance(node, ast.Name) and node.id == "trt"
    )
    parts = [part for part in reversed(parts) if not part.startswith("__")]
    return ".".join(parts) if is_module and parts else None


def _is_own(value: ast.expr) -> bool:
    """Whether a value is ours, as far as its source tells: a name of ours, text, or what a function of ours gave."""
    if isinstance(value, ast.Constant | ast.JoinedStr):
        return True
    if isinstance(value, ast.Name):
        return value.id in OWN
    if isinstance(value, ast.Subscript):
        return _is_own(value.value)
    if isinstance(value, ast.Attribute):
        return ast.unparse(value) == "self.said"
    if isinstance(value, ast.Call):
        called = value.func
        return (isinstance(called, ast.Name) and called.id == "super") or (
            isinstance(called, ast.Attribute) and ast.unparse(called) in ("self._members",)
        )
    return False
