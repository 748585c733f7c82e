"""The topics of the wire contract: built, parsed, and judged. Pure.

    topics = Topics("edge/v1", "jetson-7")
    topics.infer("squeezenet")                      # edge/v1/jetson-7/models/squeezenet/infer
    topics.parse_infer("edge/v1/jetson-7/models/squeezenet/infer/client-a/17")
    # InferTopic(model='squeezenet', client='client-a', number='17')

Names are checked where a topic is built. Where one is parsed, the names of model and version are taken as they come: a
request for `%2e` deserves an answer (404), not silence. They are keys to look up, never paths.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from edge_sdk.errors import SettingsError

DEFAULT_ROOT = "edge/v1"
MAX_SLASHES = 7
"""AWS IoT's limit. The longest topic, `{root}/{dev}/models/{model}/infer/{client}/{n}`, leaves the root one of them."""
MAX_RESPONSE_TOPIC_BYTES = 256
"""AWS IoT's limit again; a longer Response Topic is somebody playing."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MODEL = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ROOT = re.compile(r"[A-Za-z0-9._-]{1,64}(/[A-Za-z0-9._-]{1,64})?")
_NOT_DEVICES = ("group", "reply")


class InferTopic(NamedTuple):
    """What the topic of a request says. `client` and `number`: its id, in the form for MQTT 3.1.1."""

    model: str
    version: str | None = None
    client: str | None = None
    number: str | None = None


def is_device_name(name: str) -> bool:
    """Whether `name` can stand for a device; `group` and `reply` have a meaning of their own in that place."""
    return _NAME.fullmatch(name) is not None and name not in _NOT_DEVICES


def is_model_name(name: str) -> bool:
    """Whether `name` can stand for a model, or for a version of one."""
    return _MODEL.fullmatch(name) is not None


def check_root(root: str) -> str:
    """`root` itself, or SettingsError."""
    if _ROOT.fullmatch(root) is None:
        raise SettingsError(f"The topic root {root[:80]!r} is not one or two levels of letters, digits, '.', '_', '-'.")
    return root


def reply(root: str, client: str) -> str:
    """Where a client of MQTT 5 reads its answers."""
    return f"{root}/reply/{_client(client)}"


def infer_in_group(root: str, group: str, model: str) -> str:
    """Where a request goes that any device of a group may answer."""
    return f"{root}/group/{_client(group)}/models/{_model(model)}/infer"


def everyones_availability(root: str) -> str:
    """The filter for the availability of all devices."""
    return f"{root}/+/availability"


def device_of(root: str, topic: str) -> str | None:
    """The device whose topic this is, or None."""
    if not topic.startswith(f"{root}/"):
        return None
    device = topic[len(root) + 1 :].partition("/")[0]
    return device if is_device_name(device) else None


@dataclass(frozen=True)
class Topics:
    """The topics of one device. Raises SettingsError for a root or a name that the contract does not allow."""

    root: str
    device: str

    def __post_init__(self) -> None:
        check_root(self.root)
        if not is_device_name(self.device):
            raise SettingsError(
                f"{self.device[:80]!r} cannot name a device: 1 to 64 letters, digits, '_' and '-', but not "
                f"{' or '.join(_NOT_DEVICES)}."
            )

    @property
    def availability(self) -> str:
        return f"{self.root}/{self.device}/availability"

    @property
    def info(self) -> str:
        return f"{self.root}/{self.device}/info"

    @property
    def stats(self) -> str:
        return f"{self.root}/{self.device}/stats"

    @property
    def models(self) -> str:
        """The filter for the metadata of all its models."""
        return f"{self.root}/{self.device}/models/+"

    def model(self, model: str) -> str:
        """A model's metadata; its other topics are below."""
        return f"{self.root}/{self.device}/models/{_model(model)}"

    def infer(self, model: str, *, version: str | None = None) -> str:
        versions = "" if version is None else f"/versions/{_model(version, 'version')}"
        return f"{self.model(model)}{versions}/infer"

    def infer_from(self, model: str, client: str, number: str) -> str:
        """The form for MQTT 3.1.1, which has no Response Topic."""
        return f"{self.model(model)}/infer/{_client(client)}/{_client(number)}"

    def result(self, address: InferTopic) -> str:
        """Where the answer goes to a request that names no Response Topic."""
        mine = f"{self.root}/{self.device}/models/{address.model}/result"
        return mine if address.client is None else f"{mine}/{address.client}/{address.number}"

    def results_for(self, client: str) -> str:
        """The filter under which a client of MQTT 3.1.1 reads its answers."""
        return f"{self.root}/{self.device}/models/+/result/{_client(client)}/+"

    def client_of(self, response_topic: str | None) -> str:
        """Who is answered on that topic: the level behind `{root}/reply/`, the whole topic elsewhere."""
        topic = response_topic or ""
        mine = topic.removeprefix(f"{self.root}/reply/")
        return topic if mine is topic else mine.partition("/")[0]

    def result_id(self, topic: str) -> str | None:
        """`client/number` of the request that is answered on `topic`, or None if the topic does not tell."""
        _, found, tail = topic.removeprefix(f"{self.root}/{self.device}/models/").partition("/result/")
        return tail if found and topic.startswith(f"{self.root}/{self.device}/models/") else None

    def subscriptions(self) -> list[str]:
        """The filters under which requests to this device arrive."""
        return [f"{self.models}/infer", f"{self.models}/infer/+/+", f"{self.models}/versions/+/infer"]

    def command(self, name: str) -> str:
        return f"{self.root}/{self.device}/cmd/{name}"

    def command_response(self, name: str) -> str:
        return f"{self.command(name)}/response"

    def command_subscription(self) -> str:
        """The filter under which commands to this device arrive."""
        return self.command("+")

    def parse_command(self, topic: str) -> str | None:
        """The command that `topic` gives this device, by a name that is a name; or None."""
        head = f"{self.root}/{self.device}/cmd/"
        name = topic[len(head) :]
        return name if topic.startswith(head) and _NAME.fullmatch(name) else None

    def group_subscription(self, group: str) -> str:
        """The shared subscription through which the devices of a group divide its requests among them."""
        return f"$share/{_client(group)}/{self.root}/group/{group}/models/+/infer"

    def parse_infer(self, topic: str) -> InferTopic | None:
        """The request that `topic` addresses to this device or to a group, or None."""
        if not topic.startswith(f"{self.root}/") or "\0" in topic:
            return None
        levels = topic[len(self.root) + 1 :].split("/")
        if levels[0] == "group" and len(levels) == 5 and _NAME.fullmatch(levels[1]):
            levels = levels[1:]
        elif levels[0] != self.device:
            return None
        if len(levels) < 4 or levels[1] != "models" or not levels[2]:
            return None
        model, rest = levels[2], levels[3:]
        if rest == ["infer"]:
            return InferTopic(model)
        if len(rest) == 3 and rest[0] == "infer" and _NAME.fullmatch(rest[1]) and _NAME.fullmatch(rest[2]):
            return InferTopic(model, client=rest[1], number=rest[2])
        if len(rest) == 3 and rest[0] == "versions" and rest[1] and rest[2] == "infer":
            return InferTopic(model, version=rest[1])
        return None

    def may_reply_to(self, topic: str, prefixes: Sequence[str] = ()) -> bool:
        """Whether a request may name `topic` as its Response Topic.

        Only what is under `{root}/reply/`, or under one of `prefixes` (each ending in a slash): otherwise a client
        could make the device write where the client itself must not.
        """
        allowed = (f"{self.root}/reply/", *prefixes)
        if not topic.startswith(allowed) or topic in allowed or topic.startswith("$"):
            return False
        if topic.count("/") > MAX_SLASHES or "+" in topic or "#" in topic or "\0" in topic:
            return False
        if topic.isascii():
            return len(topic) <= MAX_RESPONSE_TOPIC_BYTES
        try:
            return len(topic.encode()) <= MAX_RESPONSE_TOPIC_BYTES
        except UnicodeEncodeError:
            return False


def _model(name: str, what: str = "model") -> str:
    if not is_model_name(name):
        raise SettingsError(f"{name[:80]!r} cannot name a {what}: 1 to 64 letters, digits, '.', '_' and '-'.")
    return name


def _client(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise SettingsError(f"{name[:80]!r} cannot name a client or a group: 1 to 64 letters, digits, '_' and '-'.")
    return name
