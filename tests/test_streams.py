"""Random streams: full strength, one purpose a place, and no method whose draws are those of another."""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from scipy.stats import chi2_contingency

from attacks import gcg, p4d, pez
from attacks.embedding import EmbeddingAttack
from attacks.gcg import GCG
from attacks.p4d import P4D
from attacks.pez import PEZ
from attacks.prompt_search import candidate_tokens
from attacks.protocols import is_given_original
from attacks.random_tokens import RandomTokens
from attacks.relearn import Relearn
from attacks.unlearndiff import UnlearnDiffAtk
from diffusion import streams
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from diffusion.streams import derived_seed, numpy_stream, stream
from erasure.additions.adapters import Adapters
from erasure.concept import Concept
from erasure.erasers import receler, uce
from erasure.erasers.ac import AC
from erasure.erasers.esd import ESD
from erasure.erasers.receler import Receler
from erasure.erasers.spm import SPM
from erasure.erasers.stereo import STEREO, ComposedGuidance
from erasure.erasers.uce import UCE
from erasure.pruning.off import Off
from erasure.trajectories import draw_stops
from tests.attack_cases import make_cases
from tests.judges import never
from tests.test_sdxl import CONCEPT as SETTINGS
from tests.test_sdxl import composed, in_the_repository
from tests.test_uce_debias import CONCEPT as DEBIASED
from tests.test_uce_debias import ITERATING
from tests.tiny_job import CONFIG_FOLDER

__all__ = ["in_the_repository"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("attacks", "diffusion", "erasure", "evaluation", "experiments")
GIVERS = ("stream", "numpy_stream", "derived_seed")
SHORT = Sampling(steps=2, batch_size=2)
STYLE = Concept("van_gogh", "style", targets=("van gogh",), anchor="a picture", templates=("{}", "a church, {}"))
CHURCH = Concept("church", "object", targets=("a church",), anchor="a house")
BOTH = Concept(**{**vars(STYLE), "also": (CHURCH,)})
PAIRS = (("a church", "a house"), ("a red church", "a red house"))

Key = tuple[int, str, tuple[int | str, ...]]
"""Seed, purpose and index."""


def modules(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name != "diffusion/streams.py":
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def calls(*folders: str) -> Iterator[tuple[str, ast.Call]]:
    for name, tree in modules(*folders):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{name}:{node.lineno}", node


def purposes(*folders: str) -> dict[str, str]:
    """The second argument of every call that gives a stream, as it is written, by place."""
    found = {}
    for place, call in calls(*folders):
        if isinstance(call.func, ast.Name) and call.func.id in GIVERS:
            found[f"{place}:{call.col_offset}"] = ast.unparse(call.args[1])
    return found


PURPOSES = sorted({ast.literal_eval(text) for text in purposes(*PACKAGES, "benchmarks").values()})


def largest_correlation(rows: np.ndarray) -> float:
    """Of two different rows, float [streams, draws]."""
    correlation = np.corrcoef(rows)
    np.fill_diagonal(correlation, 0)
    return float(abs(correlation).max())


def assert_unrelated(keys: Sequence[Key], draws: int = 4096) -> None:
    """No two streams have a number in common, at any even distance, and none is correlated with another."""
    numbers = np.stack(
        [torch.empty(256, dtype=torch.int64).random_(generator=stream(a, b, *c)).numpy() for a, b, c in keys]
    )
    assert len(np.unique(numbers)) == numbers.size
    normal = np.stack([torch.randn(draws, generator=stream(a, b, *c)).numpy() for a, b, c in keys])
    # Of a million pairs of independent rows the largest is at about five of these deviations.
    assert largest_correlation(normal) < 6.5 / draws**0.5


def test_a_stream_is_numpys_mersenne_twister_in_the_same_state():
    generator = stream(3, "test/layout", 1)
    twister = np.random.MT19937()
    words = streams._sequence(3, "test/layout", (1,)).generate_state(624)
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}

    drawn = torch.empty(2000, dtype=torch.int32).random_(generator=generator)

    assert drawn.tolist() == (twister.random_raw(2000) % 2**31).tolist()


def test_a_torch_with_another_state_is_refused(monkeypatch):
    monkeypatch.setattr(streams, "_FIRST_BYTE", 16)
    streams._seeded_state.cache_clear()
    with pytest.raises(RuntimeError, match="keeps the state of its CPU generator in another way"):
        stream(0, "test/layout")
    monkeypatch.undo()
    streams._seeded_state.cache_clear()
    stream(0, "test/layout")


def test_the_same_arguments_give_the_same_numbers_on_every_machine():
    assert torch.randint(2**31, (3,), generator=stream(7, "test/pinned", 2)).tolist() == [
        1991708877,
        956075266,
        1000723299,
    ]
    assert numpy_stream(7, "test/pinned", 2).integers(2**31, size=2).tolist() == [634337134, 1427620397]
    assert derived_seed(7, "test/pinned", 2) == 1437377948305012964


def test_every_argument_matters_whatever_its_size():
    keys: list[Key] = [
        (seed, purpose, index)
        for seed in (0, 1, 2**31, 2**32, 2**32 + 1, 2**33, 2**63, 2**64, 2**100, -1)
        for purpose in ("test/a", "test/b")
        for index in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**32,), (2**70,), (-1,), ("0",), ("a", "b"), ("a b",))
    ]
    assert_unrelated(keys, 1024)
    assert len({derived_seed(a, b, *c) for a, b, c in keys}) == len(keys)
    assert all(0 <= derived_seed(a, b, *c) < 2**63 for a, b, c in keys)
    assert len({numpy_stream(a, b, *c).integers(2**63) for a, b, c in keys}) == len(keys)


