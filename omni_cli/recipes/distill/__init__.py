"""Teach an openpilot-shaped model to drive: from route logs to a vision net and a policy that can take its place."""

from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from omni_cli.config import Settings
from omni_cli.formats.physical_ai_av import expand_cameras
from omni_cli.models import adapters, backbones, driving_losses, driving_net, families, qwen_vl
from omni_cli.recipe import (
    About,
    Batch,
    BuiltModel,
    Loss,
    Metric,
    ModelSize,
    Pair,
    Prediction,
    Program,
    Questions,
    Rehearsed,
    Row,
    RunProgram,
    Stroke,
    TrainerKind,
)
from omni_cli.recipes.distill import answers, drawing, exporting, rows
from omni_cli.recipes.distill.about import about_student
from omni_cli.recipes.distill.sampling import driving_preprocess, questions
from omni_cli.recipes.distill.settings import DistillSample, DistillSplit, DistillTrain, DistillTune
from omni_cli.recipes.distill.teaching import labeller, program_files, teacher_notes
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.driving_windows import StepFilters, driving_tables, driving_windows
from omni_cli.samples.model_steps import ModelFramePreprocess
from omni_cli.samples.step_labels import MOTION
from omni_cli.samples.tables import STEP_COLUMNS
from omni_cli.samples.windows import TableMaker
from omni_cli.scene.clock import Float64Array, Int64Array
from omni_cli.scene.recording import Recording
from omni_cli.scores.strata import Strata

_NEVER_DROVE = (
    "the base never learned to drive, its policy is drawn from a seed: an adapter on it learns little; train one in "
    "full first, and name it with --set model=RUN/final"
)
# Planes of a packed picture that is mid grey: BT.601, limited range. 128 throughout would be zero to a net, and its
# first layer could not learn.
_GREY = (126, 126, 126, 126, 128, 128)


