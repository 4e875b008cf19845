"""How pictures are sampled: the same for every method that is compared."""

from typing import Annotated

from pydantic import Field

from diffusion.checked import checked


@checked
class Sampling:
    """Settings of the sampler.

    Attributes:
        steps: Denoising steps from noise to picture.
        batch_size: Pictures at a time; it changes speed and memory, never a picture.
    """

    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 64


DEFAULT_SAMPLING = Sampling()
"""What attacks that are run by hand take if nothing is said."""
