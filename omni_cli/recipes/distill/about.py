"""What a model card tells of a driving student."""

from omni_cli.models import families
from omni_cli.recipe import About, Loading

_LICENCES = {"microsoft/resnet-18": "apache-2.0"}  # as the model cards of the hub repositories state them
_PROGRAM = """\
import onnxruntime

session = onnxruntime.InferenceSession("{source}/driving_vision.onnx")
print([(one.name, one.shape) for one in session.get_inputs()])"""


def about_student(model: str, form: str, source: str) -> About:
    """Return what is told of a model of the recipe `distill`.

    Args:
        model: its base, as the settings name it.
        form: of the folder.
        source: the folder, or its name on a hub.
    """
    base, revision = ("", None) if families.is_local(model) else families.split_revision(model)
    told = f"{base}, revision {revision}" if revision else base
    loading = Loading("ONNX Runtime", "python", _PROGRAM.format(source=source))
    return About(
        does="It states the path that a car would drive, from two model frames and its memory of five seconds.",
        base=base,
        base_told=told or "weights that are not published here",
        licence=_LICENCES.get(base, ""),
        task="robotics",
        library="onnx" if form == "onnx" else "omni",
        asked="",
        answered="",
        loading=(loading,) if form == "onnx" else (),
    )
