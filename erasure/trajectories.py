"""Latents x_t on sampling trajectories, with the frozen model's predictions there: what noise objectives train on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffusion.files import set_aside
from diffusion.model import TextToImage
from diffusion.precision import at_least_float32
from diffusion.progress import track
from diffusion.streams import stream
from diffusion.training import read_saved, save_atomically


@dataclass(frozen=True)
class Trajectories:
    """How trajectories are sampled.

    Attributes:
        steps: Sampler steps from noise to picture.
        guidance: Guidance scale of the trajectory.
        pool: None: every training sample has a trajectory of its own, stopped at a random step, as in the papers.
            A number: so many whole trajectories, every step of which is a training sample (approximate: samples of
            one trajectory depend on each other, and are used again when training outlasts them; far cheaper).
        batch_size: Trajectories sampled at a time; it changes speed and memory only.
        lagging: x_t as in the published CompVis code of ESD: the sampler leaves out its first step and stops two steps
            further than the timestep that x_t is scored at, which is any of the stop's interval. Of 50 steps, x_t is
            39 to 58 timesteps less noisy than its t says. For DDIM, and without a pool.
        rescaled: x_t as in the published code of SPM, and in the one of ESD that STEREO took over: after k of n steps,
            k from 1 on, it is scored at step floor(T k / n) of T. Of 50 steps, x_t is 19 timesteps less noisy than its
            t says, of 30 steps 33 to 42. For DDIM, and without a pool.
    """

    steps: int
    guidance: float
    pool: int | None
    batch_size: int
    lagging: bool = False
    rescaled: bool = False


@dataclass(frozen=True)
class NoiseSamples:
    """Rows of training data for a noise prediction.

    Attributes:
        latents: float [n, c, h, w], x_t as the U-Net takes it.
        timesteps: int64 [n].
        prompts: int64 [n], which row of the text table conditions the prediction.
        targets: float [n, c, h, w], the prediction to make.
    """

    latents: Tensor
    timesteps: Tensor
    prompts: Tensor
    targets: Tensor

    def rows(self, index: Tensor) -> "NoiseSamples":
        """The samples ``index``, int64 [m]."""
        return NoiseSamples(self.latents[index], self.timesteps[index], self.prompts[index], self.targets[index])


def draw_stops(
    seed: int, step: int, batch_size: int, sampling_steps: int, *, first: int = 0
) -> tuple[Tensor, list[int]]:
    """Where the trajectories of step ``step`` stop, int64 [batch_size] in first .. steps - 1, and their seeds."""
    generator = stream(seed, "trajectories/stops", step)
    stops = torch.randint(first, sampling_steps, (batch_size,), generator=generator)
    return stops, torch.randint(2**31, (batch_size,), generator=generator).tolist()


def latents_before(
    model: TextToImage, text: Tensor, seeds: Sequence[int], stop: int, settings: Trajectories
) -> tuple[Tensor, Tensor]:
    """x_t as the U-Net takes it before sampler step ``stop``, float [n, c, h, w], and their t, int64 [n]."""
    if (settings.lagging or settings.rescaled) and model.scheduler_name != "ddim":
        raise ValueError(
            f"scheduler is {model.scheduler_name!r}; published_offset follows a published sampler, which is ddim."
        )
    latents = model.sample(
        text,
        seeds=seeds,
        steps=settings.steps,
        guidance=settings.guidance,
        start=1 if settings.lagging else 0,
        until=min(stop + 2, settings.steps) if settings.lagging else stop,
        batch_size=settings.batch_size,
    )
    if settings.rescaled:
        place = model.training_timesteps * stop // settings.steps
        scored_at = model.sampling_timesteps(model.training_timesteps)[place]
        return latents, scored_at.to(model.device).expand(len(seeds))
    if not settings.lagging:
        return latents, model.sampling_timesteps(settings.steps)[stop].to(model.device).expand(len(seeds))
    interval = settings.steps - 1 - stop
    first, last = (round(model.training_timesteps * end / settings.steps) for end in (interval, interval + 1))
    scored = [int(torch.randint(first, last, (), generator=stream(seed, "trajectories/scored"))) for seed in seeds]
    return latents, torch.tensor(scored, device=model.device)


def check_pool(trajectories: int | None, *, trajectory: str = "frozen", published_offset: bool = False) -> None:
    """Refuse a pool of trajectories where every training sample has one of its own.

    Raises:
        ValueError: It is sampled from the current model, or as the published sampler does.
    """
    if trajectories is None:
        return
    if trajectory == "current":
        raise ValueError(
            f"trajectories is {trajectories} and trajectory 'current'; a pool of trajectories is sampled from the "
            "frozen model, so set trajectory=frozen or trajectories=null."
        )
    if published_offset:
        raise ValueError(
            f"trajectories is {trajectories} and published_offset true; the published sampler has a trajectory for "
            "every training sample, so set trajectories=null."
        )


def current_points(
    model: TextToImage, text: Tensor, settings: Trajectories, *, batch_size: int, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Points of training step ``step`` on trajectories of the model as it is now.

    Args:
        model: Whose trajectories.
        text: float [prompts, tokens, width]; prompts take turns.
        settings: How trajectories are sampled, each on its own.
        batch_size: Points per step.
        seed: Of stops and noise.
        step: Training step.

    Returns:
        x_t, float [batch_size, c, h, w], their t and which prompts they are of, int64 [batch_size].
    """
    stops, seeds = draw_stops(seed, step, batch_size, settings.steps, first=int(settings.rescaled))
    prompts = torch.arange(step * batch_size, (step + 1) * batch_size) % len(text)
    points = [
        latents_before(model, text[[prompt]], [own], stop, settings)
        for prompt, own, stop in zip(prompts.tolist(), seeds, stops.tolist(), strict=True)
    ]
    return torch.cat([latents for latents, _ in points]), torch.cat([t for _, t in points]), prompts


