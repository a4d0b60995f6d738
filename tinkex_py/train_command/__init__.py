"""`tinkex-py train CONFIG.yaml`: a run that is described in a file."""

from tinkex_py.train_command.command import Trained, train_from_config
from tinkex_py.train_command.config import TrainConfig, read_config
from tinkex_py.train_command.entry import run_train

__all__ = ["TrainConfig", "Trained", "read_config", "run_train", "train_from_config"]
