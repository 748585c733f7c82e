"""The vendor's classes, by the vendor's names, for annotations: they say which class an attribute belongs to.

TensorRT's module is known only at run time, so to mypy they are all Any. To a reader, and to the test that compares
what the adapters use with `names`, `engine: ICudaEngine` tells where `engine.num_io_tensors` is to be found.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Builder: TypeAlias = Any
INetworkDefinition: TypeAlias = Any
IBuilderConfig: TypeAlias = Any
IOptimizationProfile: TypeAlias = Any
IHostMemory: TypeAlias = Any
ITimingCache: TypeAlias = Any
OnnxParser: TypeAlias = Any
ParserError: TypeAlias = Any
ErrorCode: TypeAlias = Any
Severity: TypeAlias = Any
"""`ILogger.Severity`."""
ILayer: TypeAlias = Any
ITensor: TypeAlias = Any
LayerType: TypeAlias = Any
DataType: TypeAlias = Any
Runtime: TypeAlias = Any
Refitter: TypeAlias = Any
OnnxParserRefitter: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IRuntimeConfig: TypeAlias = Any
IExecutionContext: TypeAlias = Any
