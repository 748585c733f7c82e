"""A broker when there is none: mosquitto with a configuration of ours, or amqtt from PyPI, on loopback.

    with start_broker() as broker:
        print(broker.url)                  # mqtt://127.0.0.1:41883

Both are subprocesses: to stop one is to kill it, and it cannot outlive us (Linux's parent-death signal, for the case
that we are killed ourselves). `find_broker` tells whether one is already there, and what it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from edge_sdk.errors import BrokerError
from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.negotiation import Negotiation
from edge_sdk.mqtt.transports.base import Closed, Connected, ConnectOptions, Received, Refused
from edge_sdk.mqtt.transports.paho import PahoTransport

BrokerKind = Literal["mosquitto", "amqtt"]

_PORTS_TRIED = 5
_READY = {"mosquitto": b" running", "amqtt": b"amqtt is ready"}
_PORT_TAKEN = (b"Address already in use", b"address already in use")

# Run in the child, before it becomes the broker: ask to be killed with the parent, unless that is dead already.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class StartedBroker:
    """A broker of ours, running until the context that started it ends."""

    kind: BrokerKind
    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def protocol(self) -> Literal["5", "3.1.1"]:
        """What it speaks: saves a client that is told so the attempt at more."""
        return "5" if self.kind == "mosquitto" else "3.1.1"


@dataclass(frozen=True)
class FoundBroker:
    """What answered at an address."""

    address: str
    reachable: bool
    detail: str
    """For a person: what it is, or why it cannot be reached."""
    protocol: Literal["5", "3.1.1"] | None = None


def find_mosquitto() -> str | None:
    """The path of the mosquitto binary; distributions keep it off the PATH of ordinary users."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


def mosquitto_configuration(port: int, directory: Path) -> str:
    """What mosquitto 2.0.11 and later need to serve inference on loopback, and why."""
    lines = [
        f"listener {port} 127.0.0.1",
        "allow_anonymous true",
        "# Sessions and queued requests survive a restart. Saved every second: saving on each change cost nine tenths",
        "# of the throughput, and what a kill loses of the last second, clients send again.",
        "persistence true",
        f"persistence_location {directory}/",
        "autosave_interval 1",
        "autosave_on_changes false",
        "# The default of 20 in flight caps how many requests of one connection can share a batch.",
        "max_inflight_messages 0",
        "max_queued_messages 10000",
        "# Without it every acknowledged message waits 40 ms for a delayed TCP ACK.",
        "set_tcp_nodelay true",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_type information",
        "connection_messages false",
    ]
    if os.name == "posix" and os.geteuid() == 0:
        # As root it would become the user `mosquitto`, who may not write to our directory.
        lines.append(f"user {getpass.getuser()}")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def start_broker(
    *, kind: BrokerKind | Literal["auto"] = "auto", directory: Path | None = None, timeout_s: float = 15.0
) -> Iterator[StartedBroker]:
    """Run a broker on a free loopback port until the context ends, however it ends.

    `auto` takes mosquitto if its binary is here, otherwise amqtt (MQTT 3.1.1 only). `directory` keeps mosquitto's
    sessions from one start to the next; by default they go to a temporary one. Call it from a thread that lives as long
    as the broker should: Linux kills a child with the thread that started it.

    Raises BrokerError if neither is installed, or the chosen one does not come up in time.
    """
    if kind == "auto":
        kind = "mosquitto" if find_mosquitto() else "amqtt"
    with contextlib.ExitStack() as stack:
        home = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-sdk-broker-")))
        process, port = _start(kind, home, timeout_s)
        try:
            yield StartedBroker(kind, port, process.pid)
        finally:
            _stop(process)


def find_broker(url: str, *, access: BrokerAccess = BrokerAccess(), timeout_s: float = 5.0) -> FoundBroker:
    """Connect as a client would, and say what answered. Never raises for what the network does.

    `access` is the client's own: without it a broker that asks for a name or a certificate refuses. SettingsError if
    its files cannot be read.
    """
    options = access.options(url, client_id=f"edge-sdk-probe-{os.getpid()}", clean_start=True)
    transport = PahoTransport()
    try:
        return _probe(transport, options, timeout_s)
    finally:
        transport.close()


