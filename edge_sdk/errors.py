"""Every error edge-sdk raises, branched by whose fault it is.

    EdgeSdkError
    |- ModelError              the ONNX file: broken, hostile, or using what we cannot take
    |- SpecError               engine.toml, or the options given in its place
    |- DataError               calibration or validation data: missing, unreadable, of the wrong shape
    |- ProfileError            a device profile: unknown, or asked for what the device cannot do
    |- PackageError            an engine package: incomplete, altered, of another format
    |  `- PackageMismatch      a sound package that does not fit this machine
    |- BackendError            the runtime under an engine
    |  |- BackendUnavailable   not installed here; the message names what to install
    |  |- EngineFailed         it was asked to build, load or infer, and could not
    |  |  |- DeviceLost        the accelerator is in a state that only a new process ends
    |  |  `- EngineHung        it does not come back from a computation, and only a new process ends that
    |  `- EngineUnfit          there is no compiled engine that may be loaded here; the graph beside it still is
    |- SettingsError           edge-sdk.toml, EDGE_SDK_* variables, command line
    |- BrokerError             the MQTT broker: unreachable, refusing, gone
    |- NoAnswer                the client waited its whole deadline, or nobody listens
    |- CommandFailed           a device did not do what it was told; the message is the device's
    `- RequestError            one request; each leaf is a row of the wire contract's error table
       |- Malformed            400
       |- ModelNotFound        404
       |- VersionNotFound      404
       |- DeadlineExceeded     408
       |- IdReused             409
       |- SequenceUnknown      409
       |- SequenceOutOfStep    409
       |- TooLarge             413
       |- UnsupportedType      415
       |- InvalidTensor        422
       |- QueueFull            429
       |- InferenceFailed      500
       |- Unavailable          503
       `- OutOfMemory          507

A message names the subject, what came, what was expected; `fix` is the next step. Both are for a person; facts a
program may want are attributes. Foreign exceptions are translated once, at the border, with `raise ... from`.

Command-line exit codes: 0 done; 1 a defect of ours; 2 wrong usage; 3 the input is at fault (model, spec, data,
package, settings); 4 this machine lacks something (profile, backend); 5 the broker; 6 no answer, an error for an
answer, or a wrong one; 7 something hung, and the daemon ended itself to be started anew; 130 interrupted.
"""

from __future__ import annotations

from typing import Any, ClassVar


class EdgeSdkError(Exception):
    """The root: `problem` says what is wrong, `fix` what to do about it (may be empty)."""

    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, *, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem} {self.fix}" if self.fix else self.problem

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross process borders whole: Exception's own way forgets keyword arguments."""
        return _restored, (type(self), self.__dict__)


def _restored(kind: type[EdgeSdkError], facts: dict[str, Any]) -> EdgeSdkError:
    error = kind.__new__(kind, facts["problem"], facts["fix"])
    error.__dict__.update(facts)
    return error


class ModelError(EdgeSdkError):
    exit_code = 3


class SpecError(EdgeSdkError):
    exit_code = 3


class DataError(EdgeSdkError):
    exit_code = 3


class ProfileError(EdgeSdkError):
    exit_code = 4


class PackageError(EdgeSdkError):
    exit_code = 3


class PackageMismatch(PackageError):
    """`reasons` lists every way in which the package does not fit this machine."""

    exit_code = 4

    def __init__(self, problem: str, *, reasons: tuple[str, ...], fix: str = "") -> None:
        super().__init__(problem, fix=fix)
        self.reasons = reasons


class BackendError(EdgeSdkError):
    exit_code = 4


class BackendUnavailable(BackendError):
    pass


class EngineFailed(BackendError):
    pass


class DeviceLost(EngineFailed):
    """Every further call would fail in the same way: nothing this process can do helps, a restart does."""


class EngineHung(EngineFailed):
    """What has been computing for longer than anything may; the process ends with it."""

    exit_code = 7


class EngineUnfit(BackendError):
    """`reasons` has, for every engine that was found, what keeps it from being loaded; empty where none was found."""

    def __init__(self, problem: str, *, reasons: tuple[str, ...], fix: str = "") -> None:
        super().__init__(problem, fix=fix)
        self.reasons = reasons


class SettingsError(EdgeSdkError):
    exit_code = 3


class BrokerError(EdgeSdkError):
    exit_code = 5


class NoAnswer(EdgeSdkError):
    exit_code = 6


class CommandFailed(EdgeSdkError):
    """`data` is what the device has to say about it."""

    exit_code = 6

    def __init__(self, problem: str, *, data: dict[str, Any] | None = None, fix: str = "") -> None:
        super().__init__(problem, fix=fix)
        self.data = data or {}


class RequestError(EdgeSdkError):
    """What is wrong with one request, as it goes over the wire.

    `status` and `code` are the wire contract's; `retryable` tells a client whether the same bytes may succeed later
    (each class has its usual answer); `retry_after_ms` when. The text never holds a path, an address or a stack trace:
    it goes to strangers.
    """

    exit_code = 6
    status: ClassVar[int] = 500
    code: ClassVar[str] = "inference_failed"
    retryable: bool = False

    def __init__(
        self, problem: str, *, fix: str = "", retry_after_ms: int | None = None, retryable: bool | None = None
    ) -> None:
        super().__init__(problem, fix=fix)
        self.retry_after_ms = retry_after_ms
        if retryable is not None:
            self.retryable = retryable


class Malformed(RequestError):
    status, code = 400, "malformed"


class ModelNotFound(RequestError):
    status, code = 404, "model_not_found"


class VersionNotFound(RequestError):
    status, code = 404, "version_not_found"


class DeadlineExceeded(RequestError):
    status, code, retryable = 408, "deadline_exceeded", True


class IdReused(RequestError):
    status, code = 409, "id_reused"


class SequenceUnknown(RequestError):
    status, code = 409, "sequence_unknown"


class SequenceOutOfStep(RequestError):
    status, code = 409, "sequence_out_of_step"


class TooLarge(RequestError):
    status, code = 413, "too_large"


class UnsupportedType(RequestError):
    status, code = 415, "unsupported_type"


class InvalidTensor(RequestError):
    status, code = 422, "invalid_tensor"


class QueueFull(RequestError):
    status, code, retryable = 429, "queue_full", True


class InferenceFailed(RequestError):
    status, code = 500, "inference_failed"


class Unavailable(RequestError):
    status, code, retryable = 503, "unavailable", True


class OutOfMemory(RequestError):
    status, code, retryable = 507, "out_of_memory", True


_REQUEST_ERRORS: dict[str, type[RequestError]] = {
    leaf.code: leaf
    for leaf in (
        Malformed, ModelNotFound, VersionNotFound, DeadlineExceeded, IdReused, SequenceUnknown, SequenceOutOfStep,
        TooLarge, UnsupportedType, InvalidTensor, QueueFull, InferenceFailed, Unavailable, OutOfMemory,
    )
}  # fmt: skip


def request_error(
    code: str, text: str, retry_after_ms: int | None = None, retryable: bool | None = None
) -> RequestError:
    """The error a client raises for an error answer; an unknown code (a newer device) is a plain RequestError."""
    return _REQUEST_ERRORS.get(code, RequestError)(text, retry_after_ms=retry_after_ms, retryable=retryable)
