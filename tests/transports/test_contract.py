"""Every rule that `edge_sdk/mqtt/transports/base.py` states, held against every transport."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge_sdk.errors import BrokerError
from edge_sdk.mqtt.transports.base import (
    Acknowledged,
    Closed,
    Connected,
    ConnectOptions,
    Message,
    Properties,
    Received,
    Subscribed,
    Will,
)
from edge_sdk.mqtt.transports.stream import StreamTransport
from tests.brokers import eventually, free_port
from tests.transports.conftest import Driver, Kind

Connect = Callable[..., Driver]


def _needs_redelivery(kind: Kind) -> None:
    if "amqtt" in kind.name:
        pytest.skip("amqtt does not redeliver what a client left unacknowledged")


def test_a_new_session_is_connected_without_a_past(kind: Kind, connect: Connect) -> None:
    """Connected tells that the broker knew nothing of a client that comes for the first time."""
    driver = connect("newcomer", clean_start=True)

    (event,) = driver.events
    assert isinstance(event, Connected)
    assert False is event.session_present


def test_a_message_arrives_whole(kind: Kind, connect: Connect) -> None:
    """Topic, payload, QoS and, on MQTT 5, every property of the wire contract come out as they went in."""
    properties = Properties(
        "reply/to/me", b"\x00\xff id", "image/jpeg", 30, (("accept", "text/plain"), ("grün", "ü"), ("accept", "again"))
    )
    driver = connect("one", "t/+/x")

    driver.transport.publish(Message("t/1/x", b"\x00\xffbytes", 1, False, properties))
    received = driver.next(Received)

    assert ("t/1/x", b"\x00\xffbytes", 1) == (received.message.topic, received.message.payload, received.message.qos)
    assert (properties if kind.version == 5 else Properties()) == received.message.properties
    assert (False, 0) == (received.duplicate, received.skipped_bytes)


def test_qos_0_needs_no_acknowledgement(kind: Kind, connect: Connect) -> None:
    """A QoS 0 message has no packet id, is not acknowledged to its publisher, and acknowledging it does nothing."""
    if "amqtt" in kind.name:
        pytest.skip("amqtt delivers with the QoS of the subscription, even where the publisher's was lower")
    driver = connect("one", "t")

    driver.transport.publish(Message("t", b"0", qos=0))
    received = driver.next(Received)
    driver.transport.acknowledge(received)

    assert None is received.packet_id
    assert driver.silent(Acknowledged)


def test_publishes_are_acknowledged_by_handle(kind: Kind, connect: Connect) -> None:
    """Each QoS 1 publish comes back once, under the handle that `publish` gave."""
    driver = connect("one", "t")

    handles = [driver.transport.publish(Message("t", bytes([i]))) for i in range(20)]
    acknowledged = [driver.next(Acknowledged).handle for _ in handles]

    assert handles == sorted(set(handles))
    assert handles == sorted(acknowledged)


def test_a_publish_nobody_receives_says_so(kind: Kind, connect: Connect) -> None:
    """On MQTT 5 the acknowledgement of a message without a subscriber is 0x10; 3.1.1 cannot tell."""
    driver = connect()

    driver.transport.publish(Message("nobody/listens", b""))

    assert (0x10 if kind.version == 5 else 0) == driver.next(Acknowledged).code


def test_messages_that_waited_together_come_together(kind: Kind, connect: Connect) -> None:
    """One poll hands out everything that is there to be read, so that requests can share a batch."""
    driver, sender = connect("one", "t"), connect("two")
    for i in range(16):
        sender.transport.publish(Message("t", bytes([i])))
    for _ in range(16):
        sender.next(Acknowledged)

    polls: list[int] = []
    while sum(polls) < 16:
        events = driver.transport.poll(5)
        polls.append(len(events))

    assert len(polls) <= 2, polls


def test_a_flood_comes_through_to_its_end(kind: Kind, connect: Connect) -> None:
    """More messages than one poll hands out, waiting together: the next polls bring the rest, without new traffic."""
    driver, sender = connect("one", "t", receive_maximum=1000), connect("two")
    for i in range(300):
        sender.transport.publish(Message("t", str(i).encode()))
    for _ in range(300):
        sender.next(Acknowledged)

    came = [driver.next(Received).message.payload for _ in range(300)]

    assert [str(i).encode() for i in range(300)] == came


def test_nothing_is_acknowledged_unasked(kind: Kind, connect: Connect) -> None:
    """A message that was not acknowledged comes again on the next connection, in order, marked as a duplicate."""
    _needs_redelivery(kind)
    driver = connect("one", "t", clean_start=False, session_expiry_s=60)
    for payload in (b"a", b"b", b"c"):
        driver.transport.publish(Message("t", payload))
    first = [driver.next(Received) for _ in range(3)]
    driver.transport.acknowledge(first[0])
    driver.transport.publish(Message("flush", b""))
    driver.next(Acknowledged)

    driver.transport.close(send_will=True)
    connected = driver.open()
    again = [driver.next(Received) for _ in range(2)]

    assert isinstance(connected, Connected)
    assert True is connected.session_present
    assert [b"b", b"c"] == [received.message.payload for received in again]
    assert [True, True] == [received.duplicate for received in again]
    assert [first[0].connection + 1] * 2 == [received.connection for received in again]


def test_acknowledging_an_earlier_connection_does_nothing(kind: Kind, connect: Connect) -> None:
    """The same packet id may mean another message by now: an old event is not acknowledged on a new connection."""
    _needs_redelivery(kind)
    driver = connect("one", "t", clean_start=False, session_expiry_s=60)
    driver.transport.publish(Message("t", b"a"))
    stale = driver.next(Received)
    driver.transport.close(send_will=True)
    driver.transport.acknowledge(stale)
    driver.open()
    driver.next(Received)

    driver.transport.acknowledge(stale)
    driver.transport.publish(Message("flush", b""))
    driver.next(Acknowledged)
    driver.transport.close(send_will=True)
    driver.open()

    assert b"a" == driver.next(Received).message.payload


def test_an_acknowledged_message_is_gone(kind: Kind, connect: Connect) -> None:
    """What was acknowledged before `close` does not come again: `close` sends what was queued."""
    driver = connect("one", "t", clean_start=False, session_expiry_s=60)
    driver.transport.publish(Message("t", b"a"))
    driver.transport.acknowledge(driver.next(Received))
    driver.transport.close()

    driver.open()

    assert driver.silent(Received)


def test_a_publish_queued_before_close_is_sent(kind: Kind, connect: Connect) -> None:
    """`close` sends what was queued, also if nobody polled since."""
    listener, driver = connect("two", "t"), connect("one")

    driver.transport.publish(Message("t", b"last words"))
    driver.transport.close()

    assert b"last words" == listener.next(Received).message.payload


def test_retained_messages_come_on_subscribing(kind: Kind, connect: Connect) -> None:
    """A retained message is delivered to a later subscriber, marked so; an empty one removes it."""
    driver, late = connect("one"), connect("two")
    driver.transport.publish(Message("r/1", b"kept", retain=True))
    driver.next(Acknowledged)

    late.transport.subscribe(["r/#"])
    received = late.next(Received)
    driver.transport.publish(Message("r/1", b"", retain=True))
    driver.next(Acknowledged)
    later = connect("three", "r/#")

    assert (b"kept", True) == (received.message.payload, received.message.retain)
    assert later.silent(Received)


def test_retained_messages_can_be_left_out(kind: Kind, connect: Connect) -> None:
    """`retained=False` keeps them away on MQTT 5, and does no harm on 3.1.1."""
    driver, late = connect("one"), connect("two")
    driver.transport.publish(Message("r/1", b"kept", retain=True))
    driver.next(Acknowledged)

    late.transport.subscribe(["r/#"], retained=False)
    late.next(Subscribed)

    assert (kind.version == 5) == late.silent(Received)


def test_after_unsubscribing_nothing_comes(kind: Kind, connect: Connect) -> None:
    """UNSUBSCRIBE is answered with one code for each filter, and works."""
    driver = connect("one", "a", "b", "c")

    handle = driver.transport.unsubscribe(["a", "b"])
    answer = driver.next(Subscribed)
    driver.transport.publish(Message("a", b""))
    driver.transport.publish(Message("c", b""))

    assert (handle, (0, 0)) == (answer.handle, answer.codes)
    assert "c" == driver.next(Received).message.topic


def test_subscriptions_are_answered_one_by_one(kind: Kind, connect: Connect) -> None:
    """SUBSCRIBE is answered under its handle with the granted QoS of each filter."""
    driver = connect()

    handle = driver.transport.subscribe(["a/#", "b/+/c"], qos=0)
    answer = driver.next(Subscribed)

    assert (handle, (0, 0)) == (answer.handle, answer.codes)


def test_large_payloads_make_the_round_trip(kind: Kind, connect: Connect) -> None:
    """2 MB there and back, several at once, unharmed and in order."""
    if kind.slow:
        pytest.skip(kind.slow)
    payloads = [bytes([i]) * 2_000_000 for i in range(3)]
    driver = connect("one", "t")

    for payload in payloads:
        driver.transport.publish(Message("t", payload))
    received = [driver.next(Received, 30).message.payload for _ in payloads]

    assert payloads == received


def test_packets_of_every_header_length(kind: Kind, connect: Connect) -> None:
    """Sizes around which the remaining length takes one more byte, or the receive buffer ends, are nothing special."""
    if kind.slow:
        pytest.skip(kind.slow)
    sizes = [*range(100, 136), *range(16_364, 16_390), 65_535, 262_120, 262_140, 262_144, 262_150]
    driver = connect("one", "t")

    for size in sizes:
        driver.transport.publish(Message("t", b"x" * size))
    came = []
    for _ in sizes:
        received = driver.next(Received)
        driver.transport.acknowledge(received)
        came.append(len(received.message.payload))

    assert sizes == came


def test_the_broker_keeps_to_our_receive_maximum(kind: Kind, connect: Connect) -> None:
    """MQTT 5: no more unacknowledged messages come than we asked for; each acknowledgement lets one follow."""
    if kind.version != 5:
        pytest.skip("MQTT 3.1.1 knows no receive maximum")
    driver = connect("one", "t", receive_maximum=3)

    for i in range(5):
        driver.transport.publish(Message("t", bytes([i])))
    first = [driver.next(Received) for _ in range(3)]
    held = driver.silent(Received)
    driver.transport.acknowledge(first[0])
    fourth = driver.next(Received)

    assert held
    assert b"\3" == fourth.message.payload
    # mosquitto 2.0.11 lets two follow the first acknowledgement: its promise is not ours to test.
    assert "memory" not in kind.name or driver.silent(Received, 0.1)


def test_wake_ends_a_poll(kind: Kind, connect: Connect) -> None:
    """A wake from another thread lets a waiting poll return long before its time-out; one that came early counts."""
    driver = connect()
    threading.Timer(0.05, driver.transport.wake).start()

    begun = time.monotonic()
    events = driver.transport.poll(30)
    woken_after_s = time.monotonic() - begun
    driver.transport.wake()
    driver.transport.wake()
    begun = time.monotonic()
    driver.transport.poll(30)

    assert [] == list(events)
    assert woken_after_s < 5
    assert time.monotonic() - begun < 5


def test_poll_waits_for_its_time_and_no_longer(kind: Kind, connect: Connect) -> None:
    """Without anything to tell, `poll` returns nothing at its time-out; at once with a time-out of 0."""
    driver = connect()

    begun = time.monotonic()
    nothing = driver.transport.poll(0.1)
    waited_s = time.monotonic() - begun
    begun = time.monotonic()
    still_nothing = driver.transport.poll(0)

    assert [] == [*nothing, *still_nothing]
    assert 0.09 < waited_s < 2
    assert time.monotonic() - begun < 0.05


def test_poll_without_a_connection_waits_too(kind: Kind) -> None:
    """Before `open` and after Closed a poll loop does not spin; publish and the like are harmless."""
    transport = kind.transport()

    begun = time.monotonic()
    transport.publish(Message("t", b""))
    transport.subscribe(["t"])
    events = transport.poll(0.1)

    assert [] == list(events)
    assert time.monotonic() - begun > 0.09


def test_a_killed_broker_is_closed(kind: Kind, connect: Connect) -> None:
    """When the broker dies, Closed is the last event; `open` connects again as soon as it is back."""
    driver = connect("one", "t")

    kind.broker.kill()
    driver.next(Closed)
    silent = driver.silent(object, 0.1)
    with pytest.raises(BrokerError):
        driver.transport.open(driver.options, timeout_s=2)
    kind.broker.start()
    connected = driver.open()

    assert silent
    assert isinstance(connected, Connected)


def test_an_unreachable_broker_is_named(kind: Kind) -> None:
    """`open` raises BrokerError with the address and the reason when nobody listens there."""
    if "memory" in kind.name:
        pytest.skip("the broker in memory has no address")
    port = free_port()

    with pytest.raises(BrokerError, match=rf"127\.0\.0\.1:{port} cannot be reached: Connection refused"):
        kind.transport().open(ConnectOptions("127.0.0.1", port, "c"), timeout_s=2)


def test_a_broker_is_reached_beside_a_connection(kind: Kind, connect: Connect) -> None:
    """`reach`, on another thread, waits in place of `open` and leaves the connection of now alone; what it reached can
    be opened at once. Where nobody is, it raises as `open` does."""
    driver = connect("one", "t")
    with ThreadPoolExecutor(1) as other:
        reached = other.submit(kind.transport().reach, driver.options, timeout_s=5).result()
        driver.transport.publish(Message("t", b"still here", qos=0))
        payload = driver.next(Received).message.payload
        driver.transport.open(driver.options, timeout_s=5, reached=reached)
        event = driver.next(Connected)
        kind.broker.kill()
        with pytest.raises(BrokerError):
            other.submit(driver.transport.reach, driver.options, timeout_s=5).result()

    assert b"still here" == payload
    assert isinstance(event, Connected)


def test_the_will_is_published_when_the_connection_is_lost(kind: Kind, connect: Connect) -> None:
    """Leaving with `send_will` publishes it; a plain `close` does not."""
    watcher = connect("two", "w")
    will = Will(Message("w", b"gone", retain=True))

    connect("one", will=will).transport.close()
    kept_quiet = watcher.silent(Received)
    connect("one", will=will).transport.close(send_will=True)

    assert kept_quiet
    assert b"gone" == watcher.next(Received).message.payload


def test_the_will_comes_from_a_torn_socket(kind: Kind, connect: Connect) -> None:
    """Also when nobody closed anything: the socket just goes."""
    if "memory" in kind.name:
        pytest.skip("the broker in memory has no socket")
    watcher = connect("two", "w")
    driver = connect("one", will=Will(Message("w", b"gone")))

    transport = driver.transport
    assert isinstance(transport, StreamTransport)
    assert transport._pipe is not None
    transport._pipe.sock.shutdown(socket.SHUT_RDWR)

    assert b"gone" == watcher.next(Received).message.payload


def test_a_delayed_will_waits_for_a_return(kind: Kind, connect: Connect) -> None:
    """With MQTT 5 a client that is back within the delay was never gone."""
    if kind.version != 5:
        pytest.skip("MQTT 3.1.1 knows no delay")
    watcher = connect("two", "w")
    will = Will(Message("w", b"gone"), delay_s=1)

    driver = connect("one", will=will, session_expiry_s=60)
    driver.transport.close(send_will=True)
    driver.open()

    assert watcher.silent(Received, 1.3)


def test_a_taken_over_session_is_closed(kind: Kind, connect: Connect) -> None:
    """A second client of the same id ends the first one's connection; MQTT 5 says why (0x8E)."""
    first = connect("same")

    connect("same")
    closed = first.next(Closed)

    # mosquitto 2.0.11 ends the old connection without a word; later ones say it.
    assert closed.code in ((0x8E, None) if kind.version == 5 else (None,))


