"""MQTT: topics and codec (pure), session (pure), transports (the only I/O), client library, brokers."""
