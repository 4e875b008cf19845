"""Loads a model from wherever it lies: the canvas, a diffusers folder, a single file, or the Hugging Face Hub."""

from diffusion.loading.model_source import Device, ModelSource, load_model, quiet_off_a_terminal

__all__ = ["Device", "ModelSource", "load_model", "quiet_off_a_terminal"]
