"""The naive way to serve a model over MQTT: paho's on_message runs onnxruntime and publishes the answer.

This is the daemon people write first, and the one to beat. It has TCP_NODELAY, QoS 1, and onnxruntime's defaults.

    python benchmarks/naive.py PORT MODEL.onnx TOPIC
"""

from __future__ import annotations

import socket
import sys
from typing import Any

import numpy as np
import onnxruntime
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties


def main(port: int, model: str, topic: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    spec = session.get_inputs()[0]
    shape = [1, *spec.shape[1:]]

    def on_message(client: Client, _: Any, message: Any) -> None:
        array = np.frombuffer(message.payload, dtype=np.float32).reshape(shape)
        output = session.run(None, {spec.name: array})[0]
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # as paho is
        properties.CorrelationData = message.properties.CorrelationData
        client.publish(message.properties.ResponseTopic, output.tobytes(), qos=1, properties=properties)

    def on_socket_open(_client: Client, _userdata: Any, opened: socket.socket) -> None:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    client = Client(CallbackAPIVersion.VERSION2, client_id=f"naive-{port}", protocol=MQTTProtocolVersion.MQTTv5)
    client.max_inflight_messages_set(1000)
    client.on_socket_open = on_socket_open  # type: ignore[assignment]
    client.on_message = on_message
    client.on_connect = lambda connected, *_: connected.subscribe(topic, qos=1)
    client.connect("127.0.0.1", port)
    client.loop_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
