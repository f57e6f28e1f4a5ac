"""`omni train`: from shards to verified weights; killed and run again it continues bit for bit."""

from omni_cli.stages.train.fit import make_trainer
from omni_cli.stages.train.request import TrainableRecipe, TrainRequest
from omni_cli.stages.train.stage import train, train_in

__all__ = ["TrainRequest", "TrainableRecipe", "make_trainer", "train", "train_in"]
