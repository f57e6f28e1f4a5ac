"""Fine-tune a vision-language model on tiled multi-camera windows: it answers how the car moved."""

from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Literal, Self

import pyarrow as pa
from pydantic import field_validator
from torch import Tensor, nn
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from omni_cli.config import Settings
from omni_cli.models import adapters, base_files, families, losses, packing, qwen_vl, shard_merge, wiring
from omni_cli.models.batched_vision import batch_vision
from omni_cli.models.drawing import SeededNoise
from omni_cli.models.drawn import draw
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
    SplitSettings,
    StockTraining,
    Stroke,
    TrainerKind,
)
from omni_cli.recipe.by_file import FileMerge
from omni_cli.recipes.vlm import decoding, generating, outlines, packed, tuning
from omni_cli.recipes.vlm.about import about_vlm
from omni_cli.recipes.vlm.answers import CONSTANT, Answers
from omni_cli.recipes.vlm.asking import questions
from omni_cli.recipes.vlm.exporting import probe_rows, write_served_files
from omni_cli.recipes.vlm.labels import LABELS
from omni_cli.recipes.vlm.rows import encode_windows, make_tokenizer, prompt_row, sidecar_key, video_token
from omni_cli.recipes.vlm.sampling import camera_names, tiled_preprocess
from omni_cli.recipes.vlm.settings import VlmSample, VlmTrain, VlmTune
from omni_cli.recipes.vlm.stock import rows_flops, stock_training
from omni_cli.samples import prompts
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.samples.windows import TableMaker
from omni_cli.scene.clock import Float64Array, Int64Array
from omni_cli.scene.recording import Recording
from omni_cli.scores.strata import Strata


