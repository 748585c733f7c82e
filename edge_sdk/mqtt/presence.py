"""What a device says about itself, retained, for whoever subscribes: server and model metadata as JSON-ready values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_sdk import __version__
from edge_sdk.profiles import DeviceProfile
from edge_sdk.runtime.pipelines import Pipeline
from edge_sdk.runtime.served import ServedModel
from edge_sdk.tensors import TensorSpec


def info(
    *,
    boot_id: str,
    profile: DeviceProfile | None,
    limits: dict[str, Any],
    models: dict[str, list[ServedModel]],
    group: dict[str, Any] | None = None,
    draining: bool = False,
) -> dict[str, Any]:
    """The Open Inference Protocol's server metadata, and what a client has to know before it sends."""
    return {
        "name": "edge-sdk",
        "version": __version__,
        "extensions": ["binary_tensor_data", "classification"],
        "boot_id": boot_id,
        "profile": profile.name if profile is not None else None,
        "limits": limits,
        "models": {name: [model.version for model in versions] for name, versions in models.items()},
        **({"group": group} if group is not None else {}),
        **({"draining": True} if draining else {}),
    }


def metadata(versions: Sequence[ServedModel]) -> dict[str, Any]:
    """The Open Inference Protocol's model metadata, and how the model is.

    `versions` is the newest first. The first that is ready speaks for the model: it is the one that a request without
    a version is answered by. `backend` is what really answers, which changes when an engine has been built.
    """
    speaker = next((model for model in versions if model.package is not None), versions[0])
    described: dict[str, Any] = {
        "name": speaker.model,
        "versions": [model.version for model in versions],
        "state": speaker.state,
    }
    if speaker.answers:
        described["resident"] = not speaker.is_absent
    if speaker.progress_percent is not None:
        described["progress_percent"] = speaker.progress_percent
    if speaker.reason:
        described["reason"] = _without_paths(speaker.reason)
    if (package := speaker.package) is not None:
        manifest = package.manifest
        described |= {
            "platform": f"edge-sdk_{speaker.backend}",
            "inputs": [_tensor(spec) for spec in manifest.asked],
            "outputs": [_tensor(spec) for spec in manifest.answered],
            "task": manifest.task,
            "precision": manifest.precision,
            "backend": speaker.backend,
            "profile": manifest.profile,
            "sha256": speaker.digest,
            "max_batch": manifest.batching.max_batch,
            "content_types": list(speaker.content_types),
        }
        if (rules := manifest.sequence) is not None:
            described["sequence"] = {"timeout_s": rules.timeout_s, "max_sequences": rules.max_sequences}
    if isinstance(speaker, Pipeline):
        spec = speaker.pipeline.spec
        described |= {
            "task": "pipeline",
            "stages": [stage.name for stage in spec.stage],
            "sha256": speaker.digest,
            "content_types": list(speaker.content_types),
        }
    return described


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.oip_datatype, "shape": spec.oip_shape}


def _without_paths(text: str) -> str:
    """A reason as strangers may read it: the last part of a path says enough."""
    return " ".join(word.rsplit("/", 1)[-1] if "/" in word else word for word in text.split(" "))
