"""Fine-tune a vision-language model on tiled multi-camera windows: it answers how the car moved."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pyarrow as pa
import torch
from torch import Tensor, nn
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from omni_cli import files
from omni_cli.config import Settings
from omni_cli.errors import UsageError
from omni_cli.formats import video
from omni_cli.formats.physical_ai_av import CAMERA_SETS, expand_cameras
from omni_cli.models import adapters, families, hub_files, losses, qwen_vl, rope, tiny, vision_tower
from omni_cli.models.batched_vision import batch_vision
from omni_cli.recipe import (
    Batch,
    BuiltModel,
    ExportedPart,
    Loss,
    Prediction,
    Quantity,
    Row,
    SampleSettings,
    SplitSettings,
    TrainerKind,
    TrainSettings,
    TuneSettings,
)
from omni_cli.samples import prompts
from omni_cli.samples.preprocess import Preprocess, VisionGrid, fit_canvas
from omni_cli.samples.tables import EGO_MOTION_COLUMNS
from omni_cli.samples.windows import TableMaker, ego_motion_tables

_QUANTITIES = {
    "mean_speed_mps": Quantity("mean_speed_mps", "speed", "m/s"),
    "displacement_m": Quantity("displacement_m", "displacement", "m"),
}
_GREY = 128
_MAX_CAMERAS = 9  # of a 3x3 grid
_MAX_ANSWER_TOKENS = 96
_SIDECAR_FORMAT = 1
SIDECAR = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("labels", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("position_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),  # 4 x length
    ]
)


class Vlm(Settings):
    """The `vlm` recipe: a Qwen-VL model, adapted or tuned in full, reads its own motion from several cameras."""

    name: ClassVar[str] = "vlm"

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # hub id, folder, or tiny:FAMILY
    quantization: Literal["none", "nf4"] = "none"
    precision: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    sample: SampleSettings = SampleSettings()
    split: SplitSettings = SplitSettings()
    tune: TuneSettings = TuneSettings()
    train: TrainSettings = TrainSettings()

    # -- Sampled

    def preprocess(self) -> Preprocess:
        """Return the frozen preprocessing that these settings ask for."""
        sample, vision = self.sample, _vision_grid(families.family_of(self.model))
        cameras = camera_names(sample.cameras)
        columns = math.ceil(math.sqrt(len(cameras)))
        rows = math.ceil(len(cameras) / columns)
        width, height = fit_canvas(sample.canvas_px, sample.aspect * columns / rows, vision)
        return Preprocess(
            cameras=cameras,
            columns=columns,
            canvas_width_px=width,
            canvas_height_px=height,
            num_frames=sample.window,
            rate_hz=sample.rate_hz,
            labels=sample.labels,
            past_speed=sample.past_speed,
            decoder=sample.decoder,
            decoder_id=video.decoder_id(sample.decoder),
            vision=vision,
        )

    def target_columns(self) -> tuple[pa.Field, ...]:
        """Return the columns of the ego motion over each window."""
        return EGO_MOTION_COLUMNS

    def table_maker(self) -> TableMaker:
        """Return what cuts a recording into windows with their ego motion."""
        max_age_us = round(self.sample.max_age_ms * 1000)
        return partial(ego_motion_tables, stride=self.sample.stride, max_age_us=max_age_us)

    # -- Tokenized

    def tokenizer(self, preprocess: Preprocess) -> Any:
        """Return the base model's tokenizer; a tiny model's is made from the recipe's sentences."""
        return _make_tokenizer(self.model, tuple(prompts.sample_sentences(preprocess)))

    def sidecar_key(self, preprocess: Preprocess) -> str:
        """Return the hash of everything that token ids depend on."""
        facts = {
            "format": _SIDECAR_FORMAT,
            "tokenizer": self._encoder(preprocess).backend_tokenizer.to_str(),
            "preprocess": preprocess.model_dump(mode="json"),
            "time_step": self._time_step(preprocess),
        }
        return files.hash_json(facts)[:16]

    def encode_windows(self, windows: pa.Table, preprocess: Preprocess) -> pa.Table:
        """Return input_ids, labels and position_ids of each window."""
        tokenizer, time_step = self._encoder(preprocess), self._time_step(preprocess)
        rows = [_encode(row, preprocess, tokenizer, time_step) for row in windows.to_pylist()]
        return pa.Table.from_pylist(rows, schema=SIDECAR)

    # -- Trainable

    def build(self, preprocess: Preprocess, checkpoint: Path | None = None) -> BuiltModel:
        """Build the model that learns, from its checkpoint where a fully tuned run resumes."""
        tokenizer = self.tokenizer(preprocess)
        # transformers 5.23 loads a full Qwen2.5-VL checkpoint with strict=False and matches no key: build from it.
        full_resume = checkpoint is not None and self.tune.mode == "full"
        model = self.load_base(preprocess, source=str(checkpoint) if full_resume else None)
        if self.tune.mode == "full":
            return BuiltModel(model, tokenizer)
        return BuiltModel(adapters.attach(model, self._adapter()), tokenizer)

    def size(self, preprocess: Preprocess) -> tuple[int, int, int]:
        """Return how many weights there are, how many learn, and the bytes of all, without making one."""
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
        return total, trainable, weight_bytes

    def load_base(self, preprocess: Preprocess, source: str | None = None) -> Any:
        """Return the base model, or the same architecture with the weights of `source`."""
        dtype = qwen_vl.DTYPES[self.precision]
        if source is None and families.is_tiny(self.model):
            family = families.family_of(self.model).name
            drawn = tiny.tiny_model(family, self.tokenizer(preprocess), self.train.seed)
            return batch_vision(qwen_vl.place(drawn, "cpu", self.precision))
        return batch_vision(qwen_vl.load_model(source or self.model, dtype, self.quantization))

    def collate(self, rows: Sequence[Row], preprocess: Preprocess) -> Batch:
        """Stack rows, padded on the right; pictures stay uint8 (n, frames, height, width, 3)."""
        ids = [row["input_ids"] for row in rows]
        pad = 0  # masked by attention_mask and labels: any id would do
        return {
            "input_ids": qwen_vl.pad_rows(ids, pad),
            "labels": qwen_vl.pad_rows([row["labels"] for row in rows], losses.IGNORED),
            "attention_mask": qwen_vl.pad_rows([torch.ones_like(row) for row in ids], 0),
            "position_ids": qwen_vl.pad_rows([row["position_ids"] for row in rows], 0).transpose(0, 1).contiguous(),
            "canvases": torch.stack([row["canvases"] for row in rows]),
        }

    def loss(self, model: nn.Module, batch: Batch, preprocess: Preprocess) -> Loss:
        """Return the summed cross-entropy of the answers' tokens."""
        positions = losses.labelled_positions(batch["labels"])
        total, count = losses.token_loss(self.logits(model, batch, preprocess), batch["labels"], positions)
        return Loss(total, count)

    def logits(self, model: nn.Module, batch: Batch, preprocess: Preprocess) -> Tensor:
        """Return the logits (rows, labelled positions, vocabulary) of a batch."""
        features = self._features(model, batch["canvases"], preprocess)
        return qwen_vl.forward_logits(model, batch, features, losses.labelled_positions(batch["labels"]))

    def trainer(self) -> TrainerKind:
        """Return TRL's SFTTrainer, told that rows are ready and nothing may be cut."""
        ready = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "packing": False}
        return TrainerKind(SFTTrainer, SFTConfig, ready)

    def save(self, built: BuiltModel, folder: Path) -> None:
        """Write the adapter's folder, or the whole model's, with the tokenizer."""
        qwen_vl.save_model(built.model, built.tokenizer, folder)

    def load(self, preprocess: Preprocess, folder: Path) -> BuiltModel:
        """Load trained weights: the whole model, or the base with its adapter."""
        tokenizer = qwen_vl.load_tokenizer(str(folder))
        if self.tune.mode == "full":
            return BuiltModel(self.load_base(preprocess, source=str(folder)).eval(), tokenizer)
        return BuiltModel(adapters.load(self.load_base(preprocess), folder, self._adapter()).eval(), tokenizer)

    def base_fingerprint(self) -> str:
        """Return a hash of a local base's weights, a hub model's name, or a tiny model's seed."""
        if families.is_tiny(self.model):
            return f"{self.model} seed {self.train.seed}"
        return qwen_vl.weights_fingerprint(self.model)

    # -- Evaluable, Inferable

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What an answer in this format states."""
        return tuple(_QUANTITIES[column] for column in prompts.ANSWERED[self.sample.labels])

    def predict(self, built: BuiltModel, rows: Sequence[Row], preprocess: Preprocess) -> list[Prediction]:
        """Answer each window greedily from its pictures and prompt."""
        device = next(built.model.parameters()).device
        prompt = [_prompt_only(row) for row in rows]
        ids = [ids for ids, _ in prompt]
        pad = built.tokenizer.pad_token_id
        batch = {
            "input_ids": qwen_vl.pad_rows(ids, pad, left=True).to(device),
            "attention_mask": qwen_vl.pad_rows([torch.ones_like(row) for row in ids], 0, left=True).to(device),
            "position_ids": qwen_vl.pad_rows([p for _, p in prompt], 0, left=True).transpose(0, 1).to(device),
        }
        canvases = torch.stack([row["canvases"] for row in rows]).to(device)
        with torch.no_grad():
            features = self._features(built.model, canvases, preprocess)
        texts = qwen_vl.generate_text(
            built.model,
            built.tokenizer,
            batch,
            features,
            max_new_tokens=_MAX_ANSWER_TOKENS,
            end=prompts.ANSWER_END,
        )
        return [Prediction(text, prompts.parse_answer(preprocess.labels, text)) for text in texts]

    def prompt_row(self, canvases: Tensor, preprocess: Preprocess, tokenizer: Any, start_speed_mps: float) -> Row:
        """Return a row without an answer, for a window that no shard holds."""
        targets = {"start_speed_mps": start_speed_mps, "mean_speed_mps": 0.0, "displacement_m": 0.0}
        encoded = _encode(targets, preprocess, tokenizer, self._time_step(preprocess))
        length = len(encoded["input_ids"])
        return {
            "input_ids": torch.tensor(encoded["input_ids"]),
            "labels": torch.tensor(encoded["labels"]),
            "position_ids": torch.tensor(encoded["position_ids"]).view(4, length),
            "canvases": canvases,
        }

    def load_base_to_ask(self, preprocess: Preprocess) -> tuple[BuiltModel, str]:
        """Return the base model as it is, and what that means for its answers."""
        built = BuiltModel(self.load_base(preprocess).eval(), self.tokenizer(preprocess))
        if families.is_tiny(self.model):
            return built, f"{self.model}, untrained: weights drawn from a seed, its answers are noise"
        return built, f"{self.model}, zero-shot: it never saw the answer's format"

    def place(self, built: BuiltModel, device: str, dtype: str | None) -> BuiltModel:
        """Move the model to a device, its weights to another type where one is named."""
        return BuiltModel(qwen_vl.place(built.model, device, dtype), built.tokenizer)

    # -- Mergeable

    def load_to_merge(self, preprocess: Preprocess, folder: Path) -> BuiltModel:
        """Load an adapter over a fresh base that is not quantised."""
        return self.model_copy(update={"quantization": "none"}).load(preprocess, folder)

    def adapter_disabled(self, built: BuiltModel) -> AbstractContextManager[None]:
        """Return a context in which the model is its base."""
        return adapters.disabled(built.model)

    def merge(self, built: BuiltModel) -> BuiltModel:
        """Fold the adapter into its base; the adapted model is used up."""
        return BuiltModel(adapters.merge(built.model), built.tokenizer)

    def of_whole_model(self, model: str) -> Self:
        """Return this recipe with a whole, unquantised model as its base."""
        tune = self.tune.model_copy(update={"mode": "full"})
        return self.model_copy(update={"model": model, "quantization": "none", "tune": tune})

    # -- Exportable

    def export_part(self, built: BuiltModel, preprocess: Preprocess, batch: int) -> ExportedPart:
        """Return the vision tower for a fixed number of windows."""
        black = torch.zeros(batch, preprocess.num_frames, preprocess.canvas_height_px, preprocess.canvas_width_px, 3)
        example = self.export_pixels(black.to(torch.uint8), preprocess)
        tower = vision_tower.VisionTower(built.model, preprocess.grid, batch, example)
        return ExportedPart(tower, example, vision_tower.INPUT_NAME, tower.output_names())

    def export_pixels(self, canvases: Tensor, preprocess: Preprocess) -> Tensor:
        """Return the patches that the vision tower takes."""
        return preprocess.pixel_values(canvases)

    def write_processor_files(self, folder: Path, preprocess: Preprocess) -> None:
        """Write the processor's configuration, and the chat template into the tokenizer."""
        canvas_px = (preprocess.canvas_width_px, preprocess.canvas_height_px)
        family = families.FAMILIES[preprocess.vision.family]
        hub_files.write_processor_config(folder, family, canvas_px=canvas_px, num_frames=preprocess.num_frames)
        tokenizer = qwen_vl.load_tokenizer(str(folder))
        tokenizer.chat_template = prompts.chat_template(preprocess)
        tokenizer.save_pretrained(folder)

    # -- inside

    def _encoder(self, preprocess: Preprocess) -> Any:
        return _kept_tokenizer(self.model, tuple(prompts.sample_sentences(preprocess)))

    def _features(self, model: nn.Module, canvases: Tensor, preprocess: Preprocess) -> Any:
        windows = len(canvases)
        if self.train.blind:
            canvases = torch.full_like(canvases[:1], _GREY)
        dtype = qwen_vl.base_of(model).model.visual.dtype
        pixels = preprocess.pixel_values(canvases).to(dtype)
        grids = torch.tensor([preprocess.grid] * len(canvases), device=canvases.device)
        features = qwen_vl.video_features(model, pixels, grids)
        return qwen_vl.repeat_features(features, windows) if self.train.blind else features

    def _adapter(self) -> adapters.AdapterSpec:
        tune = self.tune
        return adapters.AdapterSpec(
            tune.rank, tune.alpha, tune.dropout, tune.targets, tune.mode == "dora", tune.train_merger
        )

    def _time_step(self, preprocess: Preprocess) -> float:
        if preprocess.vision.family != "qwen2_5_vl":
            return 1.0
        if families.is_tiny(self.model):
            return tiny.TOKENS_PER_SECOND * preprocess.seconds_per_grid
        return float(families.model_config(self.model).vision_config.tokens_per_second) * preprocess.seconds_per_grid


