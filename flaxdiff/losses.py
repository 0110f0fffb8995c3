"""Losses: the names of `flaxdiff.trainer.losses`, where they are derived; this path is kept for programs that know it."""
from .trainer.losses import (LearnedUncertainty, diffusion_loss, edm_weight, elbo_weight, level_edges,
                             log_snr_range, loss_by_level, min_snr_weight, p2_weight, plain_weight,
                             plot_loss_by_level, soft_min_snr_weight, uncertain_loss, uniform_log_snr,
                             variance_loss)

__all__ = ["LearnedUncertainty", "diffusion_loss", "edm_weight", "elbo_weight", "level_edges",
           "log_snr_range", "loss_by_level", "min_snr_weight", "p2_weight", "plain_weight",
           "plot_loss_by_level", "soft_min_snr_weight", "uncertain_loss", "uniform_log_snr", "variance_loss"]
