"""Topic names: what is built is understood, and nothing that arrives can upset the parser."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt.topics import MAX_SLASHES, InferTopic, Topics, device_of, is_device_name, is_model_name, reply
from edge_sdk.mqtt.transports.memory import topic_matches

NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
MODELS = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)
TOPICS = st.builds(Topics, st.sampled_from(["edge/v1", "edge", "a.b/c_d"]), NAMES.filter(is_device_name))
DEVICE = Topics("edge/v1", "dev")


@given(TOPICS, MODELS, MODELS, NAMES, NAMES)
def test_what_is_built_is_understood(topics: Topics, model: str, version: str, client: str, number: str) -> None:
    """`parse_infer` reads what was built, and no topic is deeper than AWS IoT allows."""
    plain, pinned = topics.infer(model), topics.infer(model, version=version)
    from_client = topics.infer_from(model, client, number)
    group = topics.group_subscription(client).removeprefix(f"$share/{client}/").replace("+", model)

    assert InferTopic(model) == topics.parse_infer(plain)
    assert InferTopic(model, version=version) == topics.parse_infer(pinned)
    assert InferTopic(model, client=client, number=number) == topics.parse_infer(from_client)
    assert InferTopic(model) == topics.parse_infer(group)
    assert max(t.count("/") for t in (plain, pinned, from_client, group)) <= MAX_SLASHES


@given(TOPICS, MODELS, NAMES, NAMES)
def test_answers_reach_their_client(topics: Topics, model: str, client: str, number: str) -> None:
    """The answer to a request in the 3.1.1 form is published under the client's filter, and its topic tells the id."""
    result = topics.result(InferTopic(model, client=client, number=number))

    assert topic_matches(topics.results_for(client), result)
    assert f"{client}/{number}" == topics.result_id(result)
    assert None is topics.result_id(topics.result(InferTopic(model)))
    assert topics.device == device_of(topics.root, result)


@given(st.one_of(st.text(), st.lists(st.sampled_from(["", "dev", "models", "infer", "versions", "\0", "..", "group"]))))
def test_nothing_upsets_the_parser(tail: str | list[str]) -> None:
    """Any text at all is understood or None."""
    text = tail if isinstance(tail, str) else "/".join(tail)

    for topic in (text, f"edge/v1/{text}", f"edge/v1/dev/models/{text}"):
        address = DEVICE.parse_infer(topic)
        assert address is None or address.model
        DEVICE.result_id(topic)
        DEVICE.may_reply_to(topic)
        device_of("edge/v1", topic)


@given(TOPICS, MODELS, NAMES)
def test_a_device_subscribes_to_its_requests(topics: Topics, model: str, client: str) -> None:
    """Each form of a request matches exactly one filter of the device, and nothing that it publishes matches any."""
    requests = (topics.infer(model), topics.infer(model, version="2"), topics.infer_from(model, client, "1"))
    others = (topics.result(InferTopic(model)), topics.model(model), topics.availability, topics.info, topics.stats)

    def matches(topic: str) -> int:
        return sum(topic_matches(each, topic) for each in topics.subscriptions())

    assert [1, 1, 1] == [matches(topic) for topic in requests]
    assert [0] * len(others) == [matches(topic) for topic in others]


@pytest.mark.parametrize("model", ["%2e", "grün", "..", "x" * 10_000, " "])
def test_odd_model_names_are_heard(model: str) -> None:
    """A request for a model that cannot exist is understood, so that it can be answered with 404."""

    assert InferTopic(model) == DEVICE.parse_infer(f"edge/v1/dev/models/{model}/infer")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ü", "a+", "#", "$SYS", "x" * 65, "a\n", "reply", "group"])
def test_bad_device_names_are_refused(name: str) -> None:
    """No topic is built with a device name that the contract does not allow; the error repeats the name."""
    with pytest.raises(SettingsError, match="cannot name a device"):
        Topics("edge/v1", name)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ü", "a+", "#", "x" * 65, "a\n"])
def test_bad_names_are_refused(name: str) -> None:
    """Models, versions, clients and groups are held to the contract too."""
    builders = (
        DEVICE.infer, DEVICE.model, lambda n: DEVICE.infer("m", version=n), lambda n: DEVICE.infer_from("m", n, "1"),
        lambda n: DEVICE.infer_from("m", "c", n), DEVICE.results_for, DEVICE.group_subscription,
        lambda n: reply("edge/v1", n),
    )  # fmt: skip

    for build in builders:
        with pytest.raises(SettingsError, match="cannot name a"):
            build(name)
    assert not is_model_name(name)


@pytest.mark.parametrize("root", ["", "/edge", "edge/", "a/b/c", "edge/+", "$SYS", "a b", "#"])
def test_bad_roots_are_refused(root: str) -> None:
    """A root has one or two plain levels: a third one would take the longest topic over the limit."""
    with pytest.raises(SettingsError, match="topic root"):
        Topics(root, "dev")


@pytest.mark.parametrize("topic", ["edge/v1/reply/me", "edge/v1/reply/me/and/more"])
def test_answers_go_to_reply_topics(topic: str) -> None:
    """The default allowlist is everything below reply."""

    assert True is DEVICE.may_reply_to(topic)


@pytest.mark.parametrize(
    "topic",
    [
        "", "edge/v1/reply", "edge/v1/reply/", "edge/v1/reply/#", "edge/v1/reply/+/x", "$SYS/broker", "other/topic",
        "edge/v1/dev/models/m/infer", "edge/v1/reply/a\0b", "edge/v1/reply/" + "x" * 60_000,
        "edge/v1/reply/" + "ü" * 125, "edge/v1/reply/a/b/c/d/e/f", "edge/v1/reply/\ud800",
    ],
)  # fmt: skip
def test_answers_go_nowhere_else(topic: str) -> None:
    """A Response Topic outside the allowlist, with wildcards, NULs, too long or too deep is not answered."""

    assert False is DEVICE.may_reply_to(topic)


def test_the_allowlist_can_be_widened() -> None:
    """Further prefixes are allowed one by one, and never a system topic."""

    assert True is DEVICE.may_reply_to("plant/answers/x", ["plant/answers/"])
    assert False is DEVICE.may_reply_to("$SYS/x", ["$SYS/"])
