"""Parameters of components: their base class, and the field types that several components share."""

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
    """Marks a text parameter as the path of a file or folder. The run record stores the path as an absolute path."""

    is_written: bool
    """Whether the run may write the path. If not, text that is no existing path (such as a hub name) stays as it is."""


InputPath = Annotated[str, PathMark(is_written=False)]
"""Field type of a file or folder that is read. Relative paths start at the working directory. Also for hub names."""


OutputPath = Annotated[str, PathMark(is_written=True)]
"""Field type of a folder that may be written. Relative paths start at the working directory."""


def path_fields(params: type[BaseModel]) -> dict[str, PathMark]:
    """Return the fields of a parameter model that hold paths, including fields with lists or unions of paths."""
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
    """Base of the parameters of every component: typed fields with defaults. Unknown keys are refused.

    Example:
        >>> from pydantic import Field
        >>> from dataflex import ComponentParams
        >>> class WindowParams(ComponentParams):
        ...     window: int = Field(100, ge=1, description="Number of steps to average over.")
        >>> WindowParams(window=20)
        WindowParams(window=20)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ValidationParams(ComponentParams):
    """Parameters that choose the validation samples: samples of the tasks that the model should become good at.

    Example:
        >>> from dataflex import ValidationParams
        >>> ValidationParams(validation="gsm8k, mbpp").validation
        ['gsm8k', 'mbpp']
    """

    validation: list[str] | None = Field(
        None,
        description="Data sets of the validation samples, each a sub-task. If null, the data sets of eval_dataset, or "
        "the samples that val_size splits off.",
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
    """Parameters of the embeddings that a component reads with ``ctx.embeddings``.

    Example:
        >>> from dataflex import EmbeddingParams, Needs
        >>> params = EmbeddingParams(layer=6, pooling="mean")
        >>> Needs(embeddings=params).embeddings.layer
        6
    """

    encoder: InputPath | None = Field(
        None,
        description="Source of the embeddings: the folder or hub name of an encoder, asset:all-minilm-l6-v2, or the "
        "http(s) URL of an OpenAI-compatible service. If null, the model in training.",
    )
    encoder_backend: Literal["auto", "transformers", "sentence_transformers", "vllm", "openai"] = Field(
        "auto", description="Library that runs the encoder; auto: chosen by the form of its name and its files."
    )
    layer: int = Field(
        -1, description="Layer of the model in training, or of an encoder run by transformers; 0: the embedding layer."
    )
    pooling: Literal["auto", "mean", "weighted_mean", "first", "last"] = Field(
        "auto", description="How token states become one vector; auto: the encoder's own pooling, otherwise mean."
    )
    embedding_text: Literal["all", "prompt", "response", "image_and_text"] = Field(
        "all",
        description="Part of a sample that is embedded; response: the tokens that are trained on; image_and_text: the "
        "image tokens and all others, as two halves of a vector.",
    )
    embedding_folder: OutputPath | None = Field(
        None, description="Folder that stores the embeddings of an encoder. If null, embeddings in the output_dir."
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
"""Domain shares as a user writes them: a list in domain order, a mapping by name, or a JSON file with a mapping."""


def shares_of(given: Shares, names: tuple[str, ...], key: str = "proportions") -> NDArray[np.float64]:
    """Return the shares in the order of ``names``, shape (K,), without normalising them.

    Args:
        given: the shares as the user wrote them.
        names: the K domains.
        key: the name of the parameter, for the error message.

    Raises:
        ConfigError: if the shares do not match the names, are negative or not finite, or are all zero.

    Example:
        >>> from dataflex import shares_of
        >>> shares_of({"math": 3, "code": 1}, ("code", "math"))
        array([1., 3.])
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
    """Return the problem of the shares for the domains ``names``, or None if the shares are valid.

    Example:
        >>> from dataflex import shares_problem
        >>> shares_problem([0.5, 0.5], ("code", "math", "web"))
        'has 2 numbers for 3 domains (code, math, web).'
    """
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
            return f"has no share of {', '.join(missing)}; every domain needs a share, and 0 excludes it."
    elif len(given) != len(names):
        return f"has {len(given)} numbers for {len(names)} domains ({', '.join(names)})."
    values = list(given.values()) if isinstance(given, dict) else given
    if any(not np.isfinite(share) or share < 0 for share in values):
        return f"must be finite and not negative, got {given}."
    if sum(values) <= 0:
        return f"must have a positive sum, got {given}."
    return None


def _read_shares(path: str) -> dict[str, float]:
    """Return the shares by name in a JSON file: its ``proportions``, or the whole file.

    Raises:
        ConfigError: if the file does not exist or holds no mapping of names to numbers.
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
