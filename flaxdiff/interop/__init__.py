"""Other people's models: diffusers' UNets, autoencoders, schedules and pipelines, read from their folders without PyTorch."""
from .autoencoder import Autoencoder, TwinAutoencoder, make_autoencoder
from .folders import load_autoencoder, read_part, write_part
from .pipeline import DiffusersModel, PromptEncoder, load_diffusers
from .schedules import StepNoiseScheduler, ddim_times, schedule_from, scheduler_config
from .unets import TwinUNet, make_unet

__all__ = ["load_diffusers", "load_autoencoder", "schedule_from", "scheduler_config", "ddim_times", "read_part",
           "write_part", "make_unet", "make_autoencoder", "DiffusersModel", "Autoencoder", "PromptEncoder",
           "TwinUNet", "TwinAutoencoder", "StepNoiseScheduler"]
