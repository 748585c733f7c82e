"""The documentation is complete: every command, option, exit code and setting stands in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from edge_sdk import errors
from edge_sdk.cli import EXIT_CODES, main
from edge_sdk.errors import EdgeSdkError
from edge_sdk.package import Manifest
from edge_sdk.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def commands(group: click.Group = main, before: str = "edge-sdk") -> Iterator[tuple[str, click.Command]]:
    """Every command and group below `edge-sdk`, by the words that call it."""
    for name, command in group.commands.items():
        words = f"{before} {name}"
        yield words, command
        if isinstance(command, click.Group):
            yield from commands(command, words)


COMMANDS = dict(commands())


def section(words: str) -> str:
    """What docs/cli.md says under the heading of a command."""
    found = re.search(rf"^##+ {words}\n(.*?)(?=^##|\Z)", text("cli.md"), re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/cli.md has no heading for {words}"
    return found.group(1)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_option_is_documented(words: str) -> None:
    """Each option of a command stands in its section of docs/cli.md, and its table has no other."""
    options = {
        name
        for parameter in COMMANDS[words].params
        if isinstance(parameter, click.Option)
        for name in parameter.opts
        if name.startswith("--")
    }
    said = section(words)
    documented = set(re.findall(r"^\| `(--[a-z-]+)", said, re.MULTILINE))

    assert set() == {option for option in options if f"`{option}" not in said}
    assert set() == documented - options


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_shows_an_example(words: str) -> None:
    """`--help` of each command has an example that begins with the command itself."""
    help_text = COMMANDS[words].help or ""
    example = help_text.partition("Example")[2]

    assert words in example


def test_every_exit_code_is_documented() -> None:
    """In docs/cli.md, in `edge-sdk --help`, and for each error a class of its own."""
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text("cli.md"), re.MULTILINE)}
    told = {
        int(code) for code in re.findall(r"(\d+) (?:done|a defect|wrong|the|this|no|something|interrupted)", EXIT_CODES)
    }
    raised = {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EdgeSdkError)
    }

    assert documented == told
    assert raised <= documented


def tables(model: type[BaseModel] = Settings, table: str = "") -> Iterator[tuple[str, str, str]]:
    """Every setting: its table, its key and its default as docs/settings.md writes it."""
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from tables(field.annotation, key)
        elif key == "device":
            yield table, key, "host name and eight digits made from `/etc/machine-id`"
        else:
            default = field.get_default()
            yield table, key, "none" if default is None else f"`{default}`" if default != () else "empty"


@pytest.mark.parametrize(("table", "key", "default"), list(tables()))
def test_every_setting_is_documented(table: str, key: str, default: str) -> None:
    """Each setting has a row with its default, its environment variable and a reason, under its table's heading."""
    variable = "EDGE_SDK_" + "__".join(part.upper() for part in (table, key) if part)
    heading = f"## `[{table}]`" if table else "## The device"
    under = text("settings.md").partition(f"{heading}\n")[2].partition("\n## ")[0]
    row = re.search(rf"^\| `{key}` \| (.*?) \| `{variable}` \| (.+) \|$", under, re.MULTILINE)

    assert row is not None
    assert default == row.group(1)
    assert len(row.group(2)) > 20


def test_no_setting_is_documented_that_does_not_exist() -> None:
    """docs/settings.md has as many rows as there are settings."""
    rows = re.findall(r"^\| `(\w+)` \|", text("settings.md"), re.MULTILINE)

    assert sorted(key for _, key, _ in tables()) == sorted(rows)


@pytest.mark.parametrize("key", Manifest.model_fields)
def test_every_field_of_the_manifest_is_documented(key: str) -> None:
    """Each key of manifest.json has a row in docs/package-format.md."""

    assert f"| `{key}` |" in text("package-format.md")


@pytest.mark.parametrize("file", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))])
def test_links_lead_somewhere(file: Path) -> None:
    """Each relative link names a file of the repository, and each anchor a heading of its file."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", file.read_text(encoding="utf-8")):
        place = file.parent / target if target else file

        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
