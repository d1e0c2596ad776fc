"""Checks of a configuration before anything is loaded: keys, packages, files, data sets, and keys that exclude others.

This package imports neither torch nor LLaMA-Factory. It reads the names of LLaMA-Factory's arguments from the installed
source files.
"""

from __future__ import annotations

from dataflex.config.checks.data import problems_of_data
from dataflex.config.checks.files import MODEL_FILES, problems_of_files
from dataflex.config.checks.forms import other_form
from dataflex.config.checks.keys import problems_of_keys
from dataflex.config.checks.packages import problems_of_packages
from dataflex.config.checks.plan import problems_of_plan, problems_of_work
from dataflex.config.checks.section import SPECIAL_LOSSES, problems_of_section
from dataflex.config.checks.together import problems_of_combinations
from dataflex.config.checks.values import dataset_names, measures
from dataflex.config.loading import RunConfig
from dataflex.data.stages import STAGES
from dataflex.errors import ConfigError, Problem

__all__ = ["MODEL_FILES", "SPECIAL_LOSSES", "STAGES", "dataset_names", "measures", "problems_of"]


def problems_of(config: RunConfig) -> list[Problem]:
    """Return every problem of a configuration that can be found without loading anything.

    For a file of another launcher only that problem is returned, because most of its other keys are unknown too.
    """
    foreign = other_form(config)
    if foreign is not None:
        return [foreign]
    try:
        config.build_components().needs(config)
    except ConfigError as error:
        return [*problems_of_keys(config), *error.problems]
    found = list(problems_of_keys(config))
    wrong = {problem.key for problem in found}  # a wrong value is reported once, not by every check that reads the key
    for check in (
        problems_of_files,
        problems_of_data,
        problems_of_work,
        problems_of_packages,
        problems_of_combinations,
    ):
        found += (problem for problem in check(config) if problem.key not in wrong)
    if config.dataflex is not None:
        found += (problem for problem in problems_of_section(config) if problem.key not in wrong)
    # The plan is computed from keys and files. While these have problems, it would only add consequences of them.
    return list(dict.fromkeys(found)) or problems_of_plan(config)
