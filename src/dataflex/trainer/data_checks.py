"""Checks of a run's loaded samples."""

from __future__ import annotations

import logging

from dataflex import distributed
from dataflex.data.pool import Pool
from dataflex.errors import ConfigError, Problem
from dataflex.trainer.inputs import RunData, RunInputs

logger = logging.getLogger(__name__)


def check_pool(inputs: RunInputs, pool: Pool) -> None:
    """Check with every component that it can be used with the samples of the pool.

    Raises:
        ConfigError: if a component reports a problem. The error lists the problems of all components.
    """
    found = [
        Problem(f"dataflex.{key}.{parameter}", message)
        for key, component in inputs.components.items()
        for parameter, message in component.pool_problems(pool)
    ]
    if found:
        raise ConfigError(problems=found)


def check_data(inputs: RunInputs, data: RunData) -> None:
    """Compare the data of all processes, and the main process's data with the checkpoint that the run resumes from.

    Raises:
        ConfigError: on every process, if the samples of the processes differ in their lengths.
        CheckpointError: on every process, if the checkpoint was written for other data.
    """
    if distributed.world_size() > 1 and len(set(distributed.on_each(data.outline))) > 1:
        raise ConfigError(
            "dataset: the processes have different training samples. They must read the same files with the same "
            "settings. Let one process tokenize the data beforehand (tokenized_path), and start the run again."
        )
    if inputs.resume is None:
        return
    state = inputs.resume.state

    def compared() -> str | None:
        data.check(state, inputs.methods)
        return data.says_of_evaluation(state)

    line = distributed.on_main(compared)
    if line is not None and distributed.rank() == 0:
        logger.warning(line)