def test_every_place_writes_a_purpose_of_its_own():
    written = purposes(*PACKAGES)
    assert len(written) > 40
    for place, text in written.items():
        assert re.fullmatch(r"'[a-z0-9_]+/[a-z0-9_]+'", text), f"{place}: {text} is no literal such as 'esd/noise'"
    shared = [text for text, count in Counter(written.values()).items() if count > 1]
    assert not shared, [f"{place}: {text}" for place, text in written.items() if text in shared]
    # A benchmark has purposes of its own, or repeats a method's search.
    own = [text for text in purposes("benchmarks").values() if text not in written.values()]
    assert all(text.startswith("'benchmarks/") for text in own)
    assert len(own) == len(set(own))


ELSEWHERE = {
    "diffusion/model_parts.py": "a picture's seed is torch's own seeding, as published prompt sets mean it",
    "erasure/entries.py": "the file format says how resampled weights are drawn",
    "diffusion/canvas/mmdit.py": "the first weights of a network come from torch's own stream, seeded by one of ours",
    "diffusion/canvas/tiny.py": "random weights to try methods on, from torch's own stream",
    "diffusion/canvas/plan.py": "the shipped weights were made so",
    "diffusion/canvas/stages.py": "the shipped weights were made so",
    "diffusion/canvas/pictures.py": "the shipped weights and their twins were made so",
    "diffusion/canvas/drawing/scene.py": "the shipped weights were made so",
    "diffusion/canvas/prompt_sets.py": "the shipped prompt sets were made so",
}
"""Where generators are seeded by other means, and why."""

SEEDING = {"manual_seed", "default_rng", "seed_all", "RandomState", "SeedSequence", "Generator"}
DRAWING = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "multinomial", "bernoulli", "normal"}
DRAWING_IN_PLACE = {"random_", "uniform_", "normal_", "exponential_", "bernoulli_"}


def test_nothing_is_seeded_or_drawn_beside_the_streams():
    seeded, unseeded = set(), []
    for place, call in calls(*PACKAGES, "benchmarks"):
        if not isinstance(call.func, ast.Attribute):
            continue
        name, owner = call.func.attr, ast.unparse(call.func.value)
        if name in SEEDING or owner in {"random", "np.random"}:
            seeded.add(place.split(":")[0])
        draws = (owner == "torch" and name in DRAWING) or name in DRAWING_IN_PLACE
        if draws and "generator" not in {keyword.arg for keyword in call.keywords}:
            unseeded.append(place)
    assert seeded == {*ELSEWHERE}
    assert unseeded == []


