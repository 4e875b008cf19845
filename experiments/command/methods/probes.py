"""What an attack and a judge must do, tried on the tiny model."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from attacks.cases import Outcome, PromptCase, ThreatModel, evaluations_paid
from attacks.protocols import is_given_original, one_for_each
from diffusion.model import TextToImage
from diffusion.streams import stream
from evaluation.verdicts import Verdicts
from experiments.command.methods.trial import Trial, blamed, quiet, require, require_signature

_PICTURES = 5


def check_attack(trial: Trial, folder: Path) -> Iterator[str]:
    """Yield what is in order.

    Args:
        trial: The attack in its job.
        folder: For files.

    Raises:
        CommandError: Something is not.
    """
    attack, job = trial.method, trial.job
    allowed = get_args(ThreatModel)
    require(
        attack.threat_model in allowed,
        f"{trial.named}: threat_model is {attack.threat_model!r}; it must be one of {', '.join(allowed)}.",
    )
    require_signature(trial, "run", "model", "cases", "judge", sampling=None)
    model = job.model.load()
    original = job.model.load() if is_given_original(attack) else None
    rows = job.prompts
    targets = model.generate(
        [row.prompt for row in rows],
        seeds=[row.seed for row in rows],
        steps=job.settings.sampling.steps,
        guidance=[row.guidance for row in rows],
    )
    cases = [
        PromptCase(row.case_number, row.prompt, row.seed, row.guidance, target)
        for row, target in zip(rows, targets, strict=True)
    ]

    def run(cases: Sequence[PromptCase]) -> list[Outcome]:
        run_ = partial(attack.run, original=original) if original is not None else attack.run
        with quiet(), blamed(f"{trial.named}: run"):
            outcomes = run_(model, cases, job.judge, sampling=job.settings.sampling)
            return list(one_for_each(outcomes, cases, attack))

    counters = [model] if original is None else [model, original]
    before, counted = model.fingerprint(), sum(each.unet_evaluations for each in counters)
    outcomes = run(cases)
    spent = sum(each.unet_evaluations for each in counters) - counted
    for case in cases:
        _check_outcome(trial, case, next(each for each in outcomes if each.case_number == case.case_number), model)
    yield f"run yields an outcome of each of {len(cases)} cases, {sum(each.success for each in outcomes)} a success"
    require(model.fingerprint() == before, f"{trial.named}: run changes the model; it must leave it as it was.")
    yield "the model is left as it was"
    told = evaluations_paid([outcome.checks[-1] for outcome in outcomes])
    require(
        told == spent,
        f"{trial.named}: its checks tell of {told:,} U-Net evaluations and {spent:,} were made; give each proposal "
        "what finding it took as unet_evaluations, and what serves all cases as shared_evaluations.",
    )
    yield f"its checks tell of the {spent:,} U-Net evaluations that were made"
    # One that the attack worked on, beside others.
    together = next((each for each in outcomes if not each.plain_success), outcomes[0])
    alone = run([case for case in cases if case.case_number == together.case_number])[0]
    require(
        (alone.adversarial_prompt, alone.success) == (together.adversarial_prompt, together.success),
        f"{trial.named}: case {alone.case_number} ends with {together.adversarial_prompt!r} beside others and with "
        f"{alone.adversarial_prompt!r} alone; no outcome may depend on the other cases: draw what is random from "
        "diffusion.streams.stream(seed, ..., case.case_number).",
    )
    yield "an outcome does not depend on the other cases"


def _check_outcome(trial: Trial, case: PromptCase, outcome: Outcome, model: TextToImage) -> None:
    name, shape = f"{trial.named}: the outcome of case {case.case_number}", (3, *model.image_size)
    require(
        outcome.prompt == case.prompt,
        f"{name} has the prompt {outcome.prompt!r}; it must be the case's own, {case.prompt!r}.",
    )
    require(
        isinstance(outcome.image, torch.Tensor)
        and outcome.image.dtype == torch.uint8
        and tuple(outcome.image.shape) == shape,
        f"{name} has an image of another kind; it must be uint8 {list(shape)}, the last picture judged.",
    )
    require(outcome.checks, f"{name} has no checks; it must have one for every picture judged, the plain one first.")
    first = outcome.checks[0]
    require(
        first.prompt == case.prompt and first.present == outcome.plain_success,
        f"{name} must have the plain prompt's picture as its first check, and its verdict as plain_success.",
    )
    found = any(check.succeeds for check in outcome.checks)
    require(
        bool(outcome.success) == found,
        f"{name} says success={outcome.success}, and of its checks {'one' if found else 'none'} succeeds.",
    )


def check_judge(trial: Trial, folder: Path) -> Iterator[str]:
    """Yield what is in order; see :func:`check_attack`."""
    require_signature(trial, "__call__", "images")
    size = trial.job.model.load().image_size
    noise = stream(0, "methods/picture")
    images = torch.randint(256, (_PICTURES, 3, *size), generator=noise, dtype=torch.uint8)
    kept = images.clone()

    def judge(pictures: torch.Tensor) -> Verdicts:
        with quiet(), blamed(f"{trial.named}: judging"):
            verdicts = trial.method(pictures)
        require(
            isinstance(verdicts, Verdicts),
            f"{trial.named} returned {type(verdicts).__name__}; it must return an evaluation.verdicts.Verdicts.",
        )
        return verdicts  # type: ignore[no-any-return]

    verdicts = judge(images)
    require(torch.equal(images, kept), f"{trial.named} changes the pictures that it is given; it must leave them.")
    present, score = verdicts.present, verdicts.score
    require(
        present.dtype == torch.bool and tuple(present.shape) == (_PICTURES,),
        f"{trial.named}: present is {present.dtype} {list(present.shape)} for {_PICTURES} pictures; it must be bool "
        f"[{_PICTURES}].",
    )
    require(
        score.is_floating_point() and tuple(score.shape) == (_PICTURES,) and bool(((score >= 0) & (score <= 1)).all()),
        f"{trial.named}: score is {score.dtype} {list(score.shape)}, from {score.min():g} to {score.max():g}; it must "
        f"be float [{_PICTURES}] from 0 to 1.",
    )
    for column, values in verdicts.details.items():
        require(
            len(values) == _PICTURES,
            f"{trial.named}: details[{column!r}] has {len(values)} values for {_PICTURES} pictures; it must have one "
            "for each.",
        )
    yield f"{_PICTURES} pictures are judged, {int(present.sum())} show the concept"
    alone = judge(images[-1:])
    require(
        bool(alone.present[0]) == bool(present[-1]) and abs(float(alone.score[0]) - float(score[-1])) <= 1e-3,
        f"{trial.named}: the last of {_PICTURES} pictures gets another verdict alone; each picture must be judged by "
        "itself.",
    )
    yield "each picture is judged by itself"
