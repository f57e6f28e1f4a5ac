"""Fine-tune a vision-language model on tiled multi-camera windows: it answers how the car moved."""

from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Literal, Self

import pyarrow as pa
import torch
from torch import Tensor, nn
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from omni_cli import files
from omni_cli.config import Settings
from omni_cli.models import adapters, families, hub_files, losses, qwen_vl, tiny
from omni_cli.models.batched_vision import batch_vision
from omni_cli.recipe import (
    Batch,
    BuiltModel,
    Loss,
    Metric,
    ModelSize,
    Pair,
    Prediction,
    Program,
    Questions,
    Row,
    RunProgram,
    SplitSettings,
    Stroke,
    TrainerKind,
)
from omni_cli.recipes.vlm.answers import CONSTANT, Answers
from omni_cli.recipes.vlm.asking import questions
from omni_cli.recipes.vlm.exporting import PROBE_SEED, noise, tower_program
from omni_cli.recipes.vlm.labels import LABELS
from omni_cli.recipes.vlm.rows import SIDECAR, encode_row, kept_tokenizer, make_tokenizer, prompt_only
from omni_cli.recipes.vlm.sampling import camera_names, tiled_preprocess
from omni_cli.recipes.vlm.settings import VlmSample, VlmTrain, VlmTune
from omni_cli.samples import prompts
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.samples.dataset import WindowDataset
from omni_cli.samples.tiling import TiledPreprocess
from omni_cli.samples.windows import TableMaker
from omni_cli.scene.clock import Float64Array, Int64Array
from omni_cli.scene.recording import Recording

_PROBE_SPEEDS_MPS = (3.0, 21.5)
_GREY = 128
_SIDECAR_FORMAT = 1


