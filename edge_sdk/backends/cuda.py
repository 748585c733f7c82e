"""The seam to CUDA's driver: memory on a GPU and beside it, streams, events, graphs.

    with closing(Device.open()) as device, device:          # opened; then current on this thread
        memory, pinned = device.allocate(1 << 20), device.allocate_host(1 << 20)
        stream, done = device.stream(), device.event()
        stream.copy_in(memory.address, pinned.array)
        done.record(stream)
        done.synchronize()

There are two bindings, and `cuda_bindings` has both behind one protocol, `Binding`: `pycuda`, and `cuda-python` where
pycuda cannot be imported. They hand out plain integers, so nothing else in edge-sdk needs to know which it is.

Every call's status is checked, and becomes an error of ours here. Some statuses are *sticky*: from then on every call
in the process fails, whatever it asks. They are DeviceLost, and the process has to be started again.

A device's objects may be used by any thread for which the device is current, one thread at a time; `with device:` makes
it current, and may be nested. The context is the device's primary one, which TensorRT and onnxruntime share.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from edge_sdk.errors import BackendUnavailable, DeviceLost, EdgeSdkError, EngineFailed, OutOfMemory
from edge_sdk.tensors import Array

log = logging.getLogger(__name__)

OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
STICKY = {
    "CUDA_ERROR_DEINITIALIZED": "driver shutting down",
    "CUDA_ERROR_ECC_UNCORRECTABLE": "uncorrectable ECC error encountered",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE": "uncorrectable NVLink error detected during the execution",
    "CUDA_ERROR_CONTAINED": "Invalid access of peer GPU memory over nvlink or a hardware error",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "an illegal memory access was encountered",
    "CUDA_ERROR_LAUNCH_TIMEOUT": "the launch timed out and was terminated",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED": "context is destroyed",
    "CUDA_ERROR_ASSERT": "device-side assert triggered",
    "CUDA_ERROR_HARDWARE_STACK_ERROR": "hardware stack error",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": "an illegal instruction was encountered",
    "CUDA_ERROR_MISALIGNED_ADDRESS": "misaligned address",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE": "operation not supported on global/shared address space",
    "CUDA_ERROR_INVALID_PC": "invalid program counter",
    "CUDA_ERROR_LAUNCH_FAILED": "unspecified launch failure",
    "CUDA_ERROR_TENSOR_MEMORY_LEAK": "tensor memory not completely freed",
    "CUDA_ERROR_MPS_RPC_FAILURE": "the remote procedural call between the MPS server and the MPS client failed",
    "CUDA_ERROR_MPS_CLIENT_TERMINATED": "the MPS client has been terminated by the server",
    "CUDA_ERROR_EXTERNAL_DEVICE": "an async error has occured in external entity outside of CUDA",
    "CUDA_ERROR_UNKNOWN": "unknown error",
}
"""Statuses after which the context is of no more use -> what the driver says of each, which is all pycuda passes on.

Those whose page in the driver API says that the process must be terminated and relaunched; those that only arise when
the context, or whoever lends it, is gone; and the one that says nothing, which drivers use after a fault.
"""


class Facts(NamedTuple):
    """What a GPU is."""

    name: str
    compute_capability: str
    """As "8.6"."""
    total_bytes: int
    integrated: bool
    """It computes in the computer's own memory (a Jetson): copies to it would go from memory to the same memory."""
    cuda_version: str
    """The newest CUDA the driver can do, as "13.0"."""


class HostBlock(NamedTuple):
    array: Array
    """uint8, one axis."""
    address: int | None
    """Where the device finds it; None unless it was mapped."""


class Binding(Protocol):
    """CUDA's driver API, as far as we use it; objects are integers. Every method raises only errors of ours."""

    name: str
    can_capture: bool

    def count(self) -> int: ...
    def facts(self, ordinal: int) -> Facts: ...
    def retain(self, ordinal: int) -> Any: ...  # the primary context
    def release(self, ordinal: int, context: Any) -> None: ...
    def push(self, context: Any) -> None: ...
    def pop(self, context: Any) -> None: ...
    def free_and_total_bytes(self) -> tuple[int, int]: ...
    def allocate(self, size: int) -> int: ...
    def free(self, address: int) -> None: ...
    def allocate_host(self, size: int, mapped: bool) -> HostBlock: ...
    def free_host(self, block: HostBlock) -> None: ...
    def copy_in(self, address: int, array: Array, stream: int) -> None: ...
    def copy_out(self, array: Array, address: int, stream: int) -> None: ...
    def create_stream(self) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def synchronize_stream(self, stream: int) -> None: ...
    def create_event(self, timed: bool) -> int: ...
    def destroy_event(self, event: int) -> None: ...
    def record(self, event: int, stream: int) -> None: ...
    def wait(self, stream: int, event: int) -> None: ...
    def synchronize_event(self, event: int) -> None: ...
    def elapsed_ms(self, start: int, end: int) -> float: ...
    def begin_capture(self, stream: int) -> None: ...
    def end_capture(self, stream: int) -> int: ...  # an executable graph
    def launch(self, graph: int, stream: int) -> None: ...
    def destroy_graph(self, graph: int) -> None: ...


