"""The built-in world: pictures that the project draws, their captions, and the model trained on them."""