class Vlm(Settings):
    """The `vlm` recipe: a Qwen-VL model, adapted or tuned in full, reads its own motion from several cameras."""

    name: ClassVar[str] = "vlm"
    export_formats: ClassVar[tuple[str, ...]] = ("hf", "onnx")
    instead_of_videos: ClassVar[str] = ""

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # hub id, folder, or tiny:FAMILY
    quantization: Literal["none", "nf4"] = "none"
    precision: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    sample: VlmSample = VlmSample()
    split: SplitSettings = SplitSettings()
    tune: VlmTune = VlmTune()
    train: VlmTrain = VlmTrain()

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
        facts = {
            "format": _SIDECAR_FORMAT,
            "tokenizer": self._encoder(preprocess).backend_tokenizer.to_str(),
            "preprocess": preprocess.model_dump(mode="json"),
            "time_step": self._time_step(preprocess),
        }
        return files.hash_json(facts)[:16]

    def encode_windows(self, windows: pa.Table, preprocess: TiledPreprocess) -> pa.Table:
        """Return input_ids, labels and position_ids of each window."""
        tokenizer, time_step = self._encoder(preprocess), self._time_step(preprocess)
        rows = [encode_row(row, preprocess, tokenizer, time_step) for row in windows.to_pylist()]
        return pa.Table.from_pylist(rows, schema=SIDECAR)

    # -- Trainable

    def build(self, preprocess: TiledPreprocess, checkpoint: Path | None = None) -> BuiltModel:
        """Build the model that learns, from its checkpoint where a fully tuned run resumes."""
        tokenizer = self.tokenizer(preprocess)
        # transformers 5.23 loads a full Qwen2.5-VL checkpoint with strict=False and matches no key: build from it.
        full_resume = checkpoint is not None and self.tune.mode == "full"
        model = self.load_base(preprocess, source=str(checkpoint) if full_resume else None)
        if self.tune.mode == "full":
            return BuiltModel(model, tokenizer)
        return BuiltModel(adapters.attach(model, self._adapter()), tokenizer)

    def size(self, preprocess: TiledPreprocess) -> ModelSize:
        """Return how large the model would be, without making one."""
        if families.is_tiny(self.model):
            config = tiny.tiny_config(families.family_of(self.model).name, self.tokenizer(preprocess))
        else:
            config = families.model_config(self.model)
        model = qwen_vl.empty_model(config)
        total = adapters.weight_count(model)
        weight_bytes = qwen_vl.weight_bytes(model, qwen_vl.DTYPES[self.precision], self.quantization)
        trainable = (
            total if self.tune.mode == "full" else adapters.trainable_count(adapters.attach(model, self._adapter()))
        )
        return ModelSize(total, trainable, weight_bytes)

    def load_base(self, preprocess: TiledPreprocess, source: str | None = None) -> Any:
        """Return the base model, or the same architecture with the weights of `source`."""
        dtype = qwen_vl.DTYPES[self.precision]
        if source is None and families.is_tiny(self.model):
            family = families.family_of(self.model).name
            drawn = tiny.tiny_model(family, self.tokenizer(preprocess), self.train.seed)
            return batch_vision(qwen_vl.place(drawn, "cpu", self.precision))
        return batch_vision(qwen_vl.load_model(source or self.model, dtype, self.quantization))

    def collate(self, rows: Sequence[Row], preprocess: TiledPreprocess) -> Batch:
        """Stack rows, padded on the right; pictures stay uint8 (n, frames, cameras, height, width, 3)."""
        ids = [row["input_ids"] for row in rows]
        pad = 0  # masked by attention_mask and labels: any id would do
        return {
            "input_ids": qwen_vl.pad_rows(ids, pad),
            "labels": qwen_vl.pad_rows([row["labels"] for row in rows], losses.IGNORED),
            "attention_mask": qwen_vl.pad_rows([torch.ones_like(row) for row in ids], 0),
            "position_ids": qwen_vl.pad_rows([row["position_ids"] for row in rows], 0).transpose(0, 1).contiguous(),
            "pictures": torch.stack([row["pictures"] for row in rows]),
        }

    def loss(self, model: nn.Module, batch: Batch, preprocess: TiledPreprocess) -> Loss:
        """Return the summed cross-entropy of the answers' tokens."""
        positions = losses.labelled_positions(batch["labels"])
        total, count = losses.token_loss(self.outputs(model, batch, preprocess), batch["labels"], positions)
        return Loss(total, count)

    def outputs(self, model: nn.Module, batch: Batch, preprocess: TiledPreprocess) -> Tensor:
        """Return the logits (rows, labelled positions, vocabulary) of a batch."""
        features = self._features(model, batch["pictures"], preprocess)
        return qwen_vl.forward_logits(model, batch, features, losses.labelled_positions(batch["labels"]))

    def trainer(self) -> TrainerKind:
        """Return TRL's SFTTrainer, told that rows are ready and nothing may be cut."""
        ready = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "packing": False}
        return TrainerKind(SFTTrainer, SFTConfig, ready)

    def save(self, built: BuiltModel, folder: Path) -> None:
        """Write the adapter's folder, or the whole model's, with the tokenizer."""
        qwen_vl.save_model(built.model, built.tokenizer, folder)

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
        """Return a hash of a local base's weights, a hub model's name, or a tiny model's seed."""
        if families.is_tiny(self.model):
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
        device = next(built.model.parameters()).device
        prompt = [prompt_only(row) for row in rows]
        ids = [ids for ids, _ in prompt]
        pad = built.tokenizer.pad_token_id
        batch = {
            "input_ids": qwen_vl.pad_rows(ids, pad, left=True).to(device),
            "attention_mask": qwen_vl.pad_rows([torch.ones_like(row) for row in ids], 0, left=True).to(device),
            "position_ids": qwen_vl.pad_rows([p for _, p in prompt], 0, left=True).transpose(0, 1).to(device),
        }
        pictures = torch.stack([row["pictures"] for row in rows]).to(device)
        with torch.no_grad():
            features = self._features(built.model, pictures, preprocess)
        most, end = FORMATS[preprocess.labels].max_tokens, prompts.ANSWER_END
        texts = qwen_vl.generate_text(built.model, built.tokenizer, batch, features, max_new_tokens=most, end=end)
        return [Prediction(text, prompts.parse_answer(preprocess.labels, text)) for text in texts]

    def prompt_row(self, pictures: Tensor, preprocess: TiledPreprocess, tokenizer: Any, start_speed_mps: float) -> Row:
        """Return a row whose answer is a placeholder, for a window that no shard holds.

        Args:
            pictures: (num_frames, cameras, cell height, cell width, 3) uint8.
            preprocess: how the window was made.
            tokenizer: of the model.
            start_speed_mps: forward speed at the first instant; told only where `preprocess.past_speed` says so.
        """
        targets = {**FORMATS[preprocess.labels].zero, "start_speed_mps": start_speed_mps}
        encoded = encode_row(targets, preprocess, tokenizer, self._time_step(preprocess))
        length = len(encoded["input_ids"])
        return {
            "input_ids": torch.tensor(encoded["input_ids"]),
            "labels": torch.tensor(encoded["labels"]),
            "position_ids": torch.tensor(encoded["position_ids"]).view(4, length),
            "pictures": pictures,
        }

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
        if families.is_tiny(self.model):
            return built, f"{self.model}, untrained: weights drawn from a seed, its answers are noise"
        return built, f"{self.model}, zero-shot: it never saw the answer's format"

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

    def probe_rows(self, built: BuiltModel, preprocess: TiledPreprocess) -> list[Row]:
        """Return two windows of noise, with an answer at every position of which a model is probed."""
        generator = torch.Generator().manual_seed(PROBE_SEED)
        windows = [noise(preprocess.window_shape, generator) for _ in _PROBE_SPEEDS_MPS]
        pairs = zip(windows, _PROBE_SPEEDS_MPS, strict=True)
        return [self.prompt_row(pictures, preprocess, built.tokenizer, speed_mps) for pictures, speed_mps in pairs]

    def choices(self, outputs: Tensor) -> Tensor:
        """Return the most likely token at each position."""
        return outputs.argmax(-1)

    def of_whole_model(self, model: str) -> Self:
        """Return this recipe with a whole, unquantised model as its base."""
        tune = self.tune.model_copy(update={"mode": "full"})
        return self.model_copy(update={"model": model, "quantization": "none", "tune": tune})

    # -- Exportable

    def programs(self, built: BuiltModel, preprocess: TiledPreprocess, batches: Sequence[int]) -> list[Program]:
        """Return the vision tower, once for each number of windows: the grid is fixed inside it."""
        return [tower_program(built.model, preprocess, batch) for batch in batches]

    def rehearse(self, built: BuiltModel, written: Sequence[Program], run: RunProgram, dtype: str) -> dict[str, float]:
        """Nothing: the tower has no state."""
        return {}

    def write_processor_files(self, folder: Path, preprocess: TiledPreprocess) -> None:
        """Write the processor's configuration, and the chat template into the tokenizer."""
        canvas_px = (preprocess.canvas_width_px, preprocess.canvas_height_px)
        family = families.FAMILIES[preprocess.vision.family]
        hub_files.write_processor_config(folder, family, canvas_px=canvas_px, num_frames=preprocess.num_frames)
        tokenizer = qwen_vl.load_tokenizer(str(folder))
        tokenizer.chat_template = prompts.chat_template(preprocess)
        tokenizer.save_pretrained(folder)

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

    # -- inside

    @property
    def _answers(self) -> Answers:
        return LABELS[self.sample.labels].answers

    def _encoder(self, preprocess: TiledPreprocess) -> Any:
        return kept_tokenizer(self.model, tuple(prompts.sample_sentences(preprocess)))

    def _features(self, model: nn.Module, pictures: Tensor, preprocess: TiledPreprocess) -> Any:
        windows = len(pictures)
        if self.train.blind:
            pictures = torch.full_like(pictures[:1], _GREY)
        dtype = qwen_vl.base_of(model).model.visual.dtype
        pixels = preprocess.pixel_values(pictures).to(dtype)
        grids = torch.tensor([preprocess.grid] * len(pictures), device=pictures.device)
        features = qwen_vl.video_features(model, pixels, grids)
        return qwen_vl.repeat_features(features, windows) if self.train.blind else features

    def _adapter(self) -> adapters.AdapterSpec:
        tune = self.tune
        return adapters.AdapterSpec(
            tune.rank, tune.alpha, tune.dropout, tune.targets, tune.mode == "dora", tune.train_merger
        )

    def _time_step(self, preprocess: TiledPreprocess) -> float:
        if preprocess.vision.family != "qwen2_5_vl":
            return 1.0
        if families.is_tiny(self.model):
            return tiny.TOKENS_PER_SECOND * preprocess.seconds_per_grid
        return float(families.model_config(self.model).vision_config.tokens_per_second) * preprocess.seconds_per_grid
