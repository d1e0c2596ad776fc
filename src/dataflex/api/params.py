"""Parameters of components: their base class, and the types of fields that several share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from dataflex.data.domain_names import by_domain, with_text_keys
from dataflex.errors import ConfigError, unknown
from dataflex.files import distinct


@dataclass(frozen=True)
class PathMark:
    """Marks text of a parameter as the path of a file or folder; the run record then holds it absolute."""

    is_written: bool
    """Whether the run may write it; else text that names nothing on this machine, as a hub's model, stays as it is."""


InputPath = Annotated[str, PathMark(is_written=False)]
"""Field type of a file or folder that is read, from the working directory; also of a name on a hub."""


OutputPath = Annotated[str, PathMark(is_written=True)]
"""Field type of a folder that may be written, from the working directory."""


def path_fields(params: type[BaseModel]) -> dict[str, PathMark]:
    """Return which fields of a parameter model hold paths, also in lists or beside other types."""
    found = {}
    for name, info in params.model_fields.items():
        marks = [mark for mark in info.metadata if isinstance(mark, PathMark)] or list(_path_marks(info.annotation))
        if marks:
            found[name] = marks[0]
    return found


def _path_marks(annotation: Any) -> Iterator[PathMark]:
    for part in get_args(annotation):
        if isinstance(part, PathMark):
            yield part
        else:
            yield from _path_marks(part)


class ComponentParams(BaseModel):
    """Base of every component's parameters: typed, with defaults, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ValidationParams(ComponentParams):
    """Which samples stand for what the model is to become good at."""

    validation: list[str] | None = Field(
        None, description="Data sets of the validation samples, each a sub-task; none: eval_dataset (or val_size)."
    )
    subtask_column: str | None = Field(
        None, description="Column of the raw data whose values divide the validation samples into sub-tasks."
    )

    @field_validator("validation", mode="before", json_schema_input_type=str | list[str | int | float | bool] | None)
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, list) and not [name for name in names if str(name).strip()]:
            raise ValueError("must name a data set")
        return [str(name).strip() for name in names] if isinstance(names, list) else names


class EmbeddingParams(ComponentParams):
    """Which vectors stand for samples, and of what they are made; a component reads them with ``ctx.embeddings``."""

    encoder: InputPath | None = Field(
        None,
        description="What makes the embeddings: the folder or hub name of an encoder, asset:all-minilm-l6-v2, or the "
        "http(s) URL of an OpenAI-compatible service; none: the model in training.",
    )
    encoder_backend: Literal["auto", "transformers", "sentence_transformers", "vllm", "openai"] = Field(
        "auto", description="What runs the encoder; auto: by the form of its name and its files."
    )
    layer: int = Field(
        -1, description="Layer of the model in training, or of an encoder run by transformers: 0 are its embeddings."
    )
    pooling: Literal["auto", "mean", "weighted_mean", "first", "last"] = Field(
        "auto", description="How token states become one vector; auto: the encoder's own, mean without one."
    )
    embedding_text: Literal["all", "prompt", "response"] = Field(
        "all", description="Which part of a sample is embedded; the response are the tokens that are trained on."
    )
    embedding_folder: OutputPath | None = Field(
        None, description="Folder in which embeddings of an encoder are kept; none: embeddings in the output_dir."
    )


def _form_of_shares(value: Any) -> Any:
    numbers = value.values() if isinstance(value, dict) else value
    if isinstance(value, str) or (
        isinstance(value, dict | list)
        and all(isinstance(share, int | float) and not isinstance(share, bool) for share in numbers)
    ):
        return with_text_keys(value) if isinstance(value, dict) else value
    raise ValueError("must be a list of numbers, a mapping of domain names to numbers, or a JSON file that holds one")


Shares = Annotated[list[float] | dict[str, float] | InputPath, BeforeValidator(_form_of_shares)]
"""Domain shares as a user gives them: numbers in domain order, a mapping by name, or a JSON file that holds one."""


def shares_of(given: Shares, names: tuple[str, ...], key: str = "proportions") -> NDArray[np.float64]:
    """Return given shares in the order of ``names``, shape (K,), as they are; ``key`` is the parameter they are of.

    Raises:
        ConfigError: if they do not fit the names, are negative or not finite, or are all zero.
    """
    shares = _read_shares(given) if isinstance(given, str) else given
    problem = shares_problem(shares, names)
    if problem is not None:
        raise ConfigError(f"dataflex.mix.{key}: {problem}")
    if isinstance(shares, dict):
        named = by_domain(shares, names)
        shares = [named[name] for name in names]
    return np.asarray(shares, dtype=np.float64)


def shares_problem(given: Shares | None, names: tuple[str, ...]) -> str | None:
    """Return what is wrong with given shares of the domains ``names``, or None."""
    if given is None:
        return None
    if isinstance(given, str):
        try:
            given = _read_shares(given)
        except ConfigError as error:
            return str(error)
    if isinstance(given, dict):
        given = by_domain(given, names)
        strange = [unknown("domain", name, names) for name in given if name not in names]
        if strange:
            return strange[0]
        missing = [name for name in names if name not in given]
        if missing:
            return f"has no share of {', '.join(missing)}; every domain needs one, 0 leaves it out."
    elif len(given) != len(names):
        return f"has {len(given)} numbers for {len(names)} domains ({', '.join(names)})."
    values = list(given.values()) if isinstance(given, dict) else given
    if any(not np.isfinite(share) or share < 0 for share in values):
        return f"must be finite and not negative, got {given}."
    if sum(values) <= 0:
        return f"must have a positive sum, got {given}."
    return None


def _read_shares(path: str) -> dict[str, float]:
    """Return the shares by name in a JSON file: its ``proportions``, or the file itself.

    Raises:
        ConfigError: if there is no such file, or it holds no mapping of names to numbers.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=distinct)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path!r} cannot be read: {error}") from error
    shares = found.get("proportions", found) if isinstance(found, dict) else found
    if not isinstance(shares, dict) or not all(
        isinstance(share, int | float) and not isinstance(share, bool) for share in shares.values()
    ):
        raise ConfigError(f"{path!r} holds no mapping of domain names to numbers.")
    return {name: float(share) for name, share in shares.items()}
