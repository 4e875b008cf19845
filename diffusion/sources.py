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
_WEIGHTS = re.compile(r"[^.]+\.(safetensors|bin)")
"""Names of whole or split weights; those of variants have one more dot."""


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
    index = try_to_load_from_cache(source, "model_index.json", cache_dir=constants.HF_HUB_CACHE)
    if not isinstance(index, str):
        return False
    parts = json.loads(Path(index).read_text(encoding="utf-8"))
    return all(
        _has_files(Path(index).parent / name)
        for name, kind in parts.items()
        if isinstance(kind, list) and kind[0] is not None and name not in _UNUSED_PARTS
    )


def _has_files(part: Path) -> bool:
    # A link of the snapshot to a file that was not fetched to its end is no file.
    names = {path.name for path in part.glob("*") if path.is_file()}
    # Only networks have a config.json; samplers and tokenizers call theirs otherwise.
    return bool(names) and ("config.json" not in names or any(map(_WEIGHTS.fullmatch, names)))


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
