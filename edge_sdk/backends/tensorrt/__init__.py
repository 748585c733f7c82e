"""The TensorRT backend: engines compiled for one kind of NVIDIA GPU, from the package's portable graph.

Three flavours of TensorRT are in the field, and this package drives them all. Read it in this order:

    api         the one file that imports TensorRT; what differs between its generations, chosen by feature
    shapes      which sizes an engine is compiled for
    builder     graph -> plan, in a process of its own
    sidecar     what a plan fits, and whether it may be loaded here: decided before TensorRT sees a byte of it
    store       engines compiled on this machine, and the key that vouches for them
    executor    plan -> outputs: buffers, streams, graphs, over `backends.cuda`
    backend     the seam

A plan is a cache entry. Whatever is wrong with one, the graph beside it answers meanwhile and makes the next.
"""

from __future__ import annotations

from edge_sdk.backends.tensorrt.backend import TensorRTBackend

__all__ = ["TensorRTBackend"]
