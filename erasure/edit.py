"""What erasing changes in a model: applied, taken back bit for bit, and kept on disk as small as it is."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.files import replacing
from diffusion.finite import require_finite, require_finite_tensors
from diffusion.model import TextToImage
from diffusion.parameters import named_parameters
from diffusion.streams import stream
from erasure.addition import Addition, addition_class, attach_all, stored_kind
from erasure.entries import DIVERGED, MASKS, Entry, Fill, encode_mask

SCHEMA = 1
"""Version of the file format."""

_ADDED = "+"
"""Before an addition's number in the names of its stored tensors; no parameter's name starts so."""


@dataclass
class Application:
    """An edit in a model.

    Attributes:
        replaced: The parameters that the edit replaced, by name.
        detach: Takes the edit's additions out of the model.
    """

    replaced: dict[str, Tensor]
    detach: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Edit:
    """What an eraser changed, parameter by parameter.

    Attributes:
        entries: The changes by parameter name (diffusers U-Net names; those of the text encoder are prefixed).
        metadata: JSON values: method, concept, base (the fingerprint of the model it was made from), scope, seed,
            config, versions, ...
        additions: What is put beside the parameters, such as adapters or a guard.
    """

    entries: dict[str, Entry]
    metadata: dict[str, Any] = field(default_factory=dict)
    additions: tuple[Addition, ...] = ()
    _applications: "WeakKeyDictionary[TextToImage, Application]" = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Refuse what would turn a model's pictures black.

        Raises:
            NotFiniteError: A stored value is infinite or NaN.
        """
        distinct = {id(entry.parts): (name, entry.parts) for name, entry in self.entries.items()}
        for name, parts in distinct.values():
            for part in parts.values():
                require_finite(part, f"The edit of {name!r}", DIVERGED)
        for addition in self.additions:
            require_finite_tensors(addition.tensors(), f"The edit's {addition.kind}", DIVERGED)

    def __bool__(self) -> bool:
        """Return whether it changes anything."""
        return bool(self.entries or self.additions)

    @classmethod
    def identity(cls, metadata: Mapping[str, Any] | None = None) -> "Edit":
        """The edit that changes nothing."""
        return cls({}, dict(metadata or {}))

    @classmethod
    def from_weights(
        cls, before: Mapping[str, Tensor], after: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> "Edit":
        """The tensors of ``after`` that differ from those of ``before``, whole."""
        entries = {
            name: Entry(
                "dense", tuple(value.shape), {"": value.detach().cpu().clone(memory_format=torch.contiguous_format)}
            )
            for name, value in after.items()
            if not torch.equal(value, before[name])
        }
        return cls(entries, dict(metadata or {}))

    @classmethod
    def from_rows(
        cls,
        name: str,
        rows: Tensor,
        values: Tensor,
        shape: Sequence[int],
        metadata: Mapping[str, Any] | None = None,
    ) -> "Edit":
        """Some rows of one parameter become others.

        Args:
            name: The parameter's name.
            rows: Which rows, int64 [k].
            values: What they become, float [k, ...].
            shape: The parameter's shape.
            metadata: See the class.
        """
        parts = {"rows": rows.cpu().contiguous(), "values": values.detach().cpu().contiguous()}
        return cls({name: Entry("rows", tuple(shape), parts)}, dict(metadata or {}))

    @classmethod
    def from_right_multiplication(
        cls, right: Tensor, weights: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> "Edit":
        """Every matrix W becomes W T; one T is stored for all.

        Args:
            right: T, float [d, d]; stored in the matrices' precision, float32 at least.
            weights: The matrices by parameter name, float [any, d].
            metadata: See the class.
        """
        dtypes = [weight.dtype for weight in weights.values()]
        stored = right.detach().cpu().to(reduce(torch.promote_types, dtypes, torch.float32)).contiguous()
        parts = {"T": stored}
        entries = {name: Entry("right_multiplied", tuple(weight.shape), parts) for name, weight in weights.items()}
        return cls(entries, dict(metadata or {}))

    @classmethod
    def from_mask(
        cls,
        masks: Mapping[str, Tensor],
        metadata: Mapping[str, Any] | None = None,
        *,
        fill: Fill = "zero",
        seed: int = 0,
    ) -> "Edit":
        """Pruned weights: bits or the indices of what is pruned, whichever is smaller for a tensor.

        Args:
            masks: bool tensors by parameter name, True where the weight is kept.
            metadata: See the class.
            fill: What pruned weights become.
            seed: Of what is drawn in that; every tensor is given its own.
        """
        seeds = torch.randint(2**31, (len(masks),), generator=stream(seed, "edit/fill")).tolist()
        entries = {
            name: encode_mask(kept, fill, own)
            for (name, kept), own in zip(masks.items(), seeds, strict=True)
            if not bool(kept.all())
        }
        return cls(entries, dict(metadata or {}))

    def with_metadata(self, metadata: Mapping[str, Any]) -> "Edit":
        """The same changes, with ``metadata`` added to what they say of themselves."""
        return Edit(self.entries, {**self.metadata, **metadata}, self.additions)

    def then(self, later: "Edit", model: TextToImage) -> "Edit":
        """One edit that does what this one and, on its result, ``later`` do to ``model``, which is left as it was."""
        both = self.entries.keys() & later.entries.keys()
        metadata = {**self.metadata, **later.metadata}
        additions = (*self.additions, *later.additions)
        if not both:
            return Edit({**self.entries, **later.entries}, metadata, additions)
        with self.applied(model), later.applied(model):
            parameters = named_parameters(model)
            dense = {
                name: Entry("dense", self.entries[name].shape, {"": parameters[name].detach().cpu().clone()})
                for name in self.entries
                if name in both
            }
        return Edit({**self.entries, **later.entries, **dense}, metadata, additions)

    def masks(self) -> dict[str, Tensor]:
        """The entries that are masks, bool tensors by parameter name, True where the weight is kept."""
        return {name: entry.mask() for name, entry in self.entries.items() if entry.kind in MASKS}

    @property
    def size_bytes(self) -> int:
        """Bytes of the stored tensors."""
        distinct = {id(entry.parts): entry.parts for entry in self.entries.values()}
        stored = [*distinct.values(), *(addition.tensors() for addition in self.additions)]
        return sum(part.nbytes for parts in stored for part in parts.values())

    @torch.no_grad()
    def apply(self, model: TextToImage, *, fingerprint: str | None = None) -> None:
        """Change ``model`` in place and keep what is replaced; if that fails, the model is as it was.

        Args:
            model: The model that the edit was made from.
            fingerprint: ``model.fingerprint()`` if the caller knows it; it is computed otherwise.

        Raises:
            ValueError: The edit is applied already, or the model is not the one that it was made from.
        """
        if model in self._applications:
            raise ValueError(f"The edit is already applied to {model.name!r}; revert it first.")
        base = self.metadata.get("base")
        if self and base is not None and base != (fingerprint or model.fingerprint()):
            raise ValueError(
                f"The edit was made from another model than {model.name!r} (fingerprints differ: the edit's begins "
                f"{base[:12]}); load the model that it was made from, in the same precision."
            )
        parameters = named_parameters(model)
        for name, entry in self.entries.items():
            if name not in parameters or tuple(parameters[name].shape) != entry.shape:
                raise ValueError(
                    f"The edit changes {name!r} of shape {list(entry.shape)} and {model.name!r} has no such parameter; "
                    "load the model that the edit was made from."
                )
        replaced = {name: parameters[name].detach().clone() for name in self.entries}
        with ExitStack() as undone:
            undone.callback(_put_back, parameters, replaced)
            detach = attach_all(self.additions, model)
            undone.callback(detach)
            for name, entry in self.entries.items():
                parameters[name].copy_(entry.value(parameters[name]))
            undone.pop_all()
        self._applications[model] = Application(replaced, detach)

    @torch.no_grad()
    def revert(self, model: TextToImage) -> None:
        """Give ``model`` back what :meth:`apply` replaced, bit for bit.

        Raises:
            ValueError: The edit is not applied to this model.
        """
        if model not in self._applications:
            raise ValueError(f"The edit is not applied to {model.name!r}; there is nothing to revert.")
        application = self._applications.pop(model)
        application.detach()
        _put_back(named_parameters(model), application.replaced)

    def unedited(self, model: TextToImage) -> TextToImage:
        """A second model beside ``model`` that is as ``model`` was before :meth:`apply`.

        It counts its own evaluations, and shares every tensor with ``model`` but those that the edit replaced, which
        are the ones kept for :meth:`revert`; so it takes no memory of note.

        Raises:
            ValueError: The edit is not applied to this model.
        """
        if model not in self._applications:
            raise ValueError(f"The edit is not applied to {model.name!r}; that model is unedited itself.")
        application = self._applications[model]
        parts = (model.network, model.text_encoder)
        shared = {id(tensor): tensor for part in parts for tensor in (*part.parameters(), *part.buffers())}
        parameters = named_parameters(model)
        for name, original in application.replaced.items():
            shared[id(parameters[name])] = nn.Parameter(original, requires_grad=False)
        # Additions hang on the modules, whose copies are to be without them.
        application.detach()
        try:
            unedited = copy.copy(model)
            unedited.denoiser = model.denoiser.with_network(copy.deepcopy(model.network, shared))
            unedited.text_encoders = model.text_encoders.with_first(copy.deepcopy(model.text_encoder, shared))
        finally:
            application.detach = attach_all(self.additions, model)
        unedited.unet_evaluations = unedited.unet_gradients = unedited.text_encodings = 0
        return unedited

    @contextmanager
    def applied(self, model: TextToImage, *, fingerprint: str | None = None) -> Iterator[None]:
        """Apply to ``model`` for the length of the context."""
        self.apply(model, fingerprint=fingerprint)
        try:
            yield
        finally:
            self.revert(model)

    def fingerprint(self) -> str:
        """SHA-256 of what it changes, whatever its metadata say."""
        tensors, changes = self._stored()
        return _checksum(json.dumps(changes, sort_keys=True), tensors)

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors that a file holds, and what its header says of them."""
        owners: dict[int, str] = {}
        for name, entry in self.entries.items():
            owners.setdefault(id(entry.parts), name)
        tensors = {
            f"{name}:{part}" if part else name: tensor
            for name, entry in self.entries.items()
            if owners[id(entry.parts)] == name
            for part, tensor in entry.parts.items()
        }
        for place, addition in enumerate(self.additions):
            tensors |= {
                f"{_ADDED}{place}:{name}": tensor.detach().cpu().contiguous()
                for name, tensor in addition.tensors().items()
            }
        return tensors, {
            "entries": {
                name: {
                    "kind": entry.kind,
                    "shape": entry.shape,
                    "fill": entry.fill,
                    "seed": entry.seed,
                    "parts_of": owners[id(entry.parts)],
                }
                for name, entry in self.entries.items()
            },
            "additions": [{"kind": stored_kind(each), "settings": each.settings()} for each in self.additions],
        }

    def save(self, path: Path) -> None:
        """Write a safetensors file; dense tensors go by their parameter's own name, so that other tools read them."""
        tensors, changes = self._stored()
        header = {
            **self.metadata,
            "schema": SCHEMA,
            "versions": {package: version(package) for package in ("torch", "diffusers", "transformers")},
            **changes,
        }
        described = json.dumps(header)
        with replacing(path) as partial:
            save_file(tensors, partial, metadata={"edit": described, "checksum": _checksum(described, tensors)})

    @classmethod
    def load(cls, path: Path) -> "Edit":
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no edit, it is damaged, or a newer version wrote it.
        """
        if not path.is_file():
            raise FileNotFoundError(f"There is no edit at {path}; give the path of a file that Edit.save wrote.")
        try:
            with safe_open(path, "pt") as file:
                stored = file.metadata() or {}
                header = json.loads(stored.get("edit", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); make the edit again.") from error
        if not isinstance(header, dict) or "entries" not in header:
            raise ValueError(f"{path} is a safetensors file but no edit: its header lacks the edit's description.")
        if header.get("schema") != SCHEMA:
            raise ValueError(
                f"{path} is an edit of format {header.get('schema')!r} and this version reads {SCHEMA}; "
                "make the edit again or use the version that wrote it."
            )
        # Edits of before there were checksums have none.
        if stored.get("checksum", checksum := _checksum(stored["edit"], tensors)) != checksum:
            raise ValueError(f"{path} is damaged: its checksum does not fit its content; make the edit again.")
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.partition(":")
            parts.setdefault(name, {})[part] = tensor
        entries = {
            name: Entry(
                described["kind"],
                tuple(described["shape"]),
                parts.get(described.get("parts_of", name), {}),
                described["fill"],
                described.get("seed", 0),
            )
            for name, described in header.pop("entries").items()
        }
        for name, entry in entries.items():
            if not entry.is_sound():
                raise ValueError(f"{path} is damaged at {name!r} (kind {entry.kind!r}); make the edit again.")
        try:
            additions = tuple(
                addition_class(described["kind"]).restored(described["settings"], parts.get(f"{_ADDED}{place}", {}))
                for place, described in enumerate(header.pop("additions", []))
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged or of a newer version: {error}") from error
        return cls(entries, header, additions)


def _checksum(described: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of an edit's description and of the names, types, shapes and values of its tensors."""
    digest = hashlib.sha256(described.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _put_back(parameters: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> None:
    for name, original in originals.items():
        parameters[name].copy_(original)