class Vlm(Settings):
    """The `vlm` recipe: a Qwen-VL model, adapted or tuned in full, reads its own motion from several cameras."""

    name: ClassVar[str] = "vlm"
    export_formats: ClassVar[tuple[str, ...]] = ("hf", "onnx")
    instead_of_videos: ClassVar[str] = ""

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # hub id, folder, tiny:FAMILY, or to be measured random:HUB_ID
    quantization: Literal["none", "nf4"] = "none"
    precision: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    sample: VlmSample = VlmSample()
    split: SplitSettings = SplitSettings()
    tune: VlmTune = VlmTune()
    train: VlmTrain = VlmTrain()

    _tune = field_validator("tune")(tuning.can_be_tuned)
    _train = field_validator("train")(tuning.can_be_trained)

    # -- Sampled

    def preprocess(self) -> TiledPreprocess:
        """Return the frozen preprocessing that these settings ask for."""
        return tiled_preprocess(self.model, self.sample)

    def target_columns(self) -> tuple[pa.Field, ...]:
        """Return the columns that the labels need."""
        return LABELS[self.sample.labels].columns

    def table_maker(self) -> TableMaker:
        """Return what cuts a recording into windows with their targets."""
        sample = self.sample
        return LABELS[sample.labels].table_maker(stride=sample.stride, max_age_us=sample.max_age_us)

    def notes(self) -> tuple[str, ...]:
        """There is nothing to be told."""
        return ()

    # -- Tokenized

    @property
    def max_tokens(self) -> int:
        """A longer sample is refused, and never cut."""
        return self.train.max_tokens

    def tokenizer(self, preprocess: TiledPreprocess) -> Any:
        """Return the base model's tokenizer; a tiny model's is made from the recipe's sentences."""
        return make_tokenizer(self.model, tuple(prompts.sample_sentences(preprocess)))

    def sidecar_key(self, preprocess: TiledPreprocess) -> str:
        """Return the hash of everything that token ids depend on."""
        return sidecar_key(self.model, preprocess)

    def encode_windows(self, windows: pa.Table, preprocess: TiledPreprocess) -> pa.Table:
        """Return input_ids, labels and position_ids of each window."""
        return encode_windows(self.model, windows, preprocess)

    # -- Trainable

    def build(self, preprocess: TiledPreprocess, checkpoint: Path | None = None) -> BuiltModel:
        """Build the model that learns, from its checkpoint where a fully tuned run resumes."""
        tokenizer = self.tokenizer(preprocess)
        # transformers 5.23 loads a full Qwen2.5-VL checkpoint with strict=False and matches no key: build from it.
        full_resume = checkpoint is not None and self.tune.mode == "full"
        model = tuning.as_held(self).load_base(preprocess, source=str(checkpoint) if full_resume else None)
        return tuning.built(tuning.tuned(model, self.tune, tuning.frozen_type(self)), tokenizer, self)

    def size(self, preprocess: TiledPreprocess) -> ModelSize:
        """Return how large the model would be, without making one."""
        return tuning.size(self, outlines.empty_base(self.model, preprocess))

    def load_base(self, preprocess: TiledPreprocess, source: str | None = None) -> Any:
        """Return the base model, or the same architecture with the weights of `source`."""
        if source is None and families.is_drawn(self.model):
            how = self.train.seed, self.precision, self.quantization
            return _ready(draw(self.model, self.tokenizer(preprocess), *how))
        return _ready(qwen_vl.load_model(source or self.model, qwen_vl.DTYPES[self.precision], self.quantization))

    def collate(self, rows: Sequence[Row], preprocess: TiledPreprocess) -> Batch:
        """Lay rows one after the other; pictures stay uint8 (n, frames, cameras, height, width, 3)."""
        return packed.collate(rows, preprocess, video_token(self.model, preprocess))

    def loss(self, model: nn.Module, batch: Batch, preprocess: TiledPreprocess) -> Loss:
        """Return the summed cross-entropy of the answers' tokens."""
        positions = losses.labelled_positions(batch["labels"])
        total, count = losses.token_loss(self.outputs(model, batch, preprocess), batch["labels"], positions)
        return Loss(total, count)

    def outputs(self, model: nn.Module, batch: Batch, preprocess: TiledPreprocess) -> Tensor:
        """Return the logits (labelled tokens of all rows, vocabulary) of a batch."""
        with tuning.computing(self, model):
            features = self._features(model, batch["pictures"], preprocess)
            return qwen_vl.forward_logits(model, batch, features, losses.labelled_positions(batch["labels"]))

    def self_test(self, built: BuiltModel, dataset: WindowDataset) -> str:
        """Return one line on packed windows against windows alone; empty where none are packed.

        Raises:
            OmniError: they see each other.
        """
        return packed.self_test(self, built.model, dataset)

    def trainer(self) -> TrainerKind:
        """Return TRL's SFTTrainer, told that rows are ready and nothing may be cut."""
        ready = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "packing": False}
        return TrainerKind(SFTTrainer, SFTConfig, ready, tuning.cut(self.precision))

    def save(self, built: BuiltModel, folder: Path) -> None:
        """Write the adapter's folder, or the whole model's, with the tokenizer."""
        qwen_vl.save_model(built.model, built.tokenizer, folder, tuning.written_type(self))

    def load(self, preprocess: TiledPreprocess, folder: Path) -> BuiltModel:
        """Load trained weights: the whole model, or the base with its adapter."""
        tokenizer = qwen_vl.load_tokenizer(str(folder))
        if self.tune.mode == "full":
            return BuiltModel(self.load_base(preprocess, source=str(folder)).eval(), tokenizer)
        return BuiltModel(adapters.load(self.load_base(preprocess), folder, self._adapter()).eval(), tokenizer)

    def medians(self, rows: Sequence[Row]) -> dict[str, float | tuple[float, ...]]:
        """Return the median of each number that an answer states."""
        return self._answers.medians(rows)

    def base_fingerprint(self) -> str:
        """Return a hash of a local base's weights, a hub model's name, or the seed of one that is drawn."""
        if families.is_drawn(self.model):
            return f"{self.model} seed {self.train.seed}"
        return qwen_vl.weights_fingerprint(self.model)

    # -- Evaluable

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Errors of what an answer states."""
        return self._answers.metrics

    @property
    def reference(self) -> str:
        """The train set's median of each number."""
        return CONSTANT

    def errors(
        self, predictions: Sequence[Prediction], rows: Sequence[Row], medians: Mapping[str, Any]
    ) -> dict[str, Float64Array]:
        """Return the errors; an answer that could not be read counts as the median."""
        return self._answers.errors(predictions, rows, medians)

    def baselines(self, rows: Sequence[Row], medians: Mapping[str, Any]) -> dict[str, list[Prediction]]:
        """Return the median, and the car that goes on as it did."""
        return self._answers.baselines(rows, medians, past_speed=self.sample.past_speed)

    def pairs(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> tuple[Pair, ...]:
        """Return numbers as predicted and as they were."""
        return self._answers.pairs(predictions, rows)

    def predict(self, built: BuiltModel, rows: Sequence[Row], preprocess: TiledPreprocess) -> list[Prediction]:
        """Answer each window greedily from its pictures and prompt."""
        return generating.answers(built, rows, preprocess, self._features)

    def held_to_format(self, built: BuiltModel, preprocess: TiledPreprocess) -> BuiltModel:
        """Return the model so that each of its answers can be read."""
        return generating.held_to_format(built, preprocess)

    def strata(self, rows: Sequence[Row]) -> tuple[Strata, ...]:
        """Return windows by manoeuvre and by speed."""
        return self._answers.strata(rows)

    def draw(
        self,
        built: BuiltModel,
        rows: Sequence[Row],
        preprocess: TiledPreprocess,
        seeds: Sequence[int],
        temperature: float,
    ) -> list[Prediction]:
        """Answer each window by chance."""
        return generating.answers(built, rows, preprocess, self._features, (SeededNoise(seeds, temperature),))

    def drawn_metrics(self, count: int) -> dict[str, Metric]:
        """Return how the best of several drawn answers is scored."""
        return self._answers.drawn_metrics(count)

    def prompt_row(self, pictures: Tensor, preprocess: TiledPreprocess, tokenizer: Any, start_speed_mps: float) -> Row:
        """Return a row whose answer is a placeholder, for a window that no shard holds.

        Args:
            pictures: (num_frames, cameras, cell height, cell width, 3) uint8.
            preprocess: how the window was made.
            tokenizer: of the model.
            start_speed_mps: forward speed at the first instant; told only where `preprocess.past_speed` says so.
        """
        return prompt_row(self.model, pictures, preprocess, tokenizer, start_speed_mps)

    # -- Inferable

    def questions(self, recording: Recording, built: BuiltModel, preprocess: TiledPreprocess, stride: int) -> Questions:
        """Return the windows of a recording or a mosaic.

        Raises:
            DataError: a camera is missing, no window is left, or the speed that the prompt tells is not known.
        """
        make_row = partial(self.prompt_row, preprocess=preprocess, tokenizer=built.tokenizer)
        chosen = recording, preprocess, stride, self.sample.max_age_us
        return questions(*chosen, make_row=make_row, tell_truth=self._answers.truth)

    def caption(self, values: Mapping[str, Any] | None, at: int = -1) -> str:
        """Return an answer in one line."""
        return self._answers.caption(values)

    def plain(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return an answer as JSON knows it."""
        return self._answers.plain(values)

    def speaks_for(self, instants_us: Int64Array, spoken_us: Set[int]) -> Sequence[int]:
        """Every instant, or the last one where a path begins there; where windows overlap, the latest speaks."""
        return self._answers.spoken_at(len(instants_us))

    def strokes(
        self, recording: Recording, values: Mapping[str, Any], at: int, at_us: int, instant_us: int
    ) -> tuple[Stroke, ...]:
        """Return a path on the road, where an answer tells of one."""
        return self._answers.strokes(recording, camera_names(self.sample.cameras)[0], values, (at_us, instant_us))

    def load_base_to_ask(self, preprocess: TiledPreprocess) -> tuple[BuiltModel, str]:
        """Return the base model as it is, and what that means for its answers."""
        built = BuiltModel(self.load_base(preprocess).eval(), self.tokenizer(preprocess))
        return built, generating.untrained(self.model)

    def place(self, built: BuiltModel, device: str, dtype: str | None) -> BuiltModel:
        """Move the model to a device, its weights to another type where one is named."""
        return BuiltModel(qwen_vl.place(built.model, device, dtype), built.tokenizer)

    # -- Mergeable

    def load_to_merge(self, preprocess: TiledPreprocess, folder: Path) -> BuiltModel:
        """Load an adapter over a fresh base that is not quantised."""
        return self.model_copy(update={"quantization": "none"}).load(preprocess, folder)

    def adapter_disabled(self, built: BuiltModel) -> AbstractContextManager[None]:
        """Return a context in which the model is its base."""
        return adapters.disabled(built.model)

    def merge(self, built: BuiltModel) -> BuiltModel:
        """Fold the adapter into its base; the adapted model is used up."""
        return BuiltModel(adapters.merge(built.model), built.tokenizer)

    def merge_files(self, preprocess: TiledPreprocess, adapter: Path, work: Path) -> FileMerge:
        """Return the merge of an adapter into its base's own files; a tiny model's are written first."""
        if not families.is_tiny(self.model):
            return shard_merge.plan(base_files.find(self.model), adapter)
        whole = self.of_whole_model(self.model)
        qwen_vl.save_model(whole.load_base(preprocess), whole.tokenizer(preprocess), work)
        return shard_merge.plan(work, adapter)

    def probe_rows(self, built: BuiltModel, preprocess: TiledPreprocess) -> list[Row]:
        """Return two windows of noise, with an answer at every position of which a model is probed."""
        return probe_rows(self, built, preprocess)

    def choices(self, outputs: Tensor) -> Tensor:
        """Return the most likely token at each position."""
        return outputs.argmax(-1)

    def of_whole_model(self, model: str) -> Self:
        """Return this recipe with a whole, unquantised model as its base."""
        tune = self.tune.model_copy(update={"mode": "full"})
        return self.model_copy(update={"model": model, "quantization": "none", "tune": tune})

    def about(self, preprocess: TiledPreprocess, form: str, source: str) -> About:
        """Return what a model card tells of its models."""
        return about_vlm(preprocess, self.model, self.tune, form, source)

    # -- Exportable

    def programs(self, built: BuiltModel, preprocess: TiledPreprocess, batches: Sequence[int]) -> list[Program]:
        """Return the tower, for each number of windows where the grid is fixed inside it, and the language model."""
        return decoding.programs(self, built, preprocess, batches)

    def rehearse(
        self, built: BuiltModel, preprocess: TiledPreprocess, written: Sequence[Program], run: RunProgram, dtype: str
    ) -> Rehearsed:
        """Answer with the programs, and compare all that they say with what the model says."""
        return decoding.rehearse(self, built, preprocess, written, run, dtype=dtype)

    def write_processor_files(self, folder: Path, preprocess: TiledPreprocess) -> None:
        """Write what other tools read beside the weights."""
        write_served_files(folder, preprocess)

    # -- Benchable

    def core(self, built: BuiltModel) -> nn.Module:
        """Return the model: each of its forward passes gives every row of a batch a token."""
        core: nn.Module = qwen_vl.base_of(built.model)
        return core

    def answer_units(self, forwards: int, preprocess: TiledPreprocess) -> dict[str, float]:
        """Return the tokens of an answer."""
        return {"tokens": forwards}

    def sample_units(self, dataset: WindowDataset) -> dict[str, float]:
        """Return the tokens of a sample in the mean."""
        return {"tokens": mean(dataset.token_lengths())}

    # -- Outlined

    def outline(self, preprocess: TiledPreprocess) -> nn.Module:
        """Return the model as it learns, of shapes alone."""
        return outlines.outline(self.model, self.precision, self.tune, preprocess, ready=_ready)

    def outline_batch(self, model: nn.Module, preprocess: TiledPreprocess) -> Batch:
        """Return a batch of equal windows whose pictures have no storage."""
        return outlines.outline_batch(self.model, model, self.train.batch_size, preprocess)

    # -- Comparable

    def stock(self, built: BuiltModel, preprocess: TiledPreprocess) -> StockTraining:
        """Return TRL's own training of what was built."""
        kind = self.model, self.precision, self.quantization
        return stock_training(built, preprocess, kind, self.tune, self.train.seed)

    def step_flops(self, built: BuiltModel, rows: Sequence[Row], preprocess: TiledPreprocess) -> float:
        """Return the operations by the rule of `models/flops.py`."""
        return rows_flops(built.model, rows, preprocess)

    # -- inside

    @property
    def _answers(self) -> Answers:
        return LABELS[self.sample.labels].answers

    def _features(self, model: nn.Module, pictures: Tensor, preprocess: TiledPreprocess) -> Any:
        return packed.features(model, pictures, preprocess, is_blind=self.train.blind)

    def _adapter(self) -> adapters.AdapterSpec:
        return tuning.adapter_spec(self.tune)


def _ready(model: Any) -> Any:
    return packing.attend_by_sample(batch_vision(wiring.freeze_unread(model)))
