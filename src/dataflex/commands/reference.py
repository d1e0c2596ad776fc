"""``dataflex-cli reference``: compute a table of a frozen model's token losses, without training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex.api import registry
from dataflex.api.reference import NumberType, ReferenceParams, files_of_domain, read_table
from dataflex.commands.train import checked_config, print_notes
from dataflex.config.checks.values import truthy
from dataflex.config.loading import DataFlexConfig, RunConfig
from dataflex.config.processes import is_worker
from dataflex.data.columns import WantedColumn
from dataflex.errors import ConfigError, Problem

if TYPE_CHECKING:
    from dataflex.data.pool import Pool

_OF_THE_TRAINING = (
    "deepspeed", "fsdp", "fsdp_config", "use_unsloth", "use_dft_loss", "use_eaft_loss", "use_asft_loss",
    "label_smoothing_factor", "enable_liger_kernel", "use_liger_kernel",
)  # fmt: skip
"""Keys about the model in training and its loss. A reference is whole on every process, and its loss is plain."""


@dataclass(frozen=True)
class Asked:
    """The arguments of a command line.

    Attributes:
        config: the YAML file.
        overrides: ``key=value`` texts.
        arguments: the whole command line after the program's name, with which further processes are started.
        output: folder of the table.
        model: the reference: folder of a model or of an adapter, hub name, or ``asset:NAME``. None means the
            ``model_name_or_path`` of the file.
        kind: number type of the losses.
    """

    config: Path
    overrides: list[str]
    arguments: list[str]
    output: Path
    model: str | None
    kind: NumberType


@dataclass(frozen=True)
class _Prepared:
    """A configuration that makes a table, and facts of the training that it was made from.

    Attributes:
        config: the configuration.
        planned: whether DataFlex draws the samples of the training.
        columns: raw columns that the training stores with its samples.
    """

    config: RunConfig
    planned: bool
    columns: dict[str, WantedColumn]


def reference(asked: Asked) -> int:
    """Make a table of the reference losses of a YAML file's data sets, and return the exit status.

    Args:
        asked: the arguments.

    Raises:
        ConfigError: for errors that the user can correct.
    """
    from dataflex.integrations.llamafactory import launch

    found: list[_Prepared] = []

    def change(config: RunConfig) -> RunConfig:
        found.append(prepared(config, asked.output))
        return found[0].config

    config = checked_config(asked.config, asked.overrides, offline=True, change=change).with_assets()
    model = _model(asked.model, config)
    if not is_worker():
        print_notes(config)
        if launch.wants_many():
            return launch.run_many(asked.arguments)
    run(replace(found[0], config=config), model, asked.output, asked.kind)
    return 0


def prepared(config: RunConfig, output: Path) -> _Prepared:
    """Return the configuration that makes a table, from the configuration of a training.

    The components are left out, because the table may be one that they need. One that needs nothing stands for them,
    so that the data is loaded as for the training: by data sets or domains, or as a whole.

    Args:
        config: the configuration of the training. Without a ``dataflex:`` section each data set is a domain.
        output: folder of the table.

    Raises:
        ConfigError: if the samples have no index or cannot be computed in batches.
    """
    problems = list(_problems(config))
    if problems:
        raise ConfigError(problems=problems, source=config.source)
    planned = not config.params or config.build_components().plans_data
    family, key, name = ("selector", "select", "full") if planned else ("weighter", "weight", "uniform")
    registry.load_components([])
    cls = registry.available(family)[name]
    given = {name: value for name, value in config.llamafactory.items() if name not in _OF_THE_TRAINING}
    changes = {"do_train": True, "output_dir": str(output), "overwrite_output_dir": True, "report_to": "none"}
    alone = replace(
        config,
        llamafactory={**given, **changes},
        dataflex=config.dataflex or DataFlexConfig(),
        params={key: (cls, cls.Params())},
        options={},
    )
    return _Prepared(alone, planned, config.wanted_columns())


def _problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the settings of a training that a table does not allow."""
    if truthy(config, "streaming"):
        yield Problem(
            "streaming",
            "a table stores losses by the index of a sample, and streamed samples have none; set streaming: false.",
        )
    if truthy(config, "neat_packing") and config.llamafactory.get("flash_attn") == "fa2":
        yield Problem(
            "neat_packing",
            "with flash_attn: fa2 LLaMA-Factory's batches have one sample, but a table is computed in larger ones; set "
            "flash_attn: sdpa, or packing: true instead of neat_packing.",
        )


def _model(given: str | None, config: RunConfig) -> str:
    """Return the name of the reference.

    Raises:
        ConfigError: if its folder has no model, or if its tokenizer has other token ids than the run's.
    """
    from dataflex import assets

    name = given or str(config.llamafactory["model_name_or_path"])
    name = str(Path(assets.resolve(name)).expanduser()) if name.startswith((assets.PREFIX, "~")) else name
    for _, message in ReferenceParams(reference_model=name).reference_problems(config):
        raise ConfigError(f"--model: {message}")
    return name


def run(made: _Prepared, model: str, output: Path, kind: NumberType) -> None:
    """Make a table, and print what it holds.

    Args:
        made: the configuration that :func:`prepared` returned.
        model: the reference.
        output: folder of the table.
        kind: number type of the losses.
    """
    from dataflex.integrations.llamafactory.reference_run import ReferenceRun
    from dataflex.integrations.llamafactory.run import run_until_left

    making = ReferenceRun(made.config, model, output, kind, made.planned, made.columns)
    run_until_left(made.config, making.installed())
    if making.is_main:
        assert making.pool is not None
        print("\n".join(f"dataflex: {line}" for line in lines_of(output, making.pool)), flush=True)


def lines_of(folder: Path, pool: Pool) -> Iterator[str]:
    """Yield what a table holds of a pool: tokens, bytes, errors, and the line that uses it."""
    from dataflex.probe.loss_code import BLOCK
    from dataflex.probe.reference_table import parts_of

    table = read_table(folder)
    assert table is not None
    names = [name for _, name in parts_of(table, pool)]
    entries = [table["domains"][name] for name in names]
    files = [path for each in entries for path in files_of_domain(folder, table["type"], each["file"]).values()]
    size, tokens = sum(path.stat().st_size for path in files), sum(entry["tokens"] for entry in entries)
    each = f"{size / tokens:.3f} bytes a token" if tokens else "no token is trained on"
    yield f"reference losses of {pool.size:,} samples, {tokens:,} tokens as {table['type']} ({each}): {folder}"
    if table["type"] == "byte":
        yield f"error of a loss l: at most sqrt(l m) / 253 + m / 256000, m: the largest of {BLOCK} losses in a row"
        errors, weights = [entry["error"] for entry in entries], [entry["tokens"] / max(1, tokens) for entry in entries]
        pairs = list(zip(errors, weights, strict=True))
        mean = sum(error["mean"] * weight for error, weight in pairs)
        rms = sum(error["rms"] ** 2 * weight for error, weight in pairs) ** 0.5
        largest = max(error["max"] for error in errors)
        yield f"measured against float32: mean {mean:+.1e}, rms {rms:.2g}, largest {largest:.2g}"
    yield f"to use the table, add this line to a component of dataflex: reference_losses: {folder}"
