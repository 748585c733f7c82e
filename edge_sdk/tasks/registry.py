"""Which task a model has: the one place that names them all."""

from __future__ import annotations

from edge_sdk.errors import BackendUnavailable, SpecError
from edge_sdk.package import EnginePackage
from edge_sdk.spec import Postprocess, Preprocess, TaskName
from edge_sdk.tasks.base import Task
from edge_sdk.tensors import TensorSpec


def task_for(
    task: TaskName,
    *,
    name: str,
    version: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    preprocess: Preprocess | None = None,
    postprocess: Postprocess | None = None,
    labels: tuple[str, ...] = (),
) -> Task:
    """The task called `task` for a model with these inputs and outputs.

    Raises SpecError if the model does not suit it, BackendUnavailable where this machine lacks what the task needs.
    """
    match task:
        case "tensors":
            from edge_sdk.tasks.tensors import TensorTask

            if preprocess is not None and len(inputs) == 1 and len(inputs[0].shape) == 4 and _has_pillow():
                from edge_sdk.tasks.picture_tensors import PictureTensors

                return PictureTensors(
                    name,
                    version,
                    inputs=inputs,
                    outputs=outputs,
                    labels=labels,
                    preprocess=preprocess,
                    postprocess=postprocess or Postprocess(),
                )
            return TensorTask(name, version, inputs=inputs, outputs=outputs, labels=labels)
        case "image-classification":
            from edge_sdk.tasks.image_classification import ImageClassification
            from edge_sdk.tasks.images import check_pillow

            if preprocess is None:
                raise SpecError("The task image-classification needs a [preprocess] table.", fix="Add one.")
            if len(inputs) != 1 or len(inputs[0].shape) != 4:
                raise SpecError(
                    f"The task image-classification takes a model with one input of four axes; {name} has "
                    f"{', '.join(map(str, inputs))}.",
                    fix='Use task = "tensors".',
                )
            check_pillow()
            return ImageClassification(
                name,
                version,
                inputs=inputs,
                outputs=outputs,
                labels=labels,
                preprocess=preprocess,
                postprocess=postprocess or Postprocess(),
            )


def _has_pillow() -> bool:
    """A model that takes tensors can do without: it takes no pictures then."""
    from edge_sdk.tasks.images import check_pillow

    try:
        check_pillow()
    except BackendUnavailable:
        return False
    return True


def task_of(package: EnginePackage) -> Task:
    """The task a package was built for."""
    manifest = package.manifest
    return task_for(
        manifest.task,
        name=manifest.name,
        version=manifest.version,
        inputs=manifest.asked,
        outputs=manifest.answered,
        preprocess=manifest.preprocess,
        postprocess=manifest.postprocess,
        labels=package.labels(),
    )