def _probe(transport: PahoTransport, options: ConnectOptions, timeout_s: float) -> FoundBroker:
    address = f"{options.host}:{options.port}"
    give_up_at = time.monotonic() + timeout_s
    negotiation = Negotiation()
    detail = "it did not answer CONNECT in time"
    trying = True
    while trying and (left_s := negotiation.patience_s(give_up_at - time.monotonic())) > 0:
        try:
            transport.open(dataclasses.replace(options, version=negotiation.version), timeout_s=left_s)
        except BrokerError as err:
            return FoundBroker(address, False, err.problem)
        event = next(iter(transport.poll(left_s)), None)
        if isinstance(event, Connected):
            protocol: Literal["5", "3.1.1"] = "5" if negotiation.version == 5 else "3.1.1"
            name = _version_it_tells(transport, min(0.3, left_s)) or "an MQTT broker"
            return FoundBroker(address, True, f"{name}, speaking MQTT {protocol}", protocol)
        if isinstance(event, Refused):
            detail = f"it refused the connection: {event.reason}"
            trying = negotiation.refused(event.code)
        elif isinstance(event, Closed):
            detail = f"it is no MQTT broker, or wants none of us: {event.reason}"
            trying = negotiation.hung_up()
    return FoundBroker(address, False, f"Something listens at {address}, but {detail}.")


def _version_it_tells(transport: PahoTransport, wait_s: float) -> str:
    """Brokers like mosquitto retain their name and version on a topic; empty if this one does not."""
    transport.subscribe(["$SYS/broker/version"], qos=0)
    give_up_at = time.monotonic() + wait_s
    while (left_s := give_up_at - time.monotonic()) > 0:
        for event in transport.poll(left_s):
            if isinstance(event, Received):
                return event.message.payload[:80].decode(errors="replace")
            if isinstance(event, Closed):
                return ""
    return ""


def _start(kind: BrokerKind, directory: Path, timeout_s: float) -> tuple[subprocess.Popen[bytes], int]:
    """A broker that is ready, and its port. A port that was taken between our look and its bind: the next one."""
    give_up_at = time.monotonic() + timeout_s
    log = directory / f"{kind}.log"
    for _ in range(_PORTS_TRIED):
        port = _free_port()
        with log.open("wb") as output:
            process = subprocess.Popen(
                tied_to_us(_command(kind, port, directory)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is ours: the broker stays until the daemon has said goodbye
            )
        try:
            while process.poll() is None and time.monotonic() < give_up_at:
                if _READY[kind] in log.read_bytes():
                    return process, port
                time.sleep(0.01)
        except BaseException:
            _stop(process)
            raise
        _stop(process)
        said = log.read_bytes()
        if not any(words in said for words in _PORT_TAKEN):
            break
    last = said.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
    raise BrokerError(f"The broker {kind} did not come up in {timeout_s:g} s; the last it said: {last[0][:300]}")


def _command(kind: BrokerKind, port: int, directory: Path) -> list[str]:
    if kind == "mosquitto":
        binary = find_mosquitto()
        if binary is not None:
            configuration = directory / "mosquitto.conf"
            configuration.write_text(mosquitto_configuration(port, directory))
            return [binary, "-c", str(configuration)]
    elif find_spec("amqtt") is not None:
        return [sys.executable, "-m", "edge_sdk.mqtt.broker", "--port", str(port)]
    raise BrokerError(
        "There is no MQTT broker to start on this machine.",
        fix="Install one: apt install mosquitto, or pip install 'edge-sdk[broker]'.",
    )


def tied_to_us(command: list[str]) -> list[str]:
    """`command`, such that its process does not outlive the thread that starts it, however that ends (on Linux)."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, so that mosquitto can save its sessions; SIGKILL if it dawdles."""
    process.terminate()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve_amqtt(port: int) -> None:
    """Be an amqtt broker until killed. Anybody may come, to loopback; its log is for errors."""
    import asyncio
    import logging

    from amqtt.broker import Broker

    logging.basicConfig(level=logging.ERROR)
    configuration = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }

    async def serve() -> None:
        await Broker(configuration).start()
        print("amqtt is ready", flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


def _main(arguments: list[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser(description="An embedded MQTT 3.1.1 broker (amqtt) on loopback.")
    parser.add_argument("--port", type=int, default=1883)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _serve_amqtt(parser.parse_args(arguments).port)


if __name__ == "__main__":
    _main(sys.argv[1:])
