"""ConceptPrune's masks, all pictures in one batch and for the steps that count, against the published control flow.

The published flow (the authors' wanda.py and its receiver, written anew) draws one whole picture after another, decodes
it, computes the gated units of every feed-forward a second time in a hook, takes them to the CPU at every step, scores
every step of the sampler, and writes each step's mask of each layer as a sparse matrix; of these it reads back those of
the first steps and joins them. Both start the same pictures from the same noise, so that their masks can be compared.
Prints one line of JSON.
"""

import json
import pickle
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention import FeedForward
from published_flow import CONCEPT, load_model, make_parser
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from diffusion.model import TextToImage
from diffusion.streams import derived_seed
from erasure.parameters import scope_parameters
from erasure.pictures import Painting
from erasure.pruning.calibration import spread
from erasure.pruning.conceptprune import ConceptPrune

SEED = 0


def main() -> None:
    """Time both and compare the masks."""
    parser = make_parser(__doc__, prompts=0)
    parser.add_argument("--pictures", type=int, default=20, help="of the concept, and as many of its anchor")
    parser.add_argument("--sampling-steps", type=int, default=50)
    arguments = parser.parse_args()
    model = load_model(arguments)
    pruning = ConceptPrune(pictures=arguments.pictures, sampling_steps=arguments.sampling_steps)
    weights = scope_parameters(model, "ffn2")

    before, started = model.unet_evaluations, time.perf_counter()
    masks, _ = pruning.masks(model, CONCEPT, weights, seed=SEED, checkpoint=None)
    our_seconds, between = time.perf_counter() - started, model.unet_evaluations
    started = time.perf_counter()
    published = PublishedConceptPrune(model, pruning).masks()
    their_seconds = time.perf_counter() - started

    differ = sum(int((masks[name] != published[name]).sum()) for name in weights)
    print(
        json.dumps(
            {
                "benchmark": "conceptprune_published_flow",
                "ratio": their_seconds / our_seconds,
                "seconds_published_flow": their_seconds,
                "seconds_ours": our_seconds,
                "pictures": 2 * arguments.pictures,
                "weights": sum(weight.numel() for weight in weights.values()),
                "pruned": sum(int((~mask).sum()) for mask in masks.values()),
                "pruned_differently": differ,
                "unet_evaluations": between - before,
                "unet_evaluations_published_flow": model.unet_evaluations - between,
                "device": arguments.device,
                "threads": arguments.threads,
            }
        )
    )


class PublishedConceptPrune:
    """The published search for skilled weights.

    Args:
        model: Whose.
        pruning: With which settings.
    """

    def __init__(self, model: TextToImage, pruning: ConceptPrune) -> None:
        self.model, self.pruning = model, pruning
        self.layers: dict[str, FeedForward] = {
            name: module for name, module in sorted(model.unet.named_modules()) if isinstance(module, FeedForward)
        }

    def masks(self) -> dict[str, Tensor]:
        """Return which weights stay, bool by parameter name."""
        targets = self.norms(CONCEPT.target_prompts)
        anchors = self.norms(CONCEPT.target_anchors)
        with tempfile.TemporaryDirectory() as folder:
            for step in range(self.pruning.sampling_steps):
                for layer in self.layers:
                    self.write(Path(folder), layer, step, targets[layer, step], anchors[layer, step])
            return {f"{layer}.net.2.weight": self.kept(Path(folder), layer) for layer in self.layers}

    @torch.no_grad()
    def norms(self, prompts: list[str]) -> dict[tuple[str, int], Tensor]:
        """Draw the pictures of prompts; the norm of each unit, float [units], by layer and step."""
        pruning, model = self.pruning, self.model
        painting = Painting(pruning.pictures, pruning.sampling_steps, pruning.guidance, 1)
        squares: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(()))
        counter: dict[str, int] = {}
        hooks = [
            module.register_forward_hook(self.receiver(name, squares, counter)) for name, module in self.layers.items()
        ]
        seeds = painting.seeds(derived_seed(SEED, "conceptprune/pictures"))
        for number, seed in zip(spread(prompts, pruning.pictures), seeds, strict=True):
            counter.clear()
            model.generate([prompts[number]], seeds=[seed], steps=pruning.sampling_steps, guidance=pruning.guidance)
        for hook in hooks:
            hook.remove()
        return {place: total.sqrt() for place, total in squares.items()}

    @staticmethod
    def receiver(name: str, squares: dict[tuple[str, int], Tensor], counter: dict[str, int]) -> Any:
        """A hook that computes a feed-forward's gated units again and adds their squares up on the CPU."""

        def receive(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            step = counter[name] = counter.get(name, -1) + 1
            hidden, gate = module.net[0].proj(inputs[0]).chunk(2, dim=-1)
            units = (hidden * nn.functional.gelu(gate)).detach().cpu().flatten(0, -2)
            units = units / units.norm(dim=1, keepdim=True)
            squares[name, step] = squares[name, step] + units.double().square().sum(dim=0)

        return receive

    def write(self, folder: Path, layer: str, step: int, targets: Tensor, anchors: Tensor) -> None:
        """Write where a layer's weights are skilled at a step."""
        weight = self.layers[layer].net[2].weight.detach().abs().cpu()
        scores, others = weight * targets.to(weight.dtype), weight * anchors.to(weight.dtype)
        count = int(self.pruning.sparsity.fraction * weight.shape[1])
        highest = scores.sort(dim=1, descending=True).indices[:, :count]
        skilled = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, highest, True) & (scores > others)
        with (folder / f"{layer}.{step}.pkl").open("wb") as file:
            pickle.dump(csr_matrix(skilled.numpy()), file)

    def kept(self, folder: Path, layer: str) -> Tensor:
        """Read the first steps' masks of a layer and join them."""
        union = sum(
            pickle.loads((folder / f"{layer}.{step}.pkl").read_bytes()).toarray().astype(np.int64)
            for step in range(self.pruning.first_steps)
        )
        return torch.from_numpy(np.asarray(union) <= 0).to(self.model.device)


if __name__ == "__main__":
    main()
