"""A stand-in for a GPU and its driver, where there is none: a CUDA binding that does things in any order it may.

`SimulatedCuda` takes the place of pycuda and cuda-python. Device memory is the computer's own, at real addresses. What
is put into a stream is not done until somebody waits for it, and then in an order drawn by chance that keeps only what
the program asked for: the order within a stream, and events. So a result is right only if the program asked for enough.

Beside the results it watches, and a `SimulationError` is what it found:
  * every access, when it is put in and when it is done, lies in one piece of living memory;
  * two accesses of the same memory, one of them a write, are ordered by streams, events or the host (vector clocks);
  * arrays of the host are poisoned when a copy into them is put in, so whoever reads too early reads nonsense;
  * nothing is asked without a current context, of a destroyed handle, or of a lost device.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_sdk.backends.cuda import OUT_OF_MEMORY, STICKY, Facts, HostBlock, failure
from edge_sdk.tensors import Array

MEBIBYTE = 1 << 20
Clock = dict[int, int]
"""How many operations of each stream are known to be over."""


class SimulationError(AssertionError):
    """Something a real GPU would have punished with wrong results or a crash, perhaps, and some day."""


@dataclass(frozen=True)
class Span:
    """Memory that an operation reads or writes."""

    address: int
    size: int


@dataclass
class Operation:
    label: str
    act: Callable[[], None] = lambda: None
    reads: tuple[Span, ...] = ()
    writes: tuple[Span, ...] = ()
    after: Operation | None = None
    """An event's: this waits until that is over."""
    stream: int = 0
    number: int = 0
    clock: Clock = field(default_factory=dict)
    done_at: float | None = None


@dataclass
class Memory:
    size: int
    array: Array
    last_write: Operation | None = None
    reads: list[Operation] = field(default_factory=list)


@dataclass
class SimulatedStream:
    queue: deque[Operation] = field(default_factory=deque)
    last: Operation | None = None
    count: int = 0
    clock: Clock = field(default_factory=dict)
    """What its next operation comes after."""
    captured: list[Operation] | None = None
    capturer: int | None = None
    """The thread that captures, which meanwhile may not do everything; others may."""


