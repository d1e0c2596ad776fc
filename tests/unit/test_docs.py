"""The documentation agrees with the code: every method, parameter, key and default, and examples that load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dataflex import EmbeddingParams
from dataflex.api import registry
from dataflex.config.checks import SPECIAL_LOSSES, STAGES
from dataflex.config.legacy import FLAT_KEYS, TRAIN_TYPES
from dataflex.config.legacy_parameters import UNUSED_PARAMETERS
from dataflex.config.loading import DataFlexConfig, split_config
from unit.fakes import context, make_pool

DOCS = Path(__file__).parents[2] / "docs"
METHODS = DOCS / "methods"
registry.load_components([])
BUILT_IN = [
    (key, name, cls)
    for key, family in registry.CONFIG_KEYS.items()
    for name, cls in registry.available(family).items()
    if cls.__module__.startswith("dataflex.")
]
HEADINGS = (
    "Formula",
    "Example",
    "Parameters",
    "Source and settings",
    "Cost",
    "Pitfalls",
    "Differences from the source",
)


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of every table row whose first cell is a name in backticks."""
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"\| `(\w+)` \|(.*)\|", line)
        if match:
            found[match[1]] = [cell.strip() for cell in match[2].split("|")]
    return found


def shown(default: Any) -> str:
    """Return a default as it is written in YAML."""
    if default is PydanticUndefined:
        return "required"
    value = list(default) if isinstance(default, tuple) else default
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def check_table(model: type[BaseModel], text: str) -> None:
    table = rows(text)
    assert set(table) == set(model.model_fields)
    for name, field in model.model_fields.items():
        values, default, meaning = table[name]
        given = field.default_factory() if field.default_factory else field.default  # type: ignore[call-arg]
        assert default == shown(given), name
        assert values, name
        if get_origin(field.annotation) is Literal:
            assert all(f"`{choice}`" in values for choice in get_args(field.annotation)), name
        assert meaning.endswith("."), name


def examples(text: str) -> list[dict[str, Any]]:
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)]


@pytest.mark.parametrize("key, name, cls", BUILT_IN, ids=[f"{key}-{name}" for key, name, _ in BUILT_IN])
def test_every_method_has_a_page(key: str, name: str, cls: Any) -> None:
    text = (METHODS / f"{key}-{name}.md").read_text()
    assert text.startswith(f"# {key}: {name}\n")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == list(HEADINGS)
    if cls.Params.model_fields:
        check_table(cls.Params, text)
    else:
        assert "## Parameters\n\nNone.\n" in text
    (example,) = examples(text)
    assert split_config(example).params[key][0] is cls


def test_every_page_is_of_a_built_in_method() -> None:
    pages = {path.stem for path in METHODS.glob("*.md")} - {"README"}
    assert pages == {f"{key}-{name}" for key, name, _ in BUILT_IN}


def test_the_index_lists_every_method() -> None:
    text = (METHODS / "README.md").read_text()
    for key, name, _ in BUILT_IN:
        assert re.search(rf"^\| `{key}` \| \[`{name}`\]\({key}-{name}\.md\) \| .+ \| .+ \|$", text, flags=re.MULTILINE)


def test_every_key_of_the_section_is_documented() -> None:
    text = (DOCS / "configuration.md").read_text()
    section = text.split("## Keys of the section")[1].split("\n## ")[0]
    check_table(DataFlexConfig, section)
    (example,) = examples(text)
    assert set(split_config(example).params) == set(registry.CONFIG_KEYS)


def test_the_list_of_selectors_in_the_guide_is_accepted() -> None:
    (chain,) = examples((DOCS / "guide.md").read_text())
    selectors = split_config(chain).build_components().select
    assert [(entry.keep, entry.every) for entry in selectors] == [(0.5, 4), (None, 1)]


