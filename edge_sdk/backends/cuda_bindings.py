"""The two bindings to CUDA's driver, as like each other as they can be: the one file that imports either.

`pycuda` is what a Jetson usually has; it is built from source, with the driver at hand, and has no graph capture.
`cuda-python` is NVIDIA's, a wheel for any machine, and has the whole driver API.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from edge_sdk.backends.cuda import OUT_OF_MEMORY, STICKY, Binding, BindingMissing, Facts, HostBlock, failure
from edge_sdk.errors import BackendError, BackendUnavailable, EdgeSdkError, EngineFailed, OutOfMemory
from edge_sdk.tensors import Array

_INSTALL = "Install one: pip install pycuda (on a Jetson), or pip install cuda-python."
_NO_GRAPHS = "pycuda cannot capture CUDA graphs."
_DRIVER = "Install NVIDIA's driver; `nvidia-smi` tells whether it works."
_NAMES_OF_TEXTS = {text: name for name, text in {**STICKY, OUT_OF_MEMORY: "out of memory"}.items()}


class PyCuda:
    """pycuda, whose objects free themselves when they are forgotten: they are kept here until they are given back.

    It keeps a stack of contexts for each thread, and ends the process if a thread ends with one on it. So a context is
    current only inside `with device:`.
    """

    name = "pycuda"
    can_capture = False

    def __init__(self) -> None:
        try:
            import pycuda.driver
        except ImportError as exc:  # not installed; or it is, and libcuda.so.1 is not
            raise BindingMissing(f"pycuda cannot be imported: {exc}.", fix=_INSTALL) from exc
        self._cuda: Any = pycuda.driver
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._events: dict[int, Any] = {}
        with _no_driver_is_unavailable(), self._translated():
            self._cuda.init()

    @contextmanager
    def _translated(self, asked_bytes: int | None = None) -> Iterator[None]:
        """pycuda's exceptions say `cuMemAlloc failed: out of memory`, with the driver's text and without its code."""
        try:
            yield
        except self._cuda.Error as exc:
            function, _, text = str(exc).partition(" failed: ")
            text = text.partition(" - ")[0]
            raise failure(function, _NAMES_OF_TEXTS.get(text, ""), text, asked_bytes=asked_bytes) from exc

    def count(self) -> int:
        with _no_driver_is_unavailable(), self._translated():
            return int(self._cuda.Device.count())

    def facts(self, ordinal: int) -> Facts:
        with self._translated():
            device, attribute = self._cuda.Device(ordinal), self._cuda.device_attribute
            integrated = device.get_attribute(attribute.INTEGRATED)
            return Facts(
                name=device.name(),
                compute_capability=".".join(map(str, device.compute_capability())),
                total_bytes=int(device.total_memory()),
                integrated=bool(integrated and device.get_attribute(attribute.CAN_MAP_HOST_MEMORY)),
                cuda_version=_version(self._cuda.get_driver_version()),
            )

    def retain(self, ordinal: int) -> Any:
        with self._translated():
            return self._cuda.Device(ordinal).retain_primary_context()

    def release(self, ordinal: int, context: Any) -> None:
        """Outside the thread that retained it pycuda releases a context only while it is current."""
        with self._translated():
            context.push()
            context.detach()

    def push(self, context: Any) -> None:
        with self._translated():
            context.push()

    def pop(self, context: Any) -> None:
        try:
            with self._translated():
                self._cuda.Context.pop()
        except EdgeSdkError:  # it would stay on the stack, and the end of this thread would be the process's
            with contextlib.suppress(self._cuda.Error):
                context.detach()
            self._cuda.Context.get_current()  # takes what is detached off the stack
            raise

    def free_and_total_bytes(self) -> tuple[int, int]:
        with self._translated():
            free, total = self._cuda.mem_get_info()
            return int(free), int(total)

    def allocate(self, size: int) -> int:
        with self._translated(size):
            memory = self._cuda.mem_alloc(size)
        self._memory[address := int(memory)] = memory
        return address

    def free(self, address: int) -> None:
        with self._translated():
            self._memory.pop(address).free()

    def allocate_host(self, size: int, mapped: bool) -> HostBlock:
        flags = self._cuda.host_alloc_flags.DEVICEMAP if mapped else 0
        with self._translated(size):
            array = self._cuda.pagelocked_empty(size, np.uint8, mem_flags=flags)
        block = HostBlock(array, None)
        try:
            with self._translated():
                return block._replace(address=int(array.base.get_device_pointer())) if mapped else block
        except EdgeSdkError:
            self.free_host(block)
            raise

    def free_host(self, block: HostBlock) -> None:
        allocation: Any = block.array.base
        with self._translated():
            allocation.free()

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        with self._translated():
            self._cuda.memcpy_htod_async(address, array, self._streams[stream])

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        with self._translated():
            self._cuda.memcpy_dtoh_async(array, address, self._streams[stream])

    def create_stream(self) -> int:
        with self._translated():
            stream = self._cuda.Stream(1)  # CU_STREAM_NON_BLOCKING, which pycuda has no name for
        self._streams[handle := int(stream.handle)] = stream
        return handle

    def destroy_stream(self, stream: int) -> None:
        self._streams.pop(stream)

    def synchronize_stream(self, stream: int) -> None:
        with self._translated():
            self._streams[stream].synchronize()

    def create_event(self, timed: bool) -> int:
        flags = self._cuda.event_flags
        with self._translated():
            event = self._cuda.Event(flags.DEFAULT if timed else flags.DISABLE_TIMING)
        self._events[handle := id(event)] = event
        return handle

    def destroy_event(self, event: int) -> None:
        self._events.pop(event)

    def record(self, event: int, stream: int) -> None:
        with self._translated():
            self._events[event].record(self._streams[stream])

    def wait(self, stream: int, event: int) -> None:
        with self._translated():
            self._streams[stream].wait_for_event(self._events[event])

    def synchronize_event(self, event: int) -> None:
        with self._translated():
            self._events[event].synchronize()

    def elapsed_ms(self, start: int, end: int) -> float:
        with self._translated():
            return float(self._events[end].time_since(self._events[start]))

    def begin_capture(self, stream: int) -> None:
        raise EngineFailed(_NO_GRAPHS)

    def end_capture(self, stream: int) -> int:
        raise EngineFailed(_NO_GRAPHS)

    def launch(self, graph: int, stream: int) -> None:
        raise EngineFailed(_NO_GRAPHS)

    def destroy_graph(self, graph: int) -> None:
        raise EngineFailed(_NO_GRAPHS)


class CudaPython:
    """NVIDIA's own binding. It imports without a driver, and looks for one at the first call."""

    name = "cuda-python"
    can_capture = True

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as exc:
            raise BindingMissing(f"cuda-python cannot be imported: {exc}.", fix=_INSTALL) from exc
        self._driver: Any = driver
        with _no_driver_is_unavailable():
            self._call("cuInit", 0)

    def _call(self, function: str, *args: Any, asked_bytes: int | None = None) -> Any:
        try:
            status, *results = getattr(self._driver, function)(*args)
        except (RuntimeError, AttributeError) as exc:  # no libcuda, or one without the function
            raise BackendUnavailable(
                f"NVIDIA's driver library cannot be used ({function}): {str(exc).rstrip('.')}.", fix=_DRIVER
            ) from exc
        if status != 0:
            raise failure(function, status.name, self._text(status), asked_bytes=asked_bytes)
        return results[0] if len(results) == 1 else results

    def _text(self, status: Any) -> str:
        told, text = self._driver.cuGetErrorString(status)
        return text.decode(errors="replace") if told == 0 and text else ""

    def count(self) -> int:
        with _no_driver_is_unavailable():
            return int(self._call("cuDeviceGetCount"))

    def facts(self, ordinal: int) -> Facts:
        device = self._call("cuDeviceGet", ordinal)
        attribute = self._driver.CUdevice_attribute

        def ask(name: str) -> int:
            return int(self._call("cuDeviceGetAttribute", getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device))

        return Facts(
            name=self._call("cuDeviceGetName", 256, device).split(b"\0")[0].decode(errors="replace"),
            compute_capability=f"{ask('COMPUTE_CAPABILITY_MAJOR')}.{ask('COMPUTE_CAPABILITY_MINOR')}",
            total_bytes=int(self._call("cuDeviceTotalMem", device)),
            integrated=bool(ask("INTEGRATED") and ask("CAN_MAP_HOST_MEMORY")),
            cuda_version=_version(int(self._call("cuDriverGetVersion"))),
        )

    def retain(self, ordinal: int) -> Any:
        return self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", ordinal))

    def release(self, ordinal: int, context: Any) -> None:
        self._call("cuDevicePrimaryCtxRelease", self._call("cuDeviceGet", ordinal))

    def push(self, context: Any) -> None:
        self._call("cuCtxPushCurrent", context)

    def pop(self, context: Any) -> None:
        self._call("cuCtxPopCurrent")

    def free_and_total_bytes(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size, asked_bytes=size))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_host(self, size: int, mapped: bool) -> HostBlock:
        flags = int(self._driver.CU_MEMHOSTALLOC_DEVICEMAP) if mapped else 0
        pointer = int(self._call("cuMemHostAlloc", size, flags, asked_bytes=size))
        block = HostBlock(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer)), None)
        try:
            return block._replace(address=int(self._call("cuMemHostGetDevicePointer", pointer, 0))) if mapped else block
        except EdgeSdkError:
            self.free_host(block)
            raise

    def free_host(self, block: HostBlock) -> None:
        self._call("cuMemFreeHost", block.array.ctypes.data)

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)

    def create_stream(self) -> int:
        return int(self._call("cuStreamCreate", int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize_stream(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def create_event(self, timed: bool) -> int:
        flags = self._driver.CUevent_flags
        kind = flags.CU_EVENT_DEFAULT if timed else flags.CU_EVENT_DISABLE_TIMING
        return int(self._call("cuEventCreate", int(kind)))

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: int) -> None:
        self._call("cuEventSynchronize", event)

    def elapsed_ms(self, start: int, end: int) -> float:
        return float(self._call("cuEventElapsedTime", start, end))

    def begin_capture(self, stream: int) -> None:
        """Of this thread's calls only: other threads go on allocating meanwhile."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return int(self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", graph)


@contextmanager
def _no_driver_is_unavailable() -> Iterator[None]:
    """Whatever goes wrong before there is a device means that there is none for us."""
    try:
        yield
    except BackendUnavailable:
        raise
    except (BackendError, OutOfMemory) as exc:
        raise BackendUnavailable(f"No NVIDIA GPU can be used here: {exc.problem}", fix=_DRIVER) from exc


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


BINDINGS: tuple[type[Binding], ...] = (PyCuda, CudaPython)
"""In the order in which they are tried."""