class SimulatedCuda:
    """A binding of `backends.cuda`. `seed` draws the order in which streams get on.

    `fail(function, nth, status)` has the nth call from now of a function answered so; `lose_after(n)` has the device
    lost in the nth operation from now. `eager` is how likely the device gets on with something at each call.
    """

    name = "simulated"
    can_capture = True

    def __init__(
        self, seed: int = 0, *, total_bytes: int = 64 * MEBIBYTE, integrated: bool = False, eager: float = 0.3
    ) -> None:
        self.total_bytes = total_bytes
        self.integrated = integrated
        self.eager = eager
        self.allocated = 0
        self.largest_allocated = 0
        self.retained = 0
        self.faults: list[str] = []
        self.history: list[str] = []
        """The labels of what was done, in order."""
        self.calls: dict[str, int] = {}
        self._draw = random.Random(seed)
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._memory: dict[int, Memory] = {}
        self._streams: dict[int, SimulatedStream] = {}
        self._events: dict[int, Operation | None] = {}
        self._graphs: dict[int, list[Operation]] = {}
        self._host_clock: Clock = {}
        self._handles = iter(range(1, 1 << 30))
        self._now_ms = 0.0
        self._failures: dict[tuple[str, int], str] = {}
        self._sticky = ""
        self._lose_in = -1

    # What a test asks for, and what it sees

    def fail(self, function: str, nth: int, status: str) -> None:
        self._failures[function, self.calls.get(function, 0) + nth] = status

    def lose_after(self, operations: int) -> None:
        self._lose_in = operations

    def leaks(self) -> dict[str, int]:
        """What was not given back, or not properly; empty if everything was."""
        held = {
            "faults": len(self.faults),
            "memory": len(self._memory), "streams": len(self._streams), "events": len(self._events),
            "graphs": len(self._graphs), "contexts": self.retained,
        }  # fmt: skip
        return {kind: count for kind, count in held.items() if count}

    def waiting(self, stream: int) -> list[str]:
        return [operation.label for operation in self._streams[stream].queue]

    def run_where_possible(self, wanted: Callable[[Operation], bool]) -> None:
        """Get on, but only with operations that are `wanted`: a schedule of the test's own choice."""
        with self._lock:
            while ready := [stream for stream in self._ready() if wanted(stream.queue[0])]:
                self._do(ready[0])

    # The device getting on

    def _enter(self, function: str, *, needs_context: bool = True) -> None:
        self.calls[function] = count = self.calls.get(function, 0) + 1
        if status := self._failures.pop((function, count), self._sticky):
            if status in STICKY:
                self._sticky = status
            raise failure(function, status)
        if needs_context and not getattr(self._thread, "depth", 0):
            raise SimulationError(f"{function} without a current context")
        while self._streams and self._draw.random() < self.eager and self._step():
            pass

    def _ready(self) -> list[SimulatedStream]:
        return [
            stream
            for stream in self._streams.values()
            if stream.queue and ((after := stream.queue[0].after) is None or after.done_at is not None)
        ]

    def _step(self) -> bool:
        if self._sticky or not (ready := self._ready()):
            return False
        self._do(self._draw.choice(ready))
        return True

    def _do(self, stream: SimulatedStream) -> None:
        operation = stream.queue.popleft()
        self._now_ms += 1.0
        operation.done_at = self._now_ms
        if self._lose_in == 0:
            self._sticky = "CUDA_ERROR_ILLEGAL_ADDRESS"
            return
        self._lose_in -= 1
        for span in (*operation.reads, *operation.writes):
            self.memory_at(span, operation.label)
        operation.act()
        self.history.append(operation.label)

    def _run_until(self, operation: Operation | None, function: str) -> None:
        while operation is not None and operation.done_at is None:
            if not self._step():
                if self._sticky:
                    break
                raise SimulationError(f"{function} waits for ever")
        if self._sticky:
            raise failure(function, self._sticky)
        if operation is not None:  # the host, and whatever it puts in from now on, comes after it
            _advance(self._host_clock, operation.clock)

    def memory_at(self, span: Span, label: str) -> Memory:
        for address, memory in self._memory.items():
            if address <= span.address and span.address + span.size <= address + memory.size:
                return memory
        raise SimulationError(f"{label} at {span.address:#x}, {span.size} bytes: not within living memory")

    def put(self, stream: int, operation: Operation) -> None:
        """Put an operation into a stream, or into the graph that is being captured there."""
        lane = self._streams[stream]
        if lane.captured is not None:
            lane.captured.append(operation)
            return
        lane.count += 1
        operation.stream, operation.number = stream, lane.count
        _advance(lane.clock, self._host_clock)
        if operation.after is not None:
            _advance(lane.clock, operation.after.clock)
        operation.clock = {**lane.clock, stream: lane.count}
        lane.clock = dict(operation.clock)
        for span in operation.reads:
            memory = self.memory_at(span, operation.label)
            self._ordered(operation, memory.last_write)
            memory.reads.append(operation)
        for span in operation.writes:
            memory = self.memory_at(span, operation.label)
            for earlier in (memory.last_write, *memory.reads):
                self._ordered(operation, earlier)
            memory.last_write, memory.reads = operation, []
        lane.queue.append(operation)
        lane.last = operation

    def _ordered(self, later: Operation, earlier: Operation | None) -> None:
        if earlier is None or earlier is later or later.clock.get(earlier.stream, 0) >= earlier.number:
            return
        raise SimulationError(f"nothing keeps {later.label!r} from running beside {earlier.label!r}")

    # The binding

    def count(self) -> int:
        return 1

    def facts(self, ordinal: int) -> Facts:
        return Facts("Simulated GPU", "8.9", self.total_bytes, self.integrated, "13.0")

    def retain(self, ordinal: int) -> Any:
        self.retained += 1
        return "context"

    def release(self, ordinal: int, context: Any) -> None:
        self.retained -= 1

    def push(self, context: Any) -> None:
        if not self.retained:
            raise SimulationError("a context that was released")
        with self._lock:
            self._enter("push", needs_context=False)
        self._thread.depth = getattr(self._thread, "depth", 0) + 1

    def pop(self, context: Any) -> None:
        self._thread.depth -= 1

    def free_and_total_bytes(self) -> tuple[int, int]:
        with self._lock:
            self._enter("memory")
            return self.total_bytes - self.allocated, self.total_bytes

    def allocate(self, size: int) -> int:
        with self._lock:
            self._enter("allocate")
            if any(stream.capturer == threading.get_ident() for stream in self._streams.values()):
                raise failure("allocate", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
            if size > self.total_bytes - self.allocated:
                raise failure("allocate", OUT_OF_MEMORY, asked_bytes=size)
            self.allocated += size
            self.largest_allocated = max(self.largest_allocated, self.allocated)
            return self._living(size)

    def _living(self, size: int) -> int:
        array = np.full(size, 0xA5, np.uint8)
        address = int(array.ctypes.data)
        self._memory[address] = Memory(size, array)
        return address

    def free(self, address: int) -> None:
        with self._lock:
            self._enter("free")
            if address not in self._memory:
                raise SimulationError(f"{address:#x} was freed twice, or never allocated")
            self.allocated -= self._memory.pop(address).size

    def allocate_host(self, size: int, mapped: bool) -> HostBlock:
        with self._lock:
            self._enter("allocate_host")
            address = self._living(size)
            return HostBlock(self._memory[address].array, address if mapped else None)

    def free_host(self, block: HostBlock) -> None:
        with self._lock:
            self._enter("free_host")
            del self._memory[int(block.array.ctypes.data)]

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        with self._lock:
            self._enter("copy_in")
            source = Span(int(array.ctypes.data), array.nbytes)

            def act() -> None:
                ctypes.memmove(address, source.address, source.size)

            self.put(stream, Operation("copy in", act, (source,), (Span(address, array.nbytes),)))

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        with self._lock:
            self._enter("copy_out")
            target = Span(int(array.ctypes.data), array.nbytes)

            def act() -> None:
                ctypes.memmove(target.address, address, target.size)

            self.put(stream, Operation("copy out", act, (Span(address, array.nbytes),), (target,)))
            ctypes.memset(target.address, 0xCD, target.size)

    def create_stream(self) -> int:
        with self._lock:
            self._enter("create_stream")
            handle = next(self._handles)
            self._streams[handle] = SimulatedStream()
            return handle

    def destroy_stream(self, stream: int) -> None:
        with self._lock:
            self._enter("destroy_stream")
            if self._streams.pop(stream).queue:
                raise SimulationError("a stream was destroyed with work in it")

    def synchronize_stream(self, stream: int) -> None:
        with self._lock:
            self._enter("synchronize_stream")
            self._run_until(self._streams[stream].last, "synchronize_stream")

    def create_event(self, timed: bool) -> int:
        with self._lock:
            self._enter("create_event")
            handle = next(self._handles)
            self._events[handle] = None
            return handle

    def destroy_event(self, event: int) -> None:
        with self._lock:
            self._enter("destroy_event")
            del self._events[event]

    def record(self, event: int, stream: int) -> None:
        with self._lock:
            self._enter("record")
            self._events[event] = operation = Operation("event")
            self.put(stream, operation)

    def wait(self, stream: int, event: int) -> None:
        with self._lock:
            self._enter("wait")
            if (recorded := self._events[event]) is not None:
                self.put(stream, Operation("wait", after=recorded))

    def synchronize_event(self, event: int) -> None:
        with self._lock:
            self._enter("synchronize_event")
            self._run_until(self._events[event], "synchronize_event")

    def elapsed_ms(self, start: int, end: int) -> float:
        with self._lock:
            self._enter("elapsed_ms")
            first, last = self._events[start], self._events[end]
            if first is None or last is None or first.done_at is None or last.done_at is None:
                raise failure("elapsed_ms", "CUDA_ERROR_NOT_READY")
            return last.done_at - first.done_at

    def begin_capture(self, stream: int) -> None:
        with self._lock:
            self._enter("begin_capture")
            self._streams[stream].captured = []
            self._streams[stream].capturer = threading.get_ident()

    def end_capture(self, stream: int) -> int:
        with self._lock:
            captured, self._streams[stream].captured = self._streams[stream].captured, None
            self._streams[stream].capturer = None
            self._enter("end_capture")
            if captured is None:
                raise SimulationError("a capture ended that never began")
            handle = next(self._handles)
            self._graphs[handle] = captured
            return handle

    def launch(self, graph: int, stream: int) -> None:
        with self._lock:
            self._enter("launch")
            for operation in self._graphs[graph]:
                again = Operation(f"{operation.label} (graph)", operation.act, operation.reads, operation.writes)
                self.put(stream, again)

    def destroy_graph(self, graph: int) -> None:
        with self._lock:
            self._enter("destroy_graph")
            del self._graphs[graph]


def _advance(clock: Clock, known: Mapping[int, int]) -> None:
    for stream, count in known.items():
        clock[stream] = max(clock.get(stream, 0), count)
