"""``dataflex-cli embed``: the embeddings of a YAML's samples and validation samples, kept on disk, without training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex.commands.offline import alone
from dataflex.commands.train import checked_config, print_notes
from dataflex.config.loading import SECTION, RunConfig
from dataflex.config.processes import is_worker
from dataflex.embedding.making import told
from dataflex.embedding.of_model import model_embeddings
from dataflex.embedding.stored import FOLDER
from dataflex.errors import ConfigError

if TYPE_CHECKING:
    from dataflex.trainer.run import LoadedModel, LoadedRun


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Attributes:
        config: the YAML file.
        overrides: ``key=value`` texts.
        arguments: the whole command line after the program's name, for further processes.
        output: folder to write to; none: where a run of the YAML looks for them.
    """

    config: Path
    overrides: list[str]
    arguments: list[str]
    output: Path | None


def embed(asked: Asked) -> int:
    """Make the embeddings that the components of a YAML ask for, and return the exit status.

    Raises:
        ConfigError: for what the user can mend.
    """
    from dataflex.integrations.llamafactory import launch

    config = checked_config(asked.config, asked.overrides, offline=True).with_assets()
    config, with_model = prepared(config, asked.output)
    if not is_worker():
        print_notes(config)
        if launch.wants_many():
            return launch.run_many(asked.arguments)
    run(config, with_model)
    return 0


def prepared(config: RunConfig, output: Path | None) -> tuple[RunConfig, bool]:
    """Return a training configuration as one that only embeds, and whether that takes the model in training.

    Raises:
        ConfigError: if no component asks for embeddings, or the model is spread over processes.
    """
    needs = config.build_components().needs(config)
    wanted = {key: asked.embeddings for key, asked in needs.items() if asked.embeddings is not None}
    if not wanted:
        raise ConfigError(
            f"{config.source}: no component of {SECTION}: reads embeddings; name one that does, as "
            f"{SECTION}.select.method=near, and its encoder."
        )
    params = dict(config.params)
    folder = output or Path(str(config.llamafactory["output_dir"])) / FOLDER
    for key, asked in wanted.items():
        if asked.encoder is not None and (output is not None or asked.embedding_folder is None):
            cls, given = params[key]
            params[key] = (cls, given.model_copy(update={"embedding_folder": str(folder)}))
    with_model = any(asked.encoder is None for asked in wanted.values())
    return alone(replace(config, params=params), folder, "embedding"), with_model


def run(config: RunConfig, with_model: bool) -> None:
    """Make the embeddings; each line that is printed says where some are, and their shape.

    Args:
        config: what :func:`prepared` returned.
        with_model: whether the model in training is loaded.
    """
    from dataflex.integrations.llamafactory.run import load_only

    load_only(config, _embed_with_model if with_model else None)


def _embed_with_model(run: LoadedRun, model: LoadedModel) -> None:
    """Make the embeddings that the model in training gives as it is."""
    from dataflex.embedding.model_run import ModelRun

    root, pool = Path(str(run.inputs.config.llamafactory["output_dir"])), model.probe.pool
    for key, params in run.inputs.wanted_embeddings.items():
        if params.encoder is not None:
            continue
        own, held = ModelRun(model.probe, model_embeddings(params), root), run.data.validation.get(key)
        told(partial(own.embed, pool), "samples")
        if held is not None:
            told(partial(own.embed, held), "validation samples")
