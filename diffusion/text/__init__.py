"""How prompts are read."""