def test_the_page_of_embeddings_has_every_parameter_and_an_example_that_works() -> None:
    text = (DOCS / "embeddings.md").read_text()
    check_table(EmbeddingParams, text.split("## Of the model in training")[0])
    (example,) = examples(text)
    assert split_config(example).params["select"][1].model_dump()["encoder"] == "asset:all-minilm-l6-v2"
    (source,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    try:
        exec(source, names)
    finally:
        registry._registered.pop(("selector", "like"), None)
    like = names["Like"](names["LikeParams"]())
    pool, held = make_pool({"a": 3}), make_pool({"v": 1})
    vectors = {3: np.eye(3), 1: np.array([[0.0, 1.0, 0.0]])}
    ctx = context(pool, validation_pool=held, embedding_source=lambda of: vectors[3 if of is None else of.size])
    assert like.score(ctx, np.array([0, 1])).tolist() == [0, 1]
    assert like.needs(None).embeddings is like.params


def test_the_sections_of_the_page_of_curricula_are_accepted() -> None:
    found = re.findall(r"`(order: \{.*?\})`", (DOCS / "curricula.md").read_text())
    assert len(found) >= 9
    for text in found:
        assert split_config({"dataflex": yaml.safe_load(text)}).params["order"], text


def test_every_refused_key_is_documented() -> None:
    text = (DOCS / "configuration.md").read_text().split("Refused before")[1].split("\n## ")[0]
    for key in SPECIAL_LOSSES:
        assert re.search(rf"^\| [^|]*`{key}`[^|]*\| `weight`, `fused_loss` \|", text, flags=re.MULTILINE), key
    for stage in STAGES:
        assert f"`{stage}`" in text


def test_the_schema_of_the_editor_line_is_the_file_that_the_command_writes() -> None:
    text = (DOCS / "configuration.md").read_text()
    (named,) = re.findall(r"# yaml-language-server: \$schema=(\S+)", text)
    assert f"dataflex-cli schema --output {named}" in text


def test_every_environment_variable_of_the_launcher_is_documented() -> None:
    package = DOCS.parent / "src" / "dataflex"
    files = (package / "integrations" / "llamafactory" / "launch.py", package / "config" / "processes.py")
    source = "".join(file.read_text() for file in files)
    used = set(re.findall(r"(?:environ\.get|setdefault)\(\"([A-Z_]+)\"", source)) - {"PATH", "RANK", "LOCAL_RANK"}
    text = (DOCS / "guide-processes.md").read_text().split("## Variables of the launcher")[1].split("\n## ")[0]
    assert len(used) > 10
    for name in used:
        assert f"`{name}" in text, name


def test_every_flat_key_is_documented() -> None:
    text = (DOCS / "legacy.md").read_text()
    table = rows(text)
    for name in FLAT_KEYS:
        assert name in table
    for train_type, (key, bucket) in TRAIN_TYPES.items():
        assert f"`{train_type}` -> `{key}`" in table["train_type"][0]
        assert f"`{bucket}`" in table["components_cfg_file"][0]
    for name in UNUSED_PARAMETERS:
        assert f"`{name}`" in text


def test_the_two_examples_of_flat_keys_are_the_same_run(tmp_path: Path) -> None:
    flat, native = examples((DOCS / "legacy.md").read_text())
    (tmp_path / "configs").mkdir()
    components = {"selectors": {"loss": {"params": {"focus": "high"}}}}
    (tmp_path / flat["components_cfg_file"]).write_text(yaml.safe_dump(components))
    assert split_config(flat, base=tmp_path).resolved() == split_config(native).resolved()


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", path.read_text()):
        if target and "://" not in target:
            assert (path.parent / target).exists(), target


def commands(text: str) -> list[str]:
    """Return the lines of code blocks that start with a command, without comments."""
    lines = re.findall(r"^(?: {4})?((?:[A-Z_]+=\S+ )*(?:dataflex-cli|make|pip) .*)$", text, flags=re.MULTILINE)
    return [line.partition("#")[0].rstrip() for line in lines]


@pytest.mark.parametrize(
    ("page", "translation"),
    [
        ("README.md", "README.zh-CN.md"),
        ("docs/tutorials/1-first-selection-run.md", "docs/tutorials/first-selection-run.zh-CN.md"),
    ],
)
def test_a_translation_has_the_same_files_and_commands(page: str, translation: str) -> None:
    text, translated = ((DOCS.parent / name).read_text(encoding="utf-8") for name in (page, translation))
    assert examples(text) == examples(translated)
    assert commands(text) == commands(translated)
    assert len(commands(text)) > 5


def test_modules_named_in_the_architecture_exist() -> None:
    root = DOCS.parent
    named = re.findall(r"[\w/]+\.py\b", (root / "ARCHITECTURE.md").read_text() + (root / "CONTRIBUTING.md").read_text())
    paths = ["/" + str(path.relative_to(root)) for folder in ("src", "tests") for path in (root / folder).rglob("*.py")]
    assert len(named) > 20
    assert not [name for name in named if not any(path.endswith("/" + name) for path in paths)]
