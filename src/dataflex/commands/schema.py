"""The JSON schema of a configuration, for editors: made from the parameter models of the registered methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from dataflex.api import registry
from dataflex.api.component import Component
from dataflex.config.loading import CHAINS, SECTION, DataFlexConfig, EntryOptions
from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically

DRAFT = "http://json-schema.org/draft-07/schema#"
"""The version of JSON schema. Language servers for YAML read this one completely, and later ones in part."""

_REFERENCE = "#/definitions/{model}"


def write_schema(plugins: list[str], output: Path | None) -> str:
    """Return the schema as JSON text, or write the text to a file and return a line that names the file.

    Args:
        plugins: Python files that register further components, as in ``dataflex.plugins``.
        output: the file to write. If None, nothing is written.

    Raises:
        ConfigError: if a plug-in cannot be loaded or the file cannot be written.
    """
    text = json_text(schema(plugins), indent=2, ensure_ascii=False)
    if output is None:
        return text
    try:
        write_atomically(output, f"{text}\n".encode())
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written: {error.strerror}.") from error
    return f"schema: {output}"


def schema(plugins: list[str]) -> dict[str, Any]:
    """Return the JSON schema of a configuration file with a ``dataflex:`` section.

    The section is complete: unknown keys, wrong types and values out of range do not validate. LLaMA-Factory's keys
    beside the section are not described, so every key is allowed there.

    Args:
        plugins: Python files that register further components, as in ``dataflex.plugins``.

    Raises:
        ConfigError: if a plug-in cannot be loaded.
    """
    registry.load_components(plugins)
    methods = {key: registry.available(family) for key, family in registry.CONFIG_KEYS.items()}
    params = [cls.Params for family in methods.values() for cls in family.values()]
    models, definitions = _schemas_of([DataFlexConfig, EntryOptions, *params])
    section = models[DataFlexConfig]
    section["type"] = ["object", "null"]
    entries = models[EntryOptions]["properties"]
    for key, family in methods.items():
        beside = {"select": entries, "weight": {"every": entries["every"]}}.get(key, {})
        definitions[registry.CONFIG_KEYS[key]] = _family(key, family, models, beside)
        section["properties"][key] = _choice(key, DataFlexConfig.model_fields[key].description or "")
    return {
        "$schema": DRAFT,
        "description": "A LLaMA-Factory configuration with a dataflex: section.",
        "type": "object",
        "properties": {SECTION: section},
        "additionalProperties": True,
        "definitions": dict(sorted(definitions.items())),
    }


class _Schemas(GenerateJsonSchema):
    """Generator of schemas without titles, which accept anything for a type that JSON schema cannot express."""

    ignored_warning_kinds = {"non-serializable-default", "skipped-choice"}

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Return False: a title would repeat the key in other letters."""
        return False

    def handle_invalid_for_json_schema(self, schema: core_schema.CoreSchema, error_info: str) -> JsonSchemaValue:
        """Return the schema of any value, for a type of a plug-in's own."""
        return {}

    def tuple_schema(self, schema: core_schema.TupleSchema) -> JsonSchemaValue:
        """Return the schema of a tuple as draft 7 writes it: ``items`` instead of ``prefixItems``."""
        found = super().tuple_schema(schema)
        if "prefixItems" in found:
            found["items"] = found.pop("prefixItems")
        return found


def _schemas_of(models: Iterable[type[BaseModel]]) -> tuple[dict[type[BaseModel], Any], dict[str, Any]]:
    """Return the schema of each model, and the definitions that the schemas refer to, by name."""
    unique = list(dict.fromkeys(models))
    references, whole = models_json_schema(
        [(model, "validation") for model in unique], ref_template=_REFERENCE, schema_generator=_Schemas
    )
    definitions = whole.get("$defs", {})
    for definition in definitions.values():
        definition.pop("title", None)
    names = {model: str(references[model, "validation"]["$ref"]).rpartition("/")[2] for model in unique}
    for model, name in names.items():
        _fill_in_defaults(model, definitions[name])
    used = set(_references(list(definitions.values())))
    return {model: definitions[name] for model, name in names.items()}, {
        name: definition for name, definition in definitions.items() if _REFERENCE.format(model=name) in used
    }


def _references(value: Any) -> Iterator[str]:
    """Yield every reference in a schema."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        yield from _references(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def _fill_in_defaults(model: type[BaseModel], found: dict[str, Any]) -> None:
    """Add the defaults that a factory makes: pydantic leaves them out."""
    for name, field in model.model_fields.items():
        if field.default_factory is not None:
            found["properties"][name]["default"] = field.get_default(call_default_factory=True)


def _family(
    key: str, family: Mapping[str, type[Component]], models: Mapping[type[BaseModel], Any], beside: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the schema of one component: the name of a method, and the parameters of that method.

    Each method has an ``if`` and ``then`` instead of an alternative of ``oneOf``. An editor then reports the one wrong
    parameter, and not that no alternative fits.

    Args:
        key: the configuration key of the family.
        family: the methods by name.
        models: the schemas of the parameter models.
        beside: the schemas of the keys that stand beside the parameters.
    """
    kind = registry.CONFIG_KEYS[key]
    conditions = []
    for name, cls in family.items():
        found = models[cls.Params]
        method = {"const": name, "description": _summary(cls)}
        then = {
            "description": _summary(cls),
            "properties": {"method": method, **beside, **found.get("properties", {})},
            "required": ["method", *found.get("required", [])],
            "additionalProperties": False,
        }
        chosen = {"type": "object", "required": ["method"], "properties": {"method": {"const": name}}}
        conditions.append({"if": chosen, "then": then})
    summaries = [_summary(cls) for cls in family.values()]  # a key of editors, which validators ignore
    any_method = {"description": f"Name of the {kind}.", "enum": list(family), "enumDescriptions": summaries}
    return {"required": ["method"], "properties": {"method": any_method}, "allOf": conditions}


def _summary(cls: type[Component]) -> str:
    """Return the first line of a component's docstring."""
    lines = (cls.__doc__ or "").strip().splitlines()
    return lines[0] if lines else ""


def _choice(key: str, description: str) -> dict[str, Any]:
    """Return the schema of a family's key: one component, null or, if the family allows that, a list of components."""
    reference = {"$ref": f"#/definitions/{registry.CONFIG_KEYS[key]}"}
    # A keyword such as `required` or `items` applies to values of its type alone, so no `anyOf` is needed.
    found: dict[str, Any] = {"description": description, "default": None, "type": ["object", "null"]}
    found["allOf"] = [reference]
    if key in CHAINS:
        found["type"] = ["object", "array", "null"]
        found |= {"minItems": 1, "items": {"type": "object", "allOf": [reference]}}
    if key == "select":
        found["properties"] = {"keep": False}
    return found
