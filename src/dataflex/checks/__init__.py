"""What can be said about a run before anything is loaded: LLaMA-Factory's keys, the data sets, and what goes together.

Nothing here imports torch or LLaMA-Factory; the names of LLaMA-Factory's arguments are read from its source files.
"""

from __future__ import annotations

from dataflex.checks.arguments import dataset_names, llamafactory_fields, llamafactory_keys, templates
from dataflex.checks.data import problems_of_data
from dataflex.checks.files import MODEL_FILES, problems_of_files
from dataflex.checks.keys import problems_of_keys
from dataflex.checks.plan import problems_of_plan, problems_of_work
from dataflex.checks.section import SPECIAL_LOSSES, STAGES, problems_of_section
from dataflex.config import RunConfig
from dataflex.errors import Problem

__all__ = [
    "MODEL_FILES",
    "SPECIAL_LOSSES",
    "STAGES",
    "dataset_names",
    "llamafactory_fields",
    "llamafactory_keys",
    "problems_of",
    "templates",
]


def problems_of(config: RunConfig) -> list[Problem]:
    """Return every problem that shows without loading anything."""
    found = [
        *problems_of_keys(config),
        *problems_of_files(config),
        *problems_of_data(config),
        *problems_of_work(config),
    ]
    if config.dataflex is not None:
        found += problems_of_section(config)
    # Its numbers come from keys and files, so what is wrong with those is told alone.
    return found or problems_of_plan(config)