def target_prediction(
    model: TextToImage,
    latents: Tensor,
    timesteps: Tensor,
    text: Tensor,
    reference: Tensor,
    guidance: float,
    attribute: Tensor | None = None,
) -> Tensor:
    """e_r + guidance * (e_c - e_r) without gradients, float [n, c, h, w]; guidance 1 costs no evaluation of e_r.

    With the text of an attribute a, e_c + guidance * (e_a - e_r).
    """
    with torch.no_grad():
        if attribute is not None:
            texts = torch.cat([text, attribute, reference])
            noise = model.predict(latents.repeat(3, 1, 1, 1), timesteps.repeat(3), texts).to(latents.dtype)
            whole, added, without = noise.chunk(3)
            return whole + guidance * (added - without)
        if guidance == 1:
            return model.predict(latents, timesteps, text).to(latents.dtype)
        return model.guided(latents, timesteps, text, reference, guidance).to(latents.dtype)


class FrozenSamples:
    """Training samples of ``steps`` steps whose latents and targets all come from the model before it changes.

    Everything is computed beforehand and in batches, so that training holds one U-Net and evaluates it once a step.

    Args:
        model: The unedited model.
        text: float [prompts, tokens, width]; training samples take the prompts in turn, and a pool of trajectories
            is spread evenly over them.
        settings: How trajectories are sampled.
        target_guidance: Targets are e_r + target_guidance * (e_c - e_r).
        reference: float [prompts, tokens, width], the text of e_r for every prompt; None for the empty prompt.
        attribute: float [prompts, tokens, width], for every prompt the text of an e_a that makes the targets
            e_c + target_guidance * (e_a - e_r); None for the targets above.
        steps: Training steps.
        batch_size: Samples per training step.
        seed: Of stops, noise and order.
        checkpoint: Finished parts are kept in files whose names start with this one, and found again.
        prompts: int64 [steps * batch_size], which prompt each training sample is of; None for the turns above.
            A pool too small for all prompts gives the next before it that has a trajectory.

    Attributes:
        unet_evaluations: Spent on the samples, by an interrupted run as well.
    """

    def __init__(
        self,
        model: TextToImage,
        text: Tensor,
        settings: Trajectories,
        *,
        target_guidance: float,
        reference: Tensor | None = None,
        attribute: Tensor | None = None,
        steps: int,
        batch_size: int,
        seed: int,
        checkpoint: Path | None = None,
        prompts: Tensor | None = None,
    ) -> None:
        self.text = text
        self._prompts = prompts
        self._reference = reference
        self._attribute = attribute
        self.unet_evaluations = 0
        self._batch_size = batch_size
        self._checkpoint = checkpoint
        unconditional = model.encode_prompts([""])[0]
        fill = self._own_trajectories if settings.pool is None else self._shared_trajectories
        self._order, self._samples = fill(model, settings, unconditional, target_guidance, steps, seed)

    def batch(self, step: int) -> tuple[NoiseSamples, Tensor]:
        """The samples of training step ``step`` and their text, float [n, tokens, width]."""
        places = torch.arange(step * self._batch_size, (step + 1) * self._batch_size)
        samples = self._samples.rows(self._order[places])
        return samples, self.text[samples.prompts]

    def _own_trajectories(
        self,
        model: TextToImage,
        settings: Trajectories,
        unconditional: Tensor,
        target_guidance: float,
        steps: int,
        seed: int,
    ) -> tuple[Tensor, NoiseSamples]:
        first = int(settings.rescaled)
        draws = [draw_stops(seed, step, self._batch_size, settings.steps, first=first) for step in range(steps)]
        stops = torch.cat([stop for stop, _ in draws])
        seeds = [number for _, numbers in draws for number in numbers]
        groups = [group for stop in range(settings.steps) if len(group := (stops == stop).nonzero().reshape(-1))]

        def sample(chunk: Tensor) -> NoiseSamples:
            chosen = chunk % len(self.text) if self._prompts is None else self._prompts[chunk]
            prompts = chosen.to(model.device)
            text = self.text[prompts]
            latents, timesteps = latents_before(
                model, text, [seeds[place] for place in chunk], int(stops[chunk[0]]), settings
            )
            reference = unconditional.expand_as(text) if self._reference is None else self._reference[prompts]
            attribute = None if self._attribute is None else self._attribute[prompts]
            targets = target_prediction(model, latents, timesteps, text, reference, target_guidance, attribute)
            return NoiseSamples(latents, timesteps, prompts, targets)

        def sample_all(group: Tensor) -> NoiseSamples:
            return _joined([sample(chunk) for chunk in group.split(settings.batch_size)])

        parts = [
            self._remembered(f"stop-{int(stops[group[0]])}", partial(sample_all, group), model)
            for group in track(groups, "trajectories", len(groups))
        ]
        return torch.cat(groups).argsort(), _joined(parts)

    def _shared_trajectories(
        self,
        model: TextToImage,
        settings: Trajectories,
        unconditional: Tensor,
        target_guidance: float,
        steps: int,
        seed: int,
    ) -> tuple[Tensor, NoiseSamples]:
        pool = settings.pool or 0
        places = torch.arange(pool)
        seeds = torch.randint(2**31, (len(places),), generator=stream(seed, "trajectories/pool")).tolist()

        def sample(chunk: Tensor) -> NoiseSamples:
            # Spread evenly, so that a small pool leaves out no phrase before it repeats another's templates.
            prompts = (chunk * len(self.text) // pool).to(model.device)
            text = self.text[prompts]
            conditions = [unconditional.expand_as(text), text]
            conditions += [extra[prompts] for extra in (self._reference, self._attribute) if extra is not None]
            conditioning = torch.cat(conditions)
            scheduler = model.make_scheduler(settings.steps)
            latents = model.initial_latents([seeds[place] for place in chunk]) * scheduler.init_noise_sigma
            precise = at_least_float32(latents.dtype)
            along: list[NoiseSamples] = []
            for timestep, t in zip(scheduler.timesteps, model.sampling_timesteps(settings.steps), strict=True):
                scaled = scheduler.scale_model_input(latents, timestep).to(latents.dtype)
                stacked = scaled.repeat(len(conditions), 1, 1, 1)
                noise = model.predict(stacked, t.to(model.device), conditioning).to(precise)
                without, conditional, *others = noise.chunk(len(conditions))
                reference = without if self._reference is None else others[0]
                start, end = (reference, conditional) if self._attribute is None else (conditional, others[-1])
                target = (start + target_guidance * (end - reference)).to(latents.dtype)
                along.append(NoiseSamples(scaled, t.to(model.device).expand(len(chunk)), prompts, target))
                guided = without + max(1.0, settings.guidance) * (conditional - without)
                output = model.as_told(guided, scaled, t)
                latents = scheduler.step(output, timestep, latents.to(precise)).prev_sample.to(latents.dtype)
            # Trajectory by trajectory, so that the pool's order does not depend on how many are sampled at a time.
            return NoiseSamples(
                *(torch.stack(steps, dim=1).flatten(0, 1) for steps in zip(*map(_fields, along), strict=True))
            )

        chunks = places.split(settings.batch_size)
        with torch.no_grad():
            parts = [
                self._remembered(f"pool-{int(chunk[0])}-{int(chunk[-1])}", partial(sample, chunk), model)
                for chunk in track(chunks, "trajectories", len(chunks))
            ]
        samples = _joined(parts)
        if self._prompts is None:
            rows = torch.arange(len(samples.timesteps))
            return _shuffled(rows, steps * self._batch_size, seed), samples
        owners = samples.prompts.cpu()
        present = owners.unique()
        wanted = present[torch.searchsorted(present, self._prompts, right=True) - 1]
        order = torch.empty_like(wanted)
        for prompt in wanted.unique().tolist():
            where = (wanted == prompt).nonzero().reshape(-1)
            rows = (owners == prompt).nonzero().reshape(-1)
            order[where] = _shuffled(rows, len(where), seed, prompt)
        return order, samples

    def _remembered(self, part: str, compute: Callable[[], NoiseSamples], model: TextToImage) -> NoiseSamples:
        tensors, spent = remembered(self._checkpoint, part, lambda: vars(compute()), model)
        self.unet_evaluations += spent
        return NoiseSamples(**tensors)


def remembered(
    checkpoint: Path | None, part: str, compute: Callable[[], dict[str, Tensor]], model: TextToImage
) -> tuple[dict[str, Tensor], int]:
    """``compute()``, or what an interrupted run has kept of it.

    Args:
        checkpoint: The file's name begins with this one; None keeps nothing.
        part: The file's name ends with this.
        compute: Makes tensors by name with ``model``.
        model: Whose U-Net evaluations are counted.

    Returns:
        The tensors, and the evaluations that they cost when they were computed.
    """
    path = stage(checkpoint, part)
    state = None if path is None else read_saved(path, model.device)
    if path is not None and state is not None:
        if isinstance(state, dict) and state.keys() == {"tensors", "unet_evaluations"}:
            return state["tensors"], state["unet_evaluations"]
        set_aside(path, "it is of another kind")
    before = model.unet_evaluations
    tensors = compute()
    spent = model.unet_evaluations - before
    if path is not None:
        save_atomically({"tensors": tensors, "unet_evaluations": spent}, path)
    return tensors, spent


def stage(checkpoint: Path | None, name: str) -> Path | None:
    """The checkpoint of one stage of a job."""
    return None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.{name}")


def _shuffled(rows: Tensor, count: int, seed: int, *which: int) -> Tensor:
    """``count`` of ``rows``, all in an order drawn anew before one comes again; ``which`` numbers several such rows."""
    rounds = -(-count // len(rows))
    orders = [
        torch.randperm(len(rows), generator=stream(seed, "trajectories/order", *which, number))
        for number in range(rounds)
    ]
    return torch.cat([rows[order] for order in orders])[:count]


def _fields(samples: NoiseSamples) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return samples.latents, samples.timesteps, samples.prompts, samples.targets


def _joined(parts: Sequence[NoiseSamples]) -> NoiseSamples:
    return NoiseSamples(*(torch.cat(columns) for columns in zip(*map(_fields, parts), strict=True)))
