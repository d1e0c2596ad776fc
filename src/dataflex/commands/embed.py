"""``dataflex-cli embed``: compute and store the embeddings of samples and validation samples, without training."""

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
    """The arguments of a command line.

    Attributes:
        config: the YAML file.
        overrides: ``key=value`` texts.
        arguments: the whole command line after the program's name, with which further processes are started.
        output: folder of the embeddings. None means the folder in which a run of the YAML file looks for them.
    """

    config: Path
    overrides: list[str]
    arguments: list[str]
    output: Path | None


def embed(asked: Asked) -> int:
    """Compute the embeddings that the components of a YAML file read, and return the exit status.

    Args:
        asked: the arguments.

    Raises:
        ConfigError: for errors that the user can correct.
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
    """Return the configuration for embedding only, made from the configuration of a training.

    Args:
        config: the configuration of the training.
        output: folder of the embeddings. None means the folder in which a run looks for them.

    Returns:
        The configuration, and whether embeddings of the model in training are needed.

    Raises:
        ConfigError: if no component reads embeddings, or if the model is sharded over processes.
    """
    needs = config.build_components().needs(config)
    wanted = {key: asked.embeddings for key, asked in needs.items() if asked.embeddings is not None}
    if not wanted:
        raise ConfigError(
            f"{config.source}: no component of {SECTION}: reads embeddings. Name one that does, for example "
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
    """Compute the embeddings, and print the folder and the shape of each set of embeddings.

    Args:
        config: the configuration that :func:`prepared` returned.
        with_model: whether the model in training is loaded.
    """
    from dataflex.integrations.llamafactory.run import load_only

    load_only(config, _embed_with_model if with_model else None)


def _embed_with_model(run: LoadedRun, model: LoadedModel) -> None:
    """Compute the embeddings of the model in training, with its weights as they were loaded."""
    from dataflex.embedding.model_run import ModelRun

    root, pool = Path(str(run.inputs.config.llamafactory["output_dir"])), model.probe.pool
    for key, params in run.inputs.wanted_embeddings.items():
        if params.encoder is not None:
            continue
        own, held = ModelRun(model.probe, model_embeddings(params), root), run.data.validation.get(key)
        told(partial(own.embed, pool), "samples")
        if held is not None:
            told(partial(own.embed, held), "validation samples")
