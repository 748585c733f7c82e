"""The least that a server in Python can do: mqtt5's codec on a plain socket, and onnxruntime, in one loop.

It keeps no books: no queue, no deadlines, no answer to what cannot be computed, none again after a lost connection.
It looks for the next message for half a millisecond before it sleeps, as the daemon does. What the daemon adds to it is
the price of what it promises.

    python benchmarks/bare.py PORT MODEL.onnx TOPIC
"""

from __future__ import annotations

import select
import socket
import sys
import time

import mqtt5
import numpy as np
import onnxruntime

QOS_1 = mqtt5.QoS.AT_LEAST_ONCE
BUSY_POLL_S = 0.0005


def main(port: int, model: str, topic: str) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    spec = session.get_inputs()[0]
    shape = [1, *spec.shape[1:]]
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(mqtt5.ConnectPacket(f"bare-{port}", keep_alive=0, receive_max=1000).write())
    sock.recv(4096)  # CONNACK
    sock.sendall(mqtt5.SubscribePacket(1, [mqtt5.TopicFilter(topic, max_qos=QOS_1)]).write())
    sock.recv(4096)  # SUBACK
    sock.setblocking(False)
    inbox = b""
    sent = 0
    awake_until = 0.0
    while True:
        try:
            if not (came := sock.recv(1 << 20)):
                return
        except BlockingIOError:
            if time.monotonic() > awake_until:
                select.select([sock], [], [])
            continue
        awake_until = time.monotonic() + BUSY_POLL_S
        inbox += came
        unread, outbox = memoryview(inbox), []
        while unread:
            try:
                packet, size = mqtt5.read(unread)
            except IndexError:
                break  # the rest is on its way
            unread = unread[size:]
            if isinstance(packet, mqtt5.PublishPacket):
                array = np.frombuffer(packet.payload, dtype=np.float32).reshape(shape)
                output = session.run(None, {spec.name: array})[0]
                sent = sent % 60_000 + 1
                outbox.append(
                    mqtt5.PublishPacket(
                        packet.response_topic or "",
                        output.tobytes(),
                        qos=QOS_1,
                        packet_id=sent,
                        correlation_data=packet.correlation_data,
                    ).write()
                )
                outbox.append(mqtt5.PubAckPacket(packet.packet_id or 0).write())
        inbox = bytes(unread)
        sock.setblocking(True)
        sock.sendall(b"".join(outbox))
        sock.setblocking(False)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
