"""Parameters in the output of ``dataflex-cli list``: types, ranges and defaults as in YAML, without Python types."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, TypeAdapter

from dataflex import cli
from dataflex.api.params import InputPath, Shares
from dataflex.commands.listing import in_yaml, render, values_in_words


class Point(BaseModel):
    kind: Literal["point"] = "point"
    x: float


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "whole number"),
        (float | None, "number or null"),
        (bool, "true or false"),
        (Annotated[int, Field(ge=1)], "whole number >= 1"),
        (Annotated[float, Field(gt=0, le=1)], "number in (0, 1]"),
        (Annotated[float, Field(ge=0, lt=1)] | None, "number in [0, 1) or null"),
        (Annotated[float, Field(lt=2)], "number < 2"),
        (Annotated[int, Field(ge=16, multiple_of=2)], "whole number >= 16, a multiple of 2"),
        (Literal["high", "low"], "one of high, low"),
        (Literal["on", "3"], "one of 'on', '3'"),
        (list[int], "list of whole numbers"),
        (list[Annotated[float, Field(ge=0)]], "list of numbers >= 0"),
        (Annotated[list[str], Field(min_length=1)], "list of text, not empty"),
        (list[list[float]], "list of lists of numbers"),
        (tuple[float, float], "list of 2 numbers"),
        (dict[str, float], "mapping of text to numbers"),
        (InputPath, "path"),
        (Shares | None, "list of numbers, mapping of text to numbers, path or null"),
        (list[Point] | str, "list of mappings {kind: point, x} or text"),
        (Any, "value"),
    ],
)
def test_types_are_shown_in_words(annotation: Any, words: str) -> None:
    assert values_in_words(annotation) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (0.1, "0.1"), ("x", "x"), ("on", "'on'"), ((0.3, 0.6), "[0.3, 0.6]"), ([], "[]")],
)
def test_defaults_are_shown_as_in_yaml(value: Any, text: str) -> None:
    assert in_yaml(value) == text


def test_no_python_type_is_shown() -> None:
    lines = [line for line in render(None, []).splitlines() if line.startswith("      ")]
    assert len(lines) > 150
    for line in lines:
        head = line.split(": ", 1)[0] if "mapping {" not in line else line
        assert not re.search(r"None|True|False|typing|dataflex\.|class|\bstr\b|\bint\b|\bfloat\b|dict|\|", head), line
    assert "      focus (one of high, medium, low; default medium): " in render("loss", [])


def test_the_range_that_is_shown_is_the_one_that_is_checked() -> None:
    """A number at and beside the ends of every range that ``list`` shows."""
    from dataflex.api import registry

    registry.load_components([])
    ranges = 0
    for family in registry.FAMILIES:
        for cls in registry.available(family).values():
            for name, field in cls.Params.model_fields.items():
                shown = re.fullmatch(
                    r"(?:whole )?number in ([\[(])([-\d.e]+), ([-\d.e]+)([\])])( or null)?",
                    values_in_words(field.annotation, field.metadata),
                )
                if shown is None:
                    continue
                ranges += 1
                check = TypeAdapter(Annotated[(field.annotation, *field.metadata)])
                for end, closed in ((shown[2], shown[1] == "["), (shown[3], shown[4] == "]")):
                    accepted = True
                    try:
                        check.validate_python(float(end))
                    except ValueError:
                        accepted = False
                    assert accepted == closed, (cls, name)
    assert ranges > 10


def test_the_command_names_plugins_that_cannot_be_loaded(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    assert cli.main(["list", "--plugins", str(tmp_path / "empty.py")]) == 2
    assert f"plugins: {tmp_path / 'empty.py'}: it registers no component" in capsys.readouterr().err


def test_an_unknown_name_is_refused_with_the_nearest_name_and_the_option_for_own_methods(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["list", "lesss"]) == 2
    found = capsys.readouterr().err
    assert "unknown family or method 'lesss'; did you mean 'less'? Known: " in found
    assert found.endswith(" A method of your own needs --plugins FILE.\n")