def test_no_two_purposes_are_equal_or_correlated():
    assert_unrelated(
        [
            (seed, purpose, index)
            for purpose in PURPOSES
            for seed, index in ((0, ()), (0, (0,)), (0, (1,)), (0, (0, 1)), (1, (0,)), (2**32, (0,)), (2**32 + 1, ()))
        ]
    )


def test_seeds_handed_down_are_no_seeds_that_others_start_from():
    handed = [derived_seed(seed, purpose) for purpose in PURPOSES for seed in (0, 1, 2**32)]
    assert len({*handed}) == len(handed)
    assert_unrelated([(seed, purpose, (0,)) for seed in handed[::3] for purpose in ("painting/seeds", "esd/test")])


Asked = list[Key]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Every stream that is asked for from here on."""
    seen: Asked = []
    real = streams._sequence

    def watched(seed: int, purpose: str, index: Sequence[int | str]) -> np.random.SeedSequence:
        seen.append((seed, purpose, tuple(index)))
        return real(seed, purpose, index)

    monkeypatch.setattr(streams, "_sequence", watched)
    return seen


@pytest.fixture
def picture_seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seed of every picture and trajectory that is sampled from here on."""
    seen: list[int] = []
    real = TextToImage.initial_latents

    def watched(self: TextToImage, seeds: Sequence[int]) -> torch.Tensor:
        seen.extend(seeds)
        return real(self, seeds)

    monkeypatch.setattr(TextToImage, "initial_latents", watched)
    return seen


QUICK = {
    "eraser": ("esd", "ac", "receler", "stereo"),
    "pruning": ("hard_concrete", "wanda", "random", "saliency"),
    "attack": ("random", "unlearndiff", "gcg", "p4d", "ringabell", "relearn"),
}
ALL = {group: tuple(sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))) for group in QUICK}
MEANT = {
    "conceptprune": "pictures of targets and of anchors differ in the text alone",
    "random": "all tries are drawn anew at every try, which takes one of them",
    "seed_search": "all tries are drawn anew at every try, which takes one of them",
}
"""Methods that ask twice for the same stream, and why."""


def run_choice(group: str, choice: str, model: TextToImage, tmp_path: Path) -> None:
    concept = instantiate(SETTINGS, _convert_="all")
    if group == "eraser":
        composed("eraser", choice, f"store={tmp_path / choice}").erase(model, concept, Off(), seed=0)
    elif group == "pruning":
        learned = ["pruning.initial_score=0.01"] if choice in {"on", "hard_concrete"} else []
        composed("eraser", "esd").erase(model, concept, composed("pruning", choice, *learned), seed=0)
    else:
        attack = composed("attack", choice, *(["attack.checks=[1]"] if choice == "relearn" else []))
        options = {"original": model} if is_given_original(attack) else {}
        list(attack.run(model, make_cases(model, ["a church", "a fish"]), never, sampling=SHORT, **options))


