"""Reading TOML into a checked model, with errors that name the file, the key and what was expected."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edge_sdk.errors import EdgeSdkError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Model = TypeVar("Model", bound=BaseModel)


class Table(BaseModel):
    """A TOML table: immutable, and a key it does not know is refused (a typing error is not a setting)."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_toml(path: Path, error: type[EdgeSdkError]) -> dict[str, Any]:
    """The parsed file, or `error` saying what is wrong with it and where."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise error(f"{path} cannot be read: {exc.strerror or exc}.") from exc
    except UnicodeDecodeError as exc:
        raise error(f"{path} is not UTF-8 text (byte {exc.start}).", fix="Save it as UTF-8.") from exc
    except RecursionError as exc:
        raise error(f"{path} is not valid TOML: it is nested too deeply.") from exc
    except ValueError as exc:  # TOMLDecodeError, and what Python says of a number with thousands of digits
        raise error(f"{path} is not valid TOML: {exc}.") from exc


def parse(data: dict[str, Any], model: type[Model], source: str, error: type[EdgeSdkError]) -> Model:
    """`data` as a `model`, or `error` with one clause for each wrong key."""
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        raise error(f"{source}: {describe(exc)}.") from exc


def describe(exc: ValidationError) -> str:
    """pydantic's findings as one sentence: key, what is wrong, what came."""
    clauses = []
    for found in exc.errors(include_url=False)[:5]:
        key = ".".join(str(part) for part in found["loc"])
        if found["type"] == "extra_forbidden":
            clauses.append(f"`{key}` is not a known key")
        elif found["type"] == "missing":
            clauses.append(f"`{key}` is missing")
        elif not key:
            clauses.append(found["msg"].removeprefix("Value error, ").rstrip("."))
        else:
            message = found["msg"].removeprefix("Value error, ")
            clauses.append(f"`{key}`: {message} (it is {_clip(found['input'])})")
    return "; ".join(clauses)


def _clip(value: object) -> str:
    text = re.sub(r"(?<=:)[^:@/]+(?=@)", "***", repr(value))  # a password in a URL
    return text if len(text) <= 60 else text[:57] + "..."
