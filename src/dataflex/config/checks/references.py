"""Checks of the references that components need, without loading them."""

from __future__ import annotations

from collections.abc import Iterator

from dataflex.config.checks.values import dataset_names, truthy
from dataflex.config.loading import SECTION, RunConfig
from dataflex.errors import Problem


def problems_of_references(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of references, under the key of the component that needs the reference."""
    components = config.build_components()
    names = dataset_names(config)
    # Otherwise the domains of the table are not the data sets but one domain for all, or the values of a column.
    are_domains = components.plans_data and config.dataflex is not None and config.dataflex.domain_column is None
    for key, component in components.items():
        params = component.needs(config).reference
        if params is None:
            continue
        for parameter, message in params.reference_problems(config):
            yield Problem(f"{SECTION}.{key}.{parameter}", message)
        problem = params.table_problem(names if are_domains and names else None)
        if problem is not None:
            yield Problem(f"{SECTION}.{key}.{problem[0]}", problem[1])
        if params.reference_losses is not None and truthy(config, "streaming"):
            yield Problem(
                f"{SECTION}.{key}.reference_losses",
                "a table stores losses by the index of a sample, and streamed samples have none; set streaming: "
                "false, or name only a reference_model.",
            )