class BindingMissing(BackendUnavailable):
    """A binding that cannot be imported; another one may."""


def open_binding(name: str | None = None) -> Binding:
    """The binding called `name`, or the first that can be imported; BackendUnavailable says what this machine lacks."""
    from edge_sdk.backends.cuda_bindings import BINDINGS

    missing: list[BindingMissing] = []
    for kind in BINDINGS:
        if name in (None, kind.name):
            try:
                return kind()
            except BindingMissing as exc:
                missing.append(exc)
    if not missing:
        raise BackendUnavailable(f"There is no CUDA binding {name!r}.", fix="There are pycuda and cuda-python.")
    raise BackendUnavailable(" ".join(exc.problem for exc in missing), fix=missing[-1].fix)


def lacking() -> BackendUnavailable | None:
    """What keeps this machine from using a GPU; None if nothing does. It loads a binding, and takes no memory."""
    try:
        return None if open_binding().count() else BackendUnavailable("CUDA sees no GPU here.")
    except BackendUnavailable as exc:
        return exc


def failure(function: str, status: str, text: str = "", *, asked_bytes: int | None = None) -> EdgeSdkError:
    """The error that a driver function's status means: `status` is the driver API's name for it, if that is known."""
    said = ": ".join(filter(None, (status, text)))
    if status in STICKY:
        return DeviceLost(
            f"The GPU is lost to this process ({function}: {said}) until the process is started again.",
            fix="Start it again; if it happens often, the kernel's log (`dmesg | grep -i xid`) has the reason.",
        )
    if status == OUT_OF_MEMORY:
        asked = f" of {asked_bytes:,} bytes" if asked_bytes is not None else ""
        return OutOfMemory(f"The GPU has no memory left for {function}{asked}.")
    return EngineFailed(f"CUDA refused {function}: {said}.")


@dataclass(frozen=True)
class Held:
    """What was allocated on a device and not yet given back."""

    device_bytes: int = 0
    host_bytes: int = 0
    streams: int = 0
    events: int = 0
    graphs: int = 0


class Device:
    """A GPU, whose primary context is held until `close`. `with device:` makes it current on this thread.

    What it makes is freed by its own `free`, while the device is current; `held` is what is still there.
    """

    def __init__(self, binding: Binding, ordinal: int = 0) -> None:
        """BackendUnavailable if there is no such device."""
        if (count := binding.count()) <= ordinal:
            raise BackendUnavailable(f"CUDA has no device {ordinal} here; it sees {count}.")
        self.binding = binding
        self.facts = binding.facts(ordinal)
        self._ordinal = ordinal
        self._context: Any = binding.retain(ordinal)
        self._thread = threading.local()
        self._held: set[_Owned] = set()

    @classmethod
    def open(cls, ordinal: int = 0, *, binding: str | None = None) -> Device:
        """The GPU that CUDA calls `ordinal`; BackendUnavailable says what is missing."""
        return cls(open_binding(binding), ordinal)

    def __enter__(self) -> Device:
        depth = getattr(self._thread, "depth", 0)
        if depth == 0:
            self.binding.push(self._context)
        self._thread.depth = depth + 1
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.depth -= 1
        if self._thread.depth == 0:
            _quietly(self.binding.pop, self._context)

    @contextmanager
    def for_the_last_time(self) -> Iterator[None]:
        """Current, if it can still be: to give things back, of which a lost device has none."""
        with ExitStack() as entered:
            with suppress(DeviceLost):
                entered.enter_context(self)
            yield

    def close(self) -> None:
        """Give back whatever is still held, and the context. Closing twice is harmless."""
        if self._context is None:
            return
        if self._held:
            log.warning("A defect of edge-sdk: %s is closed with %s.", self.facts.name, self.held)
        with self.for_the_last_time():
            for owned in list(self._held):
                owned.free()
        context, self._context = self._context, None
        _quietly(self.binding.release, self._ordinal, context)

    @property
    def can_capture(self) -> bool:
        """Whether the binding has CUDA graphs."""
        return self.binding.can_capture

    @property
    def held(self) -> Held:
        things = list(self._held)
        return Held(
            sum(thing.size for thing in things if isinstance(thing, DeviceMemory)),
            sum(thing.size for thing in things if isinstance(thing, HostMemory)),
            sum(isinstance(thing, Stream) for thing in things),
            sum(isinstance(thing, Event) for thing in things),
            sum(isinstance(thing, Graph) for thing in things),
        )

    def free_bytes(self) -> int:
        """What the whole device has left, for this process and others."""
        return self.binding.free_and_total_bytes()[0]

    def check(self) -> None:
        """Raise DeviceLost if the device is lost: a library that works on it says only that something failed."""
        try:
            self.free_bytes()
        except DeviceLost:
            raise
        except EdgeSdkError as exc:
            log.debug("The device is there, and yet: %s", exc)

    def allocate(self, size: int) -> DeviceMemory:
        """Memory of the device; OutOfMemory if there is not so much."""
        return DeviceMemory(self, self.binding.allocate(max(1, size)), size)

    def allocate_host(self, size: int, *, mapped: bool = False) -> HostMemory:
        """Memory of the computer that the device copies by itself; or, if `mapped`, reads and writes in place."""
        return HostMemory(self, self.binding.allocate_host(max(1, size), mapped), size)

    def stream(self) -> Stream:
        return Stream(self, self.binding.create_stream())

    def event(self, *, timed: bool = False) -> Event:
        return Event(self, self.binding.create_event(timed))


