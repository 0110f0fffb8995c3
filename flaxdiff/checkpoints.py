"""Checkpoints: the names of `flaxdiff.trainer.checkpoints`, where they are derived; this path is kept for programs that know it."""
from .trainer.checkpoints import (CheckpointError, OtherNetwork, by_path, checksum, fingerprint,
                                  finish_checkpoints, load_checkpoint, log, open_checkpoints, put_aside,
                                  save_checkpoint)

__all__ = ["CheckpointError", "OtherNetwork", "by_path", "checksum", "fingerprint", "finish_checkpoints",
           "load_checkpoint", "log", "open_checkpoints", "put_aside", "save_checkpoint"]
