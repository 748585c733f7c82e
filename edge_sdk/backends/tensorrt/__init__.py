"""The TensorRT backend: engines compiled for one kind of NVIDIA GPU, from the package's portable graph.

Three flavours of TensorRT are in the field, and this package drives them all. Read it in this order:

    backend     the seam: build, load, trust
    facts       what this machine has, found without loading anything of NVIDIA's
    sidecar     what a plan fits, and whether it may be loaded here: decided before TensorRT sees a byte of it
    candidates  the engines there are for a package, and what is against each
    store       engines compiled on this machine, and the key that vouches for them
    making      an engine for an order: shapes -> plan -> signed sidecar
    shapes      which sizes an engine is compiled for
    process     graph -> plan, in a process of its own: `child` is that process, `builder` what it does
    executor    plan -> outputs: `lanes` have the buffers, `arena` the memory that engines share, over `backends.cuda`
    api         the one file that imports TensorRT; `compiling` and `running` have what differs between generations

A plan is a cache entry. Whatever is wrong with one, the graph beside it answers meanwhile and makes the next.
"""

from __future__ import annotations

from edge_sdk.backends.tensorrt.backend import TensorRTBackend

__all__ = ["TensorRTBackend"]