def test_nagle_is_off(kind: Kind, connect: Connect) -> None:
    """TCP_NODELAY is set: without it a request with QoS 1 takes 44 ms instead of a quarter of one."""
    if "memory" in kind.name:
        pytest.skip("the broker in memory has no socket")

    transport = connect().transport
    assert isinstance(transport, StreamTransport)
    assert transport._pipe is not None

    assert 0 != transport._pipe.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_idle_connection_stays(kind: Kind, connect: Connect) -> None:
    """Polling alone keeps the connection past two keepalives, also for who polls in long waits."""
    if "memory" in kind.name:
        pytest.skip("the broker in memory hangs up on nobody")
    driver = connect("one", keepalive_s=1)

    begun = time.monotonic()
    while time.monotonic() - begun < 2.6:
        driver.events += driver.transport.poll(2.7)

    assert driver.silent(Closed, 0.1)
    driver.transport.publish(Message("t", b""))
    assert isinstance(driver.next(Acknowledged), Acknowledged)


def test_an_attended_transport_ends_the_others_poll(kind: Kind, connect: Connect) -> None:
    """What arrives for one transport lets the one that attends it return, and stays there for its own poll."""
    attending, attended = connect("attending"), connect("attended", "t")
    attending.transport.attend(attended.transport)
    other = connect("other")

    other.transport.publish(Message("t", b"x"))
    other.next(Acknowledged)
    began = time.monotonic()
    events = attending.transport.poll(60)

    assert [] == list(events)
    assert time.monotonic() - began < 30
    assert b"x" == attended.next(Received).message.payload


def test_one_writer_of_many_threads_may_wake(kind: Kind, connect: Connect) -> None:
    """Wakes from many threads at once neither block nor get lost."""
    driver = connect()

    def wake_often() -> None:
        for _ in range(1000):
            driver.transport.wake()

    threads = [threading.Thread(target=wake_often) for _ in range(4)]

    for thread in threads:
        thread.start()
    eventually(lambda: (driver.transport.poll(0.01), not any(t.is_alive() for t in threads))[1], "threads done")
    driver.transport.wake()
    begun = time.monotonic()
    driver.transport.poll(30)

    assert time.monotonic() - begun < 5