class Distill(Settings):
    """The `distill` recipe: a student learns a path from two model frames and its memory of five seconds."""

    name: ClassVar[str] = "distill"
    export_formats: ClassVar[tuple[str, ...]] = ("onnx",)
    instead_of_videos: ClassVar[str] = "the id of a recording, whose calibration it looks through"

    model: str = "microsoft/resnet-18"  # a vision backbone (hub id, folder, or tiny:FAMILY), or a student's folder
    hypotheses: int = 5  # paths that the policy states
    hidden: int = 512  # width of the memory
    precision: Literal["bfloat16", "float16", "float32"] = "float32"  # of the arithmetic on a GPU; weights are float32
    sample: DistillSample = DistillSample()
    split: DistillSplit = DistillSplit()
    tune: DistillTune = DistillTune()
    train: DistillTrain = DistillTrain()

    def unheeded(self) -> Mapping[str, str]:
        """Of a student that is named: its shape, which its folder says."""
        why = f"has no effect where model = {self.model}, a student that has its own; leave it out"
        return dict.fromkeys(("hypotheses", "hidden"), why) if self._is_student else {}

    # -- Sampled

    def preprocess(self) -> ModelFramePreprocess:
        """Return the frozen preprocessing that these settings ask for."""
        return driving_preprocess(self.sample)

    def target_columns(self) -> tuple[pa.Field, ...]:
        """Return the columns of the steps of each window."""
        return STEP_COLUMNS

    def table_maker(self) -> TableMaker:
        """Return what cuts a recording into windows of steps and asks the teacher.

        Raises:
            UsageError: ONNX files are not here.
            DataError: they are no driving model that is known.
        """
        sample = self.sample
        filters = StepFilters(sample.require_calibrated, sample.require_fix)
        label = labeller(sample.teacher, sample.teacher_device)
        stride, max_age_us = sample.stride, sample.max_age_us
        choose = partial(driving_windows, stride=stride, max_age_us=max_age_us)
        cut = partial(driving_tables, stride=stride, max_age_us=max_age_us, filters=filters, label=label)
        return TableMaker(choose, cut)

    def notes(self) -> tuple[str, ...]:
        """Open the teacher, and say what runs where, and where a split by time leaks.

        Raises:
            UsageError: its files or ONNX Runtime are not here.
            DataError: its files are no driving model that is known.
            OmniError: the device asked for does not start.
        """
        teacher = self.sample.teacher
        return *teacher_notes(teacher, self.sample.teacher_device), *self.split.notes(teacher)

    # -- Trainable

    def build(self, preprocess: ModelFramePreprocess, checkpoint: Path | None = None) -> BuiltModel:
        """Build the student that learns; heads without labels stay as they are."""
        model, notes = self._tuned(self._base())
        return BuiltModel(model, None, notes)

    def size(self, preprocess: ModelFramePreprocess) -> ModelSize:
        """Return how large the student would be, without making one."""
        net = self._empty()
        total = adapters.weight_count(net)
        model, notes = self._tuned(net)
        held = total * torch.float32.itemsize
        return ModelSize(total, adapters.trainable_count(model), held, held, notes)

    def collate(self, rows_: Sequence[Row], preprocess: ModelFramePreprocess) -> Batch:
        """Stack rows; pictures stay uint8 (b, n + 1, 2, 6, 128, 256)."""
        return rows.collate(rows_, preprocess.steps, self.train.warmup_steps)

    def loss(self, model: nn.Module, batch: Batch, preprocess: ModelFramePreprocess) -> Loss:
        """Return the summed losses of the steps that count."""
        seen, plans = self._unroll(model, batch)
        points = batch["target_points"].flatten()
        parts = driving_losses.plan_losses(plans, batch["target_xy_m"].flatten(0, 1), points)
        total = parts["plan"].total + self.train.choice_weight * parts["plan_choice"].total
        if "scene_is_known" in batch:
            scene = driving_losses.vision_losses(seen, rows.vision_labels(batch))
            parts |= scene
            total = total + self.train.scene_weight * sum(one.total for one in scene.values())
        return Loss(total, parts["plan"].count, {name: one.total for name, one in parts.items()})

    def trainer(self) -> TrainerKind:
        """Return transformers' own Trainer."""
        return TrainerKind(Trainer, TrainingArguments, {})

    def save(self, built: BuiltModel, folder: Path) -> None:
        """Write the adapter's folder, or the whole student's."""
        rows.save_student(built.model, folder)

    def load(self, preprocess: ModelFramePreprocess, folder: Path) -> BuiltModel:
        """Load a trained student: the whole one, or the base with its adapter."""
        if self.tune.mode == "full":
            return BuiltModel(driving_net.load_net(folder).eval(), None)
        net = self._labelled(self._base())
        return BuiltModel(adapters.load(net, folder, self._adapter(net)).eval(), None)

    def medians(self, rows_: Sequence[Row]) -> dict[str, tuple[float, ...]]:
        """Return the median path driven, and the median lanes where the teacher tells of them."""
        return answers.medians(rows_, self.train.warmup_steps)

    def base_fingerprint(self) -> str:
        """Return a hash of a folder's weights or programs, a hub model's name, or a tiny backbone's seed."""
        shape = f"{self.hypotheses} hypotheses, hidden {self.hidden}, seed {self.train.seed}"
        if families.is_tiny(self.model):
            return f"{self.model}, {shape}, {driving_net.FIRST_WEIGHTS}"
        if driving_net.has_programs(Path(self.model)):
            return driving_net.programs_fingerprint(Path(self.model))
        found = qwen_vl.weights_fingerprint(self.model)
        return found if self._is_student else f"{found}, {shape}, {driving_net.FIRST_WEIGHTS}"

    # -- Evaluable

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Displacement errors, the fit of the predicted scales, and lanes where the teacher knows them."""
        return answers.metrics(has_scene=self._has_scene)

    @property
    def reference(self) -> str:
        """The car that keeps its true speed, straight on."""
        return answers.CONSTANT_VELOCITY

    def predict(self, built: BuiltModel, rows_: Sequence[Row], preprocess: ModelFramePreprocess) -> list[Prediction]:
        """Plan at every step of each window."""
        device = next(built.model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self.collate(rows_, preprocess).items()}
        with torch.no_grad():
            seen, plans = self._unroll(built.model, batch)
        return rows.predictions(seen, plans, len(rows_), has_scene=self._has_scene)

    def errors(
        self, predictions: Sequence[Prediction], rows_: Sequence[Row], medians: Mapping[str, Any]
    ) -> dict[str, Float64Array]:
        """Return the errors of each window in the mean over its steps that count, if an answer speaks of them all."""
        return answers.errors(self.metrics, predictions, rows_, self.train.warmup_steps)

    def baselines(self, rows_: Sequence[Row], medians: Mapping[str, Any]) -> dict[str, list[Prediction]]:
        """Return constant velocity, constant curvature, the median drive, and the teacher where it is not the car."""
        return answers.baselines(rows_, medians, has_teacher=self._has_scene)

    def strata(self, rows_: Sequence[Row]) -> tuple[Strata, ...]:
        """Return windows by manoeuvre and by speed."""
        return answers.strata(rows_)

    def pairs(self, predictions: Sequence[Prediction], rows_: Sequence[Row]) -> tuple[Pair, ...]:
        """Return where the car is after two seconds."""
        return answers.pairs(predictions, rows_, self.train.warmup_steps)

    # -- Inferable

    def load_base_to_ask(self, preprocess: ModelFramePreprocess) -> tuple[BuiltModel, str]:
        """Return the base, which never learned to drive unless it is a student."""
        note = (
            "a student as it is" if self._is_student else "untrained: its policy is drawn from a seed, plans are noise"
        )
        return BuiltModel(self._base().eval(), None), f"{self.model}, {note}"

    def place(self, built: BuiltModel, device: str, dtype: str | None) -> BuiltModel:
        """Move the student to a device, its weights to another type where one is named."""
        return BuiltModel(qwen_vl.place(built.model, device, dtype), None)

    def questions(
        self, recording: Recording, built: BuiltModel, preprocess: ModelFramePreprocess, stride: int
    ) -> Questions:
        """Return the windows of a calibrated recording.

        Raises:
            DataError: a camera or its calibration is missing, or no window is left.
        """
        return questions(recording, preprocess, stride, self.sample.max_age_us)

    def caption(self, values: Mapping[str, Any] | None, at: int = -1) -> str:
        """Return `in 2 s 23.1 m ahead, 0.4 m left` for the step that ends at an instant."""
        return drawing.caption(values, at)

    def plain(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values as JSON knows them; what is not known is null."""
        return drawing.plain(values)

    def speaks_for(self, instants_us: Int64Array, spoken_us: Set[int]) -> Sequence[int]:
        """The ends of its steps that no window speaks for: where windows overlap, the earlier has the longer memory."""
        return [at for at in range(1, len(instants_us)) if int(instants_us[at]) not in spoken_us]

    def strokes(
        self, recording: Recording, values: Mapping[str, Any], at: int, at_us: int, instant_us: int
    ) -> Sequence[Stroke]:
        """Return the plan, lanes, edges and leads of the step that ends at an instant."""
        return drawing.strokes(recording, expand_cameras(self.sample.cameras)[0], values, at, at_us)

    # -- Mergeable

    def load_to_merge(self, preprocess: ModelFramePreprocess, folder: Path) -> BuiltModel:
        """Load a student over a fresh base."""
        return self.load(preprocess, folder)

    def adapter_disabled(self, built: BuiltModel) -> AbstractContextManager[None]:
        """Return a context in which the student is its base."""
        return adapters.disabled(built.model)

    def merge(self, built: BuiltModel) -> BuiltModel:
        """Fold the adapter into its base; the adapted student is used up."""
        return BuiltModel(adapters.merge(built.model).eval(), None)

    def of_whole_model(self, model: str) -> Self:
        """Return this recipe with a whole student as its base."""
        return self.model_copy(update={"model": model, "tune": self.tune.model_copy(update={"mode": "full"})})

    def about(self, preprocess: ModelFramePreprocess, form: str, source: str) -> About:
        """Return what a model card tells of its models."""
        return about_student(self.model, form, source)

    def probe_rows(self, built: BuiltModel, preprocess: ModelFramePreprocess) -> list[Row]:
        """Return two windows of noise."""
        return rows.noise_rows(preprocess)

    def outputs(self, model: nn.Module, batch: Batch, preprocess: ModelFramePreprocess) -> Tensor:
        """Return everything that the student says at each step (b, n, numbers), the plans' scores last."""
        seen, plans = self._unroll(model, batch)
        parts = [*seen, plans.mean_m, plans.log_scale, plans.logit]
        flat = torch.cat([part.flatten(1) for part in parts], dim=1)
        return flat.view(-1, preprocess.steps, flat.shape[1])

    def choices(self, outputs: Tensor) -> Tensor:
        """Return which plan is taken at each step."""
        return outputs[..., -rows.num_hypotheses(outputs.shape[-1]) :].argmax(-1)

    # -- Exportable

    def programs(self, built: BuiltModel, preprocess: ModelFramePreprocess, batches: Sequence[int]) -> list[Program]:
        """Return the vision net and the policy in the real models' place; of several batch sizes, any."""
        return exporting.programs(exporting.whole(built.model), batches, self.model)

    def rehearse(
        self,
        built: BuiltModel,
        preprocess: ModelFramePreprocess,
        written: Sequence[Program],
        run: RunProgram,
        dtype: str,
    ) -> Rehearsed:
        """Drive fifty steps with the programs and with the student.

        Raises:
            OmniError: they part too far.
        """
        return Rehearsed(exporting.rehearse(exporting.whole(built.model), run, written[0].batch or 1, dtype))

    def write_processor_files(self, folder: Path, preprocess: ModelFramePreprocess) -> None:
        """Write nothing: a student is exported as ONNX, whose files say what they are."""

    # -- Benchable

    def core(self, built: BuiltModel) -> nn.Module:
        """Return the student: one forward pass plans at every step of a window."""
        return built.model

    def answer_units(self, forwards: int, preprocess: ModelFramePreprocess) -> dict[str, float]:
        """Return the steps of an answer."""
        return {"steps": preprocess.steps}

    def sample_units(self, dataset: WindowDataset) -> dict[str, float]:
        """Return the steps of a sample."""
        return {"steps": float(dataset.preprocess.num_frames - 1)}

    # -- Taught

    def teacher_files(self) -> tuple[Path, ...]:
        """Return the teacher's ONNX files.

        Raises:
            UsageError: the teacher is no program, or its files are not named or not there.
        """
        return program_files(self.sample.teacher)

    # -- inside

    @property
    def _has_scene(self) -> bool:
        """Whether the teacher tells of the road, and is not the car itself."""
        return self.sample.teacher != MOTION

    @property
    def _is_student(self) -> bool:
        return driving_net.is_net_folder(Path(self.model))

    def _labelled(self, net: driving_net.DrivingNet) -> driving_net.DrivingNet:
        """Freeze what the teacher does not tell of, or what weighs nothing."""
        learns = self._has_scene and self.train.scene_weight > 0
        net.freeze_heads(tuple(net.vision.heads) if learns else ())
        return net

    def _tuned(self, net: driving_net.DrivingNet) -> tuple[nn.Module, tuple[str, ...]]:
        """Let learn what the settings say, all that has labels or an adapter, and note what no adapter can sit on."""
        labelled = self._labelled(net)
        if self.tune.mode == "full":
            return labelled, ()
        notes = () if self.tune.targets else adapters.left_out_notes(labelled)  # else the user left out what they did
        notes += () if self._is_student else (_NEVER_DROVE,)
        return adapters.attach(labelled, self._adapter(labelled)), notes

    def _adapter(self, net: driving_net.DrivingNet) -> adapters.AdapterSpec:
        tune = self.tune
        return adapters.AdapterSpec(
            tune.rank,
            tune.alpha,
            tune.dropout,
            tune.targets or tuple(adapters.driving_targets(net)),
            use_dora=tune.mode == "dora",
            place=adapters.DRIVING_NET,
            rank_stabilised=tune.rank_stabilised,
        )

    def _base(self) -> driving_net.DrivingNet:
        if self._is_student:
            return driving_net.load_net(Path(self.model))
        return driving_net.new_net(self.model, num_hypotheses=self.hypotheses, hidden=self.hidden, seed=self.train.seed)

    def _empty(self) -> driving_net.DrivingNet:
        if self._is_student:
            return driving_net.load_net(Path(self.model))
        config = driving_net.DrivingNetConfig(backbones.planned_config(self.model), self.hypotheses, self.hidden)
        return driving_net.empty_net(config)

    def _unroll(self, model: nn.Module, batch: Batch) -> tuple[driving_net.VisionOutputs, driving_net.Plans]:
        pictures = batch["pictures"]
        if self.train.blind:
            pictures = pictures.new_tensor(_GREY).view(-1, 1, 1).expand_as(pictures)
        unrolled: tuple[driving_net.VisionOutputs, driving_net.Plans] = model(
            pictures, batch["desire_pulse"], batch["traffic_convention"]
        )
        return unrolled
