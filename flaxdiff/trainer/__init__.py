"""Training: one pure step (`step`), the loop around it (`loop`), and `DiffusionTrainer`, both in one (`facade`).

Read `step.training_step`, then `loop.run_loop`. What they use: `losses`, `ema`, `checkpoints`, `parallel`.
Then `facade`, and what it is made of: `batches` that come in, the `device_state` that steps change, the
`options` of a run, and its `evaluation`.
"""
from .checkpoints import load_average
from .facade import DiffusionTrainer, TrainedModel
from .loop import TrainingDiverged
from .step import Recipe, TrainState, ema_update, training_step

__all__ = ["DiffusionTrainer", "Recipe", "TrainState", "TrainedModel", "TrainingDiverged", "ema_update",
           "load_average", "training_step"]
