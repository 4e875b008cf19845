"""One training step of ESD-x at the size of Stable Diffusion 1.4. Prints one line of JSON.

The weights are random, so nothing is downloaded. The step is the paper's but for its trajectory, which is left undrawn:
it takes time and no memory beside the step's. ``peak_gib`` is the process's, the model included, all in float32.
"""

import argparse
import json
import resource
import time

import torch
from sd14_attack_step import make_model

from erasure.concept import Concept
from erasure.erasers.esd import ESD
from erasure.pruning.learned import Learned
from erasure.pruning.off import Off


def main() -> None:
    """Take one step and report its time and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pruning", choices=("off", "on"), default="off", help="on learns a mask over xattn (P-ESD)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pruning = Off() if arguments.pruning == "off" else Learned(scope=None, steps=1)
    concept = Concept("van_gogh", "style", targets=("van gogh",))
    eraser = ESD(scope="xattn", steps=1, batch_size=1)
    model = make_model()
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    erasure = eraser.erase(model, concept, pruning, seed=0)
    print(
        json.dumps(
            {
                "benchmark": "sd14_esd_step",
                "pruning": arguments.pruning,
                "seconds": time.perf_counter() - started,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "loaded_gib": loaded,
                "unet_evaluations": erasure.unet_evaluations,
                "latents": list(model.latent_shape),
                "loss": erasure.losses[0],
                "edit_bytes": erasure.edit.size_bytes,
                "device": "cpu",
                "threads": arguments.threads,
            }
        )
    )


if __name__ == "__main__":
    main()
