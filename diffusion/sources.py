"""Where a model lies: asked before anything heavy is imported, so that a wrong name is told at once."""

import json
import re
import threading
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session

CANVAS = "canvas"
"""The source that stands for the shipped model."""

CANVAS_FOLDER = Path(__file__).parent / "canvas" / "weights"
"""Where the shipped model lies."""

SINGLE_FILES = (".safetensors", ".ckpt")

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
"""What the Hub calls its repositories: ``owner/name``."""

_HUB_SECONDS = 3.0
_UNUSED_PARTS = {"safety_checker", "feature_extractor", "image_encoder"}
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)(\.(?P<variant>\w+))?\.(?P<suffix>safetensors|bin)"
)
"""Names of the weights of diffusers and transformers."""

_INDEX = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)\.(?P<suffix>safetensors|bin)\.index(\.(?P<variant>\w+))?\.json"
)
"""Names of the lists that say in which files split weights lie."""

WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin")
"""What errors call the weights that a folder lacks."""


def locate(source: str) -> Path | None:
    """Path of the folder or file that ``source`` names; None for a model of the Hub.

    Args:
        source: ``canvas``, a diffusers folder, a single file, or a Hub id ``owner/name``.

    Raises:
        FileNotFoundError: There is no such file or folder, or the model is not in the Hub's cache and the Hub cannot be
            asked for it.
    """
    path = CANVAS_FOLDER if source == CANVAS else Path(source).expanduser()
    if path.exists():
        return path
    if source == CANVAS:
        raise FileNotFoundError(f"The canvas's weights are not in {path}; make them with `make canvas`.")
    if not HUB_ID.fullmatch(source) or path.suffix in SINGLE_FILES:
        raise FileNotFoundError(
            f"There is no model {source!r}; model.source must be 'canvas', a diffusers folder, a file ending in "
            f"{' or '.join(SINGLE_FILES)}, or a Hub id like CompVis/stable-diffusion-v1-4."
        )
    if not is_cached(source) and not hub_answers():
        raise unreachable(source)
    return None


def is_cached(source: str) -> bool:
    """Whether the Hub's cache has a file of every part that the model of this Hub id needs, weights included."""
    folder = cached_folder(source)
    if folder is None:
        return False
    parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return all(
        _has_files(folder / name)
        for name, kind in parts.items()
        if isinstance(kind, list) and kind[0] is not None and name not in _UNUSED_PARTS
    )


def cached_folder(source: str) -> Path | None:
    """Where the Hub's cache keeps what it has of the model of this Hub id; None if it has nothing."""
    index = try_to_load_from_cache(source, "model_index.json", cache_dir=constants.HF_HUB_CACHE)
    return Path(index).parent if isinstance(index, str) else None


def _has_files(part: Path) -> bool:
    # A link of the snapshot to a file that was not fetched to its end is no file.
    names = {path.name for path in part.glob("*") if path.is_file()}
    # Only networks have a config.json; samplers and tokenizers call theirs otherwise.
    return bool(names) and ("config.json" not in names or bool(_weights_by_variant(part)))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a network in a folder of diffusers or transformers; none if it has none.

    Safetensors are preferred to pickles, whole precision to variants such as fp16, and one file to several.

    Raises:
        ValueError: Its list of split weights is damaged.
    """
    return next(iter(_weights_by_variant(folder).values()), [])


def weights_variant(folder: Path) -> str | None:
    """The variant, such as ``fp16``, that a network's folder has alone; None if it has its weights without one."""
    return next(iter(_weights_by_variant(folder)), "") or None


def _weights_by_variant(folder: Path) -> dict[str, list[Path]]:
    """All weights in a folder by variant, "" for none, in the order of preference."""
    found: list[tuple[tuple[bool, bool, bool, bool, str], list[Path]]] = []
    for path in sorted(folder.glob("*")):
        for pattern in (_WEIGHTS, _INDEX):
            if (match := pattern.fullmatch(path.name)) and path.is_file():
                files = [path] if pattern is _WEIGHTS else _shards(path)
                variant = match["variant"] or ""
                rank = (variant != "", variant != "fp16", match["suffix"] != "safetensors", pattern is _INDEX, variant)
                if files and all(file.is_file() for file in files):
                    found.append((rank, files))
    by_variant: dict[str, list[Path]] = {}
    for (*_, variant), files in sorted(found):
        by_variant.setdefault(str(variant), files)
    return by_variant


def _shards(index: Path) -> list[Path]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [index.parent / name for name in dict.fromkeys(names)]
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is no list of split weights; download it again.") from error


def unreachable(source: str) -> FileNotFoundError:
    """What to say of a model of the Hub that cannot be had."""
    return FileNotFoundError(
        f"{source!r} is neither a local file or folder nor complete in the cache {constants.HF_HUB_CACHE}, and "
        f"{constants.ENDPOINT} cannot be reached; download it where there is a network (`hf download {source} "
        "--local-dir FOLDER`) and set model.source=FOLDER."
    )


def hub_answers() -> bool:
    """Ask once, within three seconds all in all, where the Hub's own client would try again and again."""
    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
        except Exception:  # whatever its HTTP library raises, there is no answer
            return
        answered.set()

    # Looking up the Hub's address knows no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_HUB_SECONDS)
    return answered.is_set()