@pytest.mark.parametrize("chosen", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_no_method_repeats_its_own_draws_or_anothers(
    chosen: dict[str, tuple[str, ...]],
    tiny_model: TextToImage,
    tmp_path: Path,
    asked: Asked,
    picture_seeds: list[int],
    in_the_repository: None,
) -> None:
    of_group: dict[str, set[Key]] = {}
    seeds_of_group: dict[str, set[int]] = {}
    own_of_attacks: dict[str, set[Key]] = {}
    for group, names in chosen.items():
        for choice in names:
            # Other numbers for the same class, or in need of files or of a model that has twins.
            if choice in {"imported", "retrained", "transfer"} or choice.endswith(("_sd14", "_paper")):
                continue
            asked.clear()
            picture_seeds.clear()
            run_choice(group, choice, tiny_model, tmp_path)
            twice = [key for key, count in Counter(asked).items() if count > 1]
            assert choice in MEANT or not twice, f"{group}={choice} draws twice: {twice[:3]}"
            of_group.setdefault(group, set()).update(asked)
            seeds_of_group.setdefault(group, set()).update(picture_seeds)
            if group == "attack":
                own_of_attacks[choice] = {*asked}
    assert not of_group["attack"] & (of_group["eraser"] | of_group["pruning"])
    # Cases have seeds from 100 on.
    drawn = {group: {seed for seed in seeds if seed >= 200} for group, seeds in seeds_of_group.items()}
    assert not drawn["attack"] & (drawn["eraser"] | drawn["pruning"])
    for choice, keys in own_of_attacks.items():
        others = set().union(*(own for other, own in own_of_attacks.items() if other != choice))
        assert not keys & others, f"attack={choice} shares its draws"
    every = sorted(set().union(*of_group.values()), key=repr)
    assert len(every) > 50
    assert_unrelated(every[:1500])


@pytest.mark.parametrize("attack", [UnlearnDiffAtk, EmbeddingAttack])
def test_restarts_do_not_repeat_themselves(tiny_model64, attack):
    cases = make_cases(tiny_model64, ["a fish"])
    small = {"tokens": 2, "timesteps": 2, "steps_per_timestep": 2, "learning_rate": 0.05}
    [outcome] = attack(**small, initialization="random", restarts=3).run(tiny_model64, cases, never, sampling=SHORT)

    losses = [check.loss for check in outcome.checks[1:]]

    assert len(losses) == len({round(loss, 9) for loss in losses}) == 8


@pytest.mark.parametrize("attack", [UnlearnDiffAtk(), EmbeddingAttack()])
def test_starts_and_steps_of_all_restarts_are_unrelated(attack):
    given = [
        make(case, restart)
        for make in (attack.start_stream, attack.search_stream)
        for case in range(4)
        for restart in range(5)
    ]
    rows = np.stack([torch.rand(4096, generator=generator).numpy() for generator in given])
    assert largest_correlation(rows) < 6.5 / 4096**0.5


def test_stereos_anchor_is_no_function_of_the_noise_level(tiny_model):
    config = STEREO(batch_size=1, trajectory="current", sampling_steps=4)
    anchors = torch.arange(4.0).reshape(4, 1, 1)
    guidance = ComposedGuidance(config, anchors[None], 1.0, (anchors, [torch.arange(4)]))
    guidance.prepare(tiny_model, STYLE, scope="xattn", steps=1, seed=0, checkpoint=None)
    table = np.zeros((4, 4))
    for step in range(2000):
        [stop] = draw_stops(0, step, 1, 4)[0].tolist()
        table[stop, int(guidance._anchor_texts(torch.tensor([0]), step))] += 1
    assert chi2_contingency(table).pvalue > 1e-3


def test_the_concepts_of_spm_start_apart(tiny_model, monkeypatch):
    starts = []
    initial_factors = SPM.initial_factors

    def watched(self, model, seed):
        factors = initial_factors(self, model, seed)
        starts.append(torch.cat([down.detach().flatten() for _, down in factors.values()]).numpy())
        return factors

    monkeypatch.setattr(SPM, "initial_factors", watched)
    config = SPM(steps=1, warmup=0, batch_size=1, sampling_steps=2, anchors=1)
    config.erase(tiny_model, BOTH, Off(), seed=0)

    assert len(starts) == 2
    assert largest_correlation(np.stack(starts)) < 6.5 / len(starts[0]) ** 0.5


def test_every_debiasing_round_of_uce_looks_at_new_pictures(tiny_model, monkeypatch):
    drawn = []

    def watched(*arguments, seed, **options):
        drawn.append(arguments[3].seeds(seed))
        return paint(*arguments, seed=seed, **options)

    paint = uce.paint
    monkeypatch.setattr(uce, "paint", watched)
    UCE(debias=ITERATING).erase(tiny_model, DEBIASED, Off(), seed=0)

    assert len(drawn) > 3
    seeds = [seed for seeds in drawn for seed in seeds]
    assert len({*seeds}) == len(seeds)


def test_recelers_adapters_and_adversarial_embeddings_begin_apart(tiny_model, monkeypatch):
    first = {}
    untrained = Adapters.untrained.__func__

    def watched(cls, model, rank, generator):
        adapters = untrained(cls, model, rank, generator)
        # The order of drawing: every row of D with its a behind it.
        down, bias, *_ = adapters.weights.values()
        first["adapters"] = torch.cat([down, bias[:, None]], dim=1).flatten()
        return adapters

    class Watched(receler.AdversarialPrompts):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            first["prompts"] = self._embeddings[0].flatten().clone()

    monkeypatch.setattr(Adapters, "untrained", classmethod(watched))
    monkeypatch.setattr(receler, "AdversarialPrompts", Watched)
    small = {"steps": 1, "attack_steps": 1, "sampling_steps": 2, "mask_reduction": 1}
    Receler(rank=32, tokens=8, **small).erase(tiny_model, STYLE, Off(), seed=0)

    size = min(map(len, first.values()))
    rows = np.stack([values[:size].numpy() for values in first.values()])
    assert size >= 256
    assert largest_correlation(rows) < 5 / size**0.5


@pytest.mark.parametrize(
    "eraser",
    [
        AC(steps=1, batch_size=1, images=4, sampling_steps=2),
        ESD(steps=1, trajectory="frozen", trajectories=4, sampling_steps=2, retain_weight=1.0),
    ],
    ids=["ac", "esd"],
)
def test_relearning_is_on_other_pictures_than_the_defenders(tiny_model, picture_seeds, eraser):
    eraser.erase(tiny_model, Concept(**{**vars(STYLE), "preserved": ("a fish",)}), Off(), seed=0)
    defenders = {*picture_seeds}
    picture_seeds.clear()
    next(Relearn(pairs=PAIRS, count=4, checks=(1,), seed=0).train(tiny_model, tiny_model, SHORT))

    assert len(defenders) >= 4
    assert len({*picture_seeds}) == 4
    assert defenders.isdisjoint(picture_seeds)


def test_random_tokens_are_not_where_the_searches_start(tiny_model, monkeypatch):
    starts: dict[str, list[int]] = {}

    def watch(module, name: str) -> None:
        random_rows: Callable = module.random_rows

        def watched(rows, count, generator):
            starts[name] = random_rows(rows, count, generator).tolist()
            return torch.tensor(starts[name])

        monkeypatch.setattr(module, "random_rows", watched)

    cases = make_cases(tiny_model, ["a fish"])
    small = {"tokens": 5, "batch_size": 1, "seed": 0}
    for module, attack in (
        (pez, PEZ(**small, timesteps=1, steps_per_timestep=1)),
        (gcg, GCG(**small, timesteps=1, steps_per_timestep=1, substitutions=2, top_k=2)),
        (p4d, P4D(**small, variant="insert", checks=1, steps_per_check=1)),
    ):
        watch(module, module.__name__)
        options = {"original": tiny_model} if is_given_original(attack) else {}
        list(attack.run(tiny_model, cases, never, sampling=SHORT, **options))
    candidates = candidate_tokens(tiny_model)
    for number, drawn in enumerate(RandomTokens(tokens=5, tries=50, seed=0)._draws(cases[0], len(candidates))):
        starts[f"random {number}"] = candidates[drawn].tolist()

    assert len(starts) == 3 + 50
    assert len({tuple(tokens[:2]) for tokens in starts.values()}) >= len(starts) - 2


def test_seeds_of_pictures_outside_64_bits_are_refused(tiny_model):
    tiny_model.initial_latents([0, 2**64 - 1])
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"seed is {seed}; the seed of a picture must be from 0 to 2\^64 - 1"):
            tiny_model.initial_latents([seed])
