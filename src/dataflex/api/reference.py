"""Shared parts of methods that compare the model's losses with the losses of a frozen reference model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from dataflex.api.params import ComponentParams, InputPath, OutputPath
from dataflex.assets import PREFIX
from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray
from dataflex.files import is_path

if TYPE_CHECKING:
    from dataflex.api.needs import RunView
    from dataflex.data.samples import Samples

NumberType = Literal["float32", "byte"]
"""How a table stores a loss: as float32, or in one byte with an error (see ``probe/loss_code.py``)."""

TABLE_FILE = "reference.json"
"""File with the contents of a table of reference losses."""
TABLE_FORMATS: dict[NumberType, int] = {"float32": 1, "byte": 2}
"""Number type of a table's losses -> format of the table."""

_OWN_TOKENS = ("add_tokens", "add_special_tokens", "new_special_tokens_config", "init_special_tokens")
"""LLaMA-Factory keys that change the tokenizer of the model folder."""


class ReferenceParams(ComponentParams):
    """Parameters for the source of the reference losses: a model, a table or both.

    Example:
        >>> from pydantic import Field
        >>> from dataflex import ReferenceParams
        >>> class ExcessParams(ReferenceParams):
        ...     clip: float = Field(10.0, gt=0, description="Largest excess loss that counts.")
        >>> ExcessParams(reference_model="models/base").names_reference
        True
    """

    reference_is_optional: ClassVar[bool] = False
    """Whether a component can work without a reference."""

    reference_model: InputPath | None = Field(
        None, description="The frozen reference: folder (of a model or an adapter) or hub name; same tokenizer."
    )
    reference_losses: OutputPath | None = Field(
        None,
        description="Folder of a table of the reference's token losses; reference_model computes missing ones.",
    )

    @field_validator("reference_model", "reference_losses")
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        return value if value is None or not value.startswith("~") else str(Path(value).expanduser())

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if not self.names_reference and not self.reference_is_optional:
            raise ValueError("needs reference_model, reference_losses or both")
        return self

    @property
    def names_reference(self) -> bool:
        """Whether the parameters name a model or a table."""
        return self.reference_model is not None or self.reference_losses is not None

    def reference_problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield the problems of the reference that can be found without loading it."""
        table = None if self.reference_losses is None else read_table(Path(self.reference_losses))
        if self.reference_model is None and table is None:
            yield (
                "reference_losses",
                f"{self.reference_losses!r} holds no table of reference losses (it has no {TABLE_FILE}); set "
                "reference_model to compute the table.",
            )
        if self.reference_model is None:
            return
        if self.reference_model.startswith(PREFIX):
            yield (
                "reference_model",
                f"{self.reference_model!r} is not supported here; set the folder that "
                f"`dataflex-cli assets {self.reference_model.removeprefix(PREFIX)}` prints.",
            )
            return
        folder = Path(self.reference_model)
        # If the parent exists, a missing folder is a wrong path and not a hub name.
        beside = folder.parent != Path() and folder.parent.is_dir()
        if not is_path(self.reference_model) and not beside:
            return
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            yield "reference_model", f"no model in {self.reference_model!r} (it has no config.json)."
            return
        problem = tokenizer_problem(folder, run.llamafactory)
        if problem is not None:
            yield "reference_model", problem

    def table_problem(self, names: tuple[str, ...] | None) -> tuple[str, str] | None:
        """Return a parameter and its problem if the table lacks a domain or a file, and no model can compute losses.

        Args:
            names: the domains of the run. None if they are not known.
        """
        if self.reference_losses is None or self.reference_model is not None:
            return None
        table = read_table(Path(self.reference_losses))
        if table is None:
            return None
        there = table["domains"]
        missing = [name for name in names or () if name not in there]
        if missing:
            return (
                "reference_losses",
                f"{self.reference_losses!r} has no losses of {', '.join(missing)} (it has {', '.join(there)}); set "
                "reference_model to compute them.",
            )
        damages = (damage_of(Path(self.reference_losses), table, name) for name in (there if names is None else names))
        damage = next(filter(None, damages), None)
        return None if damage is None else ("reference_losses", damage)


class Reference(Protocol):
    """The reference of a component in its decisions, ``ctx.reference``. All ranks must make the same calls.

    The reference losses never change, so the loss of a sample is computed once per run, or read from the table.

    Example:
        A selector that scores samples by the excess loss over the reference:

        >>> from dataflex import Losses, Needs, ReferenceParams, Selector, SelectorParams
        >>> class ExcessParams(SelectorParams, ReferenceParams):
        ...     pass
        >>> class Excess(Selector[ExcessParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(Losses(),), reference=self.params)
        ...     def score(self, ctx, candidates):
        ...         return ctx.probe.measure(Losses(), candidates) - ctx.reference.losses(candidates)
    """

    def losses(self, indices: IndexArray, samples: Samples | None = None) -> ScoreArray:
        """Return the reference's token-mean loss of each sample, shape (n,), float32. NaN without a trained token.

        Args:
            indices: indices into ``samples``, (n,).
            samples: the samples, such as ``ctx.validation``. None means the pool of the run. Losses of samples outside
                this pool need the model; a table alone is not enough.
        """
        ...

    def token_losses(self, indices: IndexArray, samples: Samples | None = None) -> list[NDArray[np.float32]]:
        """Return the reference's losses of the trained tokens of each sample, in the order of the tokens."""
        ...


def read_table(folder: Path) -> dict[str, Any] | None:
    """Return the description of a table of reference losses, or None if the folder has no table.

    Its ``type`` is the number type of the losses.
    """
    try:
        found = json.loads((folder / TABLE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = next((kind for kind, number in TABLE_FORMATS.items() if _format_of(found) == number), None)
    return None if kind is None else {**found, "type": kind}


def _format_of(found: Any) -> Any:
    return found.get("format") if isinstance(found, dict) else None


def files_of_domain(folder: Path, kind: NumberType, file: str) -> dict[str, Path]:
    """Return the files of a domain of a table by their content.

    Args:
        folder: folder of the table.
        kind: number type of the losses.
        file: the name that the table gives to the domain's files.
    """
    if kind == "float32":
        return {"losses": folder / f"{file}.f32", "counts": folder / f"{file}-counts.npy"}
    found = {name: folder / f"{file}-{name}.npy" for name in ("steps", "ends", "means")}
    return {"losses": folder / f"{file}.u8", **found}


def damage_of(folder: Path, table: Mapping[str, Any], domain: str) -> str | None:
    """Return which file of a domain is missing or has the wrong size, or None if no damage is found.

    No file is read, so that this costs nothing.
    """
    entry, kind = table["domains"][domain], table["type"]
    if not isinstance(entry, dict) or not {"file", "samples", "samples_sha256"} <= entry.keys():
        return f"{folder / TABLE_FILE} does not describe the losses of {domain!r}: it is damaged."
    files = files_of_domain(folder, kind, entry["file"])
    absent = next((path for path in files.values() if not path.is_file()), None)
    if absent is not None:
        return f"the table lacks a file of {domain!r} ({absent}). Make it again in another folder."
    tokens, size = entry.get("tokens"), files["losses"].stat().st_size
    width = {"float32": 4, "byte": 1}[kind]
    if tokens is None or size == width * tokens:
        return None
    return f"{files['losses']} holds {size // width} losses of {domain!r} and not {tokens}: it is damaged."


def tokenizer_problem(reference: Path, llamafactory: Mapping[str, Any]) -> str | None:
    """Return how the tokenizer files of the reference differ from the model's, or None if no difference is found."""
    own = Path(str(llamafactory.get("model_name_or_path") or "")).expanduser()
    if any(llamafactory.get(key) for key in _OWN_TOKENS):
        return None
    files = [folder / "tokenizer.json" for folder in (own, reference)]
    if not all(file.is_file() for file in files):
        return None
    from tokenizers import Tokenizer

    mine, theirs = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    return vocabulary_problem(mine, theirs, str(reference))


def vocabulary_problem(mine: dict[str, int], theirs: dict[str, int], reference: str) -> str | None:
    """Return why a reference cannot read this run's token ids, or None if the ids are the same.

    Args:
        mine: token -> id in the run's tokenizer.
        theirs: token -> id in the reference's tokenizer.
        reference: the name of the reference, for the message.
    """
    other = next((token for token, number in mine.items() if theirs.get(token) != number), None)
    if other is None:
        return None
    found = f"id {theirs[other]}" if other in theirs else "missing"
    return (
        f"{reference!r} has another tokenizer: token {other!r} is id {mine[other]} in this run and {found} in the "
        f"reference ({len(mine)} and {len(theirs)} tokens). Token losses can only be compared under one tokenizer."
    )
