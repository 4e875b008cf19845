"""Export of a model with a guard: a folder of diffusers whose pipeline brings the guard's code with it."""

import ast
import inspect
import json
import shutil
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from diffusion.files import write_atomically
from diffusion.loading.pipeline_kinds import GUARDED_PIPELINE
from diffusion.model import TextToImage
from erasure.addition import addition_class, stored_kind
from erasure.edit import Edit
from erasure.export import export
from experiments.results import guarded_pipeline

CODE = "pipeline"
"""Name of the file with the code, without its ending."""

_OURS = {"diffusion", "erasure", "experiments"}


def require_exportable(model: TextToImage, edit: Edit) -> None:
    """See to it that a pipeline with code of its own can do what ``edit`` adds to ``model``.

    Raises:
        ValueError: It cannot; the sentence names the addition and says why.
    """
    for addition in edit.additions:
        kind = stored_kind(addition)
        if "." in kind:
            raise ValueError(
                f"The edit adds {kind} to the model, which is of a plugin, whose code may need more than one file; "
                "keep the edit beside the base model."
            )
        if len(model.text_encoders.all_encoders) > 1:
            raise ValueError(
                f"The edit adds {kind} to the model, and {model.name!r} has two text encoders, for which no guard is "
                "exported; keep the edit beside the base model."
            )
        if (predicts := model.process.config.get("prediction_type", "epsilon")) != "epsilon":
            raise ValueError(
                f"The edit adds {kind} to the model, which thinks in noise, and {model.name!r} predicts "
                f"{predicts}; keep the edit beside the base model."
            )


def export_guarded(model: TextToImage, edit: Edit, folder: Path) -> None:
    """Write the edited model as a folder whose ``pipeline.py`` puts the edit's additions into it.

    Args:
        model: The unedited model.
        edit: What to change in it and to add to it.
        folder: Where to; its parent must exist.

    Raises:
        ValueError: The folder exists and is not empty; or see :func:`require_exportable`.
    """
    require_exportable(model, edit)
    code = pipeline_source(sorted({stored_kind(addition) for addition in edit.additions}))
    export(model, Edit(edit.entries, edit.metadata), folder)
    try:
        edit.save(folder / guarded_pipeline.EDIT_FILE)
        write_atomically(folder / f"{CODE}.py", code)
        index = folder / "model_index.json"
        described = json.loads(index.read_text(encoding="utf-8"))
        described["_class_name"] = [CODE, GUARDED_PIPELINE]
        write_atomically(index, json.dumps(described, indent=2) + "\n")
    except BaseException:
        # Half of it would load without its guard.
        shutil.rmtree(folder, ignore_errors=True)
        raise


def pipeline_source(kinds: Sequence[str]) -> str:
    """One Python file with the pipeline and all that additions of these ``kinds`` need; it imports nothing of ours.

    Raises:
        ValueError: Two kinds use one name for different things.
    """
    parts = [
        _Part(import_module("diffusion.guard")),
        _Part(import_module("erasure.addition"), {"Addition", "set_guard"}),
        *(_Part(import_module(addition_class(kind).__module__)) for kind in kinds),
        _Part(guarded_pipeline),
    ]
    defined = [name for part in parts for name in part.names]
    if twice := sorted({name for name in defined if defined.count(name) > 1}):
        raise ValueError(
            f"The edit adds {', '.join(kinds)} to the model, which no one file can hold, as they share the names "
            f"{', '.join(twice)}; keep the edit beside the base model."
        )
    imports = sorted({line for part in parts for line in part.imports})
    classes = ", ".join(f'"{kind}": {addition_class(kind).__name__}' for kind in kinds)
    body = "\n\n\n".join(part.source for part in parts)
    doc = inspect.getdoc(guarded_pipeline) or ""
    return (
        f'"""{doc}\n"""\n\nfrom __future__ import annotations\n\n'
        + "\n".join(imports)
        + f"\n\n{body}\n\n\nGuardedPipeline.kinds = {{{classes}}}\n"
    )


class _Part:
    """What a module gives to the file.

    Args:
        module: The module.
        wanted: Names of the functions and classes that are taken; None for all that is in it.

    Attributes:
        imports: Its imports of other people's modules, a line each.
        names: What it defines.
        source: The rest of it, as it is written.
    """

    def __init__(self, module: ModuleType, wanted: Collection[str] | None = None) -> None:
        text = inspect.getsource(module)
        lines = text.splitlines()
        self.imports: list[str] = []
        self.names: list[str] = []
        kept: list[str] = []
        nodes = ast.parse(text).body
        for node in nodes[1:] if ast.get_docstring(ast.parse(text)) else nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._import(node)
                continue
            name = _defined(node)
            if wanted is not None and name not in wanted:
                continue
            self.names += [name] if name else []
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
            blank = "\n\n" if isinstance(node, ast.ClassDef | ast.FunctionDef) and kept else ""
            kept.append(blank + "\n".join(lines[first - 1 : node.end_lineno]))
        self.source = "\n".join(kept)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        module = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
        if module.partition(".")[0] not in _OURS:
            self.imports.append(ast.unparse(node))


def _defined(node: ast.stmt) -> str | None:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return node.target.id if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else None
