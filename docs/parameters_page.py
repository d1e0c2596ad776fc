"""Writes the page of all keys and parameters from the pydantic models, when the site is built."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from dataflex.api import registry
from dataflex.commands.listing import in_yaml, values_in_words
from dataflex.config.loading import CHAINS, DataFlexConfig, EntryOptions

HEAD = """# All keys and parameters

Every key of the `dataflex:` section, and every parameter of every method, with values, defaults and meanings. The
tables are made from the models that read a configuration. `dataflex-cli list` prints the same parameters, those of your
own components included. [Configuration](configuration.md) says how the keys work together, and the page of a
[method](methods/README.md) has its formula, its source and its cost.
"""

TITLES = {"select": "Selectors", "mix": "Mixers", "order": "Orders", "weight": "Weighters"}
METHODS = Path(__file__).with_name("methods")


def page() -> str:
    """Return the text of the page, for the methods that DataFlex itself has."""
    registry.load_components([])
    parts = [HEAD, "## Keys of the section\n", _table(DataFlexConfig)]
    parts += ["## Beside the parameters of a selector or a weighter\n", _table(EntryOptions)]
    for key, family in registry.CONFIG_KEYS.items():
        parts.append(f"## {TITLES[key]}\n")
        for name, cls in registry.available(family).items():
            if (METHODS / f"{key}-{name}.md").is_file():
                summary = (cls.__doc__ or "").strip().splitlines()[0]
                parts.append(f"### `{key}: {name}`\n\n{summary} [More](methods/{key}-{name}.md)\n")
                parts.append(_table(cls.Params) if cls.Params.model_fields else "No parameters.\n")
    return "\n".join(parts)


def _table(model: type[BaseModel]) -> str:
    """Return the fields of a model as a table."""
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{in_yaml(field.get_default(call_default_factory=True))}`"
        values = values_in_words(field.annotation, field.metadata)
        if model is DataFlexConfig and name in registry.CONFIG_KEYS:
            values = "mapping, list of mappings or null" if name in CHAINS else "mapping or null"
        cells = (f"`{name}`", values, default, field.description or "")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
