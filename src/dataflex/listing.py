"""What ``dataflex-cli list`` prints: families, methods and their parameters, read from the registry."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from dataflex import registry
from dataflex.components import Component
from dataflex.errors import ConfigError, unknown


def render(name: str | None, plugins: list[str]) -> str:
    """Return the text for a family, a method, or everything.

    Raises:
        ConfigError: if nothing is called ``name``.
    """
    registry.load_components(plugins)
    keys = {family: key for key, family in registry.CONFIG_KEYS.items()}
    blocks = []
    for family, key in keys.items():
        methods = registry.available(family)
        whole = name in (None, family, key)
        shown = methods if whole else {method: cls for method, cls in methods.items() if method == name}
        if shown:
            head = f"{key}: ({family})"
            blocks.append("\n".join([head, *(_method(method, cls) for method, cls in shown.items())]))
    if not blocks:
        known = [*keys, *keys.values(), *(method for family in keys for method in registry.available(family))]
        raise ConfigError(unknown("family or method", str(name), sorted(set(known))))
    return "\n\n".join(blocks)


def _method(method: str, cls: type[Component]) -> str:
    summary = (cls.__doc__ or "").strip().splitlines()
    lines = [f"  {method:<14} {summary[0] if summary else ''}"]
    lines += [f"      {_parameter(name, field)}" for name, field in cls.Params.model_fields.items()]
    return "\n".join(lines)


def _parameter(name: str, field: FieldInfo) -> str:
    kind = str(field.annotation)
    kind = field.annotation.__name__ if isinstance(field.annotation, type) else kind.replace("typing.", "")
    default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
    return f"{name} ({kind}, {default}): {field.description or ''}"
