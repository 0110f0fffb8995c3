"""Averages of the parameters: the names of `flaxdiff.trainer.ema`, where they are derived; this path is kept for programs that know it."""
from .trainer.ema import (SIGMA_RELS, Snapshot, load_snapshots, power_decay, power_dot, power_gamma,
                          power_init, power_update, power_width, reconstruct_ema, reconstruct_weights,
                          reconstruction_error, save_snapshot)

__all__ = ["SIGMA_RELS", "Snapshot", "load_snapshots", "power_decay", "power_dot", "power_gamma",
           "power_init", "power_update", "power_width", "reconstruct_ema", "reconstruct_weights",
           "reconstruction_error", "save_snapshot"]