class _Owned:
    """Something of a device's, until it is given back: which cannot fail, as nobody could do anything about it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._binding = device.binding
        device._held.add(self)

    def free(self) -> None:
        if self in self._device._held:
            self._device._held.discard(self)
            _quietly(self._give_back)

    def _give_back(self) -> None:
        raise NotImplementedError


class DeviceMemory(_Owned):
    def __init__(self, device: Device, address: int, size: int) -> None:
        super().__init__(device)
        self.address = address
        self.size = size

    def _give_back(self) -> None:
        self._binding.free(self.address)


class HostMemory(_Owned):
    """`array` is uint8 with one axis; it must not be touched once the memory was given back."""

    def __init__(self, device: Device, block: HostBlock, size: int) -> None:
        super().__init__(device)
        self._block = block
        self.array = block.array
        self.address = block.address
        self.size = size

    def _give_back(self) -> None:
        self._binding.free_host(self._block)


class Stream(_Owned):
    """Work in order. `handle` is what TensorRT takes."""

    def __init__(self, device: Device, handle: int) -> None:
        super().__init__(device)
        self.handle = handle

    def copy_in(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device, some time: until then it must not change."""
        self._binding.copy_in(address, array, self.handle)

    def copy_out(self, array: Array, address: int) -> None:
        self._binding.copy_out(array, address, self.handle)

    def wait(self, event: Event) -> None:
        """Whatever is put in later starts only after what was recorded last in `event`."""
        self._binding.wait(self.handle, event.handle)

    def synchronize(self) -> None:
        self._binding.synchronize_stream(self.handle)

    @contextmanager
    def capture(self) -> Iterator[list[Graph]]:
        """Nothing put in meanwhile is done; it becomes a graph, which is in the list once this has ended."""
        captured: list[Graph] = []
        self._binding.begin_capture(self.handle)
        try:
            yield captured
        except BaseException:
            _quietly(self._abandon_capture)
            raise
        captured.append(Graph(self._device, self._binding.end_capture(self.handle)))

    def _abandon_capture(self) -> None:
        self._binding.destroy_graph(self._binding.end_capture(self.handle))

    def _give_back(self) -> None:
        self._binding.destroy_stream(self.handle)


class Event(_Owned):
    def __init__(self, device: Device, handle: int) -> None:
        super().__init__(device)
        self.handle = handle

    def record(self, stream: Stream) -> None:
        self._binding.record(self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait for what was recorded last."""
        self._binding.synchronize_event(self.handle)

    def since(self, start: Event) -> float:
        """Milliseconds of the device between two timed events, both of them over."""
        return self._binding.elapsed_ms(start.handle, self.handle)

    def _give_back(self) -> None:
        self._binding.destroy_event(self.handle)


class Graph(_Owned):
    """Work of a stream, ready to be started as one: with the very addresses it was captured with."""

    def __init__(self, device: Device, handle: int) -> None:
        super().__init__(device)
        self.handle = handle

    def launch(self, stream: Stream) -> None:
        self._binding.launch(self.handle, stream.handle)

    def _give_back(self) -> None:
        self._binding.destroy_graph(self.handle)


def _quietly(act: Any, *args: Any) -> None:
    try:
        act(*args)
    except EdgeSdkError as exc:  # a lost device takes its memory with it
        log.debug("Not given back: %s", exc)
