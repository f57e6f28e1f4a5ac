"""What every recipe lets its user set; a recipe adds what else it needs."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from omni_cli.config import Settings

# Optimisers that work on a part of a weight as on the whole, and were tried so.
CUTTING = ("adamw_torch", "adamw_torch_fused", "sgd")
# Of the settings of a training: what only watches it. A run that they stopped goes on with others.
WATCHING = frozenset({"on_bad_step", "max_roll_backs", "spike_window", "spike_factor"})

# Those that older runs do not know, with the value that changes nothing: a run is not known by them.
WITHOUT_EFFECT = (("sharding", "none"), ("compile", False))


class SampleSettings(Settings):
    """Which instants and cameras make a window; a recipe adds what else it needs."""

    cameras: str
    window: int = Field(16, ge=1)  # frames
    stride: int = Field(8, ge=1)  # frames between the starts of two windows
    rate_hz: float = Field(10.0, gt=0)
    max_age_ms: float = Field(100.0, gt=0)  # a frame older than this at its instant drops the window

    @property
    def max_age_us(self) -> int:
        """The same in microseconds."""
        return round(self.max_age_ms * 1000)


class SplitSettings(Settings):
    """How windows are kept apart: by recording (hash), or by time inside each recording (for a single drive)."""

    rule: Literal["hash", "time"] = "hash"
    validation: float = Field(0.2, gt=0, lt=1)  # share of recordings (hash) or the last share of the time (time)
    gap_s: float = Field(5.0, ge=0)  # time rule: windows within this of the boundary belong to no split
    seed: int = 0


class TuneSettings(Settings):
    """Which weights learn."""

    mode: Literal["lora", "dora", "full"] = "lora"
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()  # layers that get an adapter
    rank_stabilised: bool = False  # rsLoRA: adapters are scaled by alpha / sqrt(rank) instead of alpha / rank

    of_full: ClassVar[frozenset[str]] = frozenset({"mode"})  # what full tuning heeds of this table

    def unheeded(self) -> Mapping[str, str]:
        """In full tuning: all that tells of adapters."""
        if self.mode != "full":
            return {}
        why = "is for adapters, and tune.mode is full; say --set tune.mode=lora, or leave it out"
        return {name: why for name in type(self).model_fields if name not in self.of_full}


class TrainSettings(Settings):
    """The optimiser's schedule and the run's habits."""

    batch_size: int = Field(8, ge=1)
    accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: str = "adamw_torch_fused"
    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(-1, ge=-1)  # -1: as many as the epochs take
    gradient_checkpointing: bool = True
    save_steps: int = Field(50, ge=1)
    log_steps: int = Field(10, ge=1)  # checkpoints are logged too
    workers: int = Field(2, ge=0)
    verify_shards: bool = False  # check the hash of a recording's files when a process first opens them
    seed: int = 0
    blind: bool = False  # a control: every picture is replaced by mid grey
    on_bad_step: Literal["roll_back", "stop"] = "roll_back"  # a loss or gradient that is no number, a spike, a dead one
    max_roll_backs: int = Field(3, ge=0)  # of one run
    spike_window: int = Field(32, ge=0)  # recent losses that a loss is held against; 0: no look-out for spikes
    spike_factor: float = Field(3.0, gt=1)  # a loss above so many times their median is high; three in a row: a spike
    validation_windows: int = Field(64, ge=0)  # of the val split, whose loss is measured at every checkpoint; 0: none
    publish: Literal["last", "best"] = "last"  # weights that become the run's: best by the loss on the val split
    sharding: Literal["none", "fsdp2"] = "none"  # fsdp2: in full tuning each rank of torchrun holds a part of the model

    def unheeded(self) -> Mapping[str, str]:
        """Where steps are counted: for how many epochs."""
        if self.max_steps < 0:
            return {}
        counted = f"train.max_steps is {self.max_steps}"
        return {"epochs": f"has no effect where {counted}; say --set train.max_steps=-1 too, or leave it out"}

    @field_validator("max_steps")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("expected 1 or more, or -1 for as many as the epochs take")
        return value

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.publish == "best" and not self.validation_windows:
            raise ValueError("publish = best needs validation_windows = 1 or more, which say which weights are best")
        return self

    @model_validator(mode="after")
    def _optimizer_can_be_cut(self) -> Self:
        if self.sharding != "none" and self.optimizer not in CUTTING:
            raise ValueError(
                f"sharding = {self.sharding} with optimizer = {self.optimizer}, which is not known to work on parts of "
                f"weights; take one of {', '.join(CUTTING)}"
            )
        return self
