"""Attacks: an edited model and prompts in, adversarial prompts out; one file per method."""