def camera_names(text: str) -> tuple[str, ...]:
    """Return the cameras of a set, or the names between commas.

    Raises:
        UsageError: there are none, or too many for a 3x3 grid.
    """
    names = expand_cameras(text)
    if not 1 <= len(names) <= _MAX_CAMERAS:
        raise UsageError(f"cameras {text!r}: expected {', '.join(CAMERA_SETS)}, or 1 to 9 names with commas")
    return names


def _make_tokenizer(model: str, sentences: tuple[str, ...]) -> Any:
    return tiny.tiny_tokenizer(sentences) if families.is_tiny(model) else qwen_vl.load_tokenizer(model)


# To load one takes longer than to encode a recording. It is never given away: a trainer changes its own.
_kept_tokenizer = lru_cache(maxsize=2)(_make_tokenizer)


def _vision_grid(family: families.VisionFamily) -> VisionGrid:
    return VisionGrid(
        family=family.name,  # type: ignore[arg-type]  # the table's keys are the literal's values
        patch_px=family.patch_px,
        merge=family.merge,
        temporal_patch=family.temporal_patch,
        mean=family.mean,
        std=family.std,
    )


def _encode(row: Mapping[str, Any], preprocess: Preprocess, tokenizer: Any, time_step: float) -> dict[str, list[int]]:
    prompt = tokenizer.encode(prompts.render_prompt(preprocess, row["start_speed_mps"]), add_special_tokens=False)
    answer = tokenizer.encode(prompts.render_answer(preprocess.labels, row) + prompts.ANSWER_END)
    ids = prompt + answer
    positions = rope.rope_ids(
        ids,
        video_token=tokenizer.convert_tokens_to_ids(prompts.VIDEO_TOKEN),
        grid=preprocess.grid,
        merge=preprocess.vision.merge,
        time_step=time_step,
    )
    labels = [losses.IGNORED] * len(prompt) + answer
    return {"input_ids": ids, "labels": labels, "position_ids": positions.flatten().tolist()}


def _prompt_only(row: Row) -> tuple[Tensor, Tensor]:
    length = int((row["labels"] == losses.IGNORED).sum())
    return row["input_ids"][:length], row["position_ids"][:, :length]
