"""Backends: the runtimes that execute a graph. `base` is the seam, `registry` the one place that chooses."""
