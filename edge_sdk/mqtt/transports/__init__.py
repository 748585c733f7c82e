"""Transports: MQTT connections behind one small protocol. `base` is the seam; each client library has one file."""
