"""Commands: what may be asked of the device itself, and how it answers. Pure.

    {root}/{dev}/cmd/unload             {"transaction": "17", "model": "digits"}
    {root}/{dev}/cmd/unload/response    {"transaction": "17", "status": "ok", "data": {...}, "error": null}

    command = read(received, "unload")              # whatever came; what is wrong with it is in `problem`
    answer = phrase(command, Outcome({...}), topics)

The answer has one place and no other: a Response Topic would let the sender choose where the device writes. Correlation
data is echoed, for those who like to recognise their answers by it; the transaction is, on any version of MQTT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args

from edge_sdk.errors import Malformed
from edge_sdk.mqtt.session import ReplyRoute
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import Message, Properties, Received
from edge_sdk.tasks.base import JSON
from edge_sdk.tasks.oip import dump_json, parse_json

CommandName = Literal["ping", "info", "load", "unload", "deploy", "drain", "resume", "selftest"]
NAMES: tuple[CommandName, ...] = get_args(CommandName)

MAX_COMMAND_BYTES = 65_536
MAX_TRANSACTION = 128
"""Characters of a transaction, and bytes of correlation data."""

Transaction = Union[str, int, None]


@dataclass(frozen=True)
class Command:
    """One command. `name` is what its topic says, also if there is no such command."""

    name: str
    transaction: Transaction = None
    correlation_data: bytes | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be carried out; empty if it can be tried."""

    def text(self, key: str) -> str | None:
        """An argument that is a string, or missing; raises Malformed."""
        value = self.arguments.get(key)
        if value is not None and not isinstance(value, str):
            raise Malformed(f"`{key}` is {str(value)[:40]}; it is a string.")
        return value


@dataclass(frozen=True)
class Outcome:
    """How a command ended. It failed if there is an `error`, a text for a person."""

    data: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def read(received: Received, name: str) -> Command:
    """The command in a message on the topic of `name`. Never raises: what is malformed has a `problem`."""
    message = received.message
    correlation_data = message.properties.correlation_data
    body: dict[str, Any] = {}
    problem = ""
    try:
        if correlation_data is not None and not 0 < len(correlation_data) <= MAX_TRANSACTION:
            size, correlation_data = len(correlation_data), None
            raise Malformed(f"The correlation data has {size} bytes; 1 to {MAX_TRANSACTION} are taken.")
        body = _body(message.payload, received.skipped_bytes or len(message.payload))
        _transaction(body)
        if name not in NAMES:
            raise Malformed(f"There is no command {name!r}; there are {', '.join(NAMES)}.")
    except Malformed as exc:
        problem = str(exc)
    try:
        transaction = _transaction(body)
    except Malformed:
        transaction = None
    return Command(name, transaction, correlation_data, body, problem)


def route(command: Command, topics: Topics) -> ReplyRoute:
    """Where the answer goes, and what tells this command from others: its correlation data, or its transaction."""
    identity = command.correlation_data
    if identity is None and command.transaction is not None:
        identity = dump_json(command.transaction)
    return ReplyRoute(topics.command_response(command.name), identity, identity is not None)


def phrase(command: Command, outcome: Outcome, topics: Topics) -> Message:
    """The answer."""
    body = {
        "transaction": command.transaction,
        "status": "ok" if outcome.error is None else "error",
        "data": outcome.data,
        "error": outcome.error,
    }
    properties = Properties(
        correlation_data=command.correlation_data, content_type=JSON, user=(("device", topics.device),)
    )
    return Message(topics.command_response(command.name), dump_json(body), properties=properties)


def ask(name: str, transaction: str, arguments: Mapping[str, Any], topics: Topics) -> Message:
    """The PUBLISH of a client that wants `name` done."""
    return Message(
        topics.command(name),
        dump_json({**arguments, "transaction": transaction}),
        properties=Properties(content_type=JSON),
    )


def answered(payload: bytes) -> tuple[Transaction, Outcome] | None:
    """Which transaction an answer is for, and how it ended; None if it is no answer."""
    try:
        body = parse_json(payload)
        transaction = _transaction(body)
        data, error = body["data"], body["error"]
    except (Malformed, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(data, dict) or not (error is None or isinstance(error, str)):
        return None
    return transaction, Outcome(data, error)


def _body(payload: bytes, size: int) -> dict[str, Any]:
    if size > MAX_COMMAND_BYTES:
        raise Malformed(f"The command has {size:,} bytes; {MAX_COMMAND_BYTES:,} are taken.")
    if not payload:
        return {}
    body = parse_json(payload)
    if not isinstance(body, dict):
        raise Malformed(f"The command is a JSON {type(body).__name__}; it is an object.")
    try:
        dump_json(body)  # an answer repeats parts of it
    except UnicodeEncodeError as exc:
        raise Malformed("The command holds half a character (a lone surrogate), which UTF-8 cannot carry.") from exc
    return body


def _transaction(body: dict[str, Any]) -> Transaction:
    transaction = body.get("transaction")
    fits = transaction is None or (isinstance(transaction, int) and not isinstance(transaction, bool))
    if not fits and not (isinstance(transaction, str) and len(transaction) <= MAX_TRANSACTION):
        raise Malformed(f"`transaction` is a number, or a string of at most {MAX_TRANSACTION} characters.")
    return transaction
