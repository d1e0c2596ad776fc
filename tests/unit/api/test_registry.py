"""Components of one's own that cannot work: told before anything is loaded, with class, file and line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataflex import ComponentParams, Mixer, Order, Selector, cli
from dataflex.api import measurement, registry
from dataflex.api.component import state_of
from dataflex.config.loading import split_config
from dataflex.errors import ComponentError, ConfigError

HEAD = "import numpy as np\nfrom dataflex import *\nfrom pydantic import Field\n"  # three lines
SCORE = "    def score(self, ctx, candidates):\n        return candidates\n"
MEASUREMENT = '@register_measurement("mine")\nclass Mine(Measurement):\n    def measure(self, batch): pass\n'


def selector(body: str, before: str = "") -> str:
    """Return a plug-in whose decorator is in line 4, or after what is ``before`` it."""
    return f'{HEAD}{before}@register("selector", "mine")\nclass Mine(Selector):\n{body}'


def params(line: str, base: str = "SelectorParams") -> str:
    return f"class MineParams({base}):\n    {line}\n"


# name -> (the file, its line that is named, what else is said)
BROKEN: dict[str, tuple[str, int | None, list[str]]] = {
    "bad syntax": (f"{HEAD}def f(:\n", 4, ["SyntaxError"]),
    "a missing module": (f"{HEAD}import nothing_of_that_name\n", 4, ["No module named 'nothing_of_that_name'"]),
    "a module beside it": (f"{HEAD}import beside\n", 4, ["'beside'", "PYTHONPATH"]),
    "an error": (f"{HEAD}\n1 / 0\n", 5, ["ZeroDivisionError: division by zero"]),
    "an error further down": (f"{HEAD}np.zeros(-1)\n", 4, ["ValueError", "negative"]),
    "an exit": (f"{HEAD}raise SystemExit(3)\n", 4, ["SystemExit: 3"]),
    "nothing": (
        HEAD,
        None,
        ["registers no component", "@dataflex.register(family, name)", "@dataflex.register_measurement(name)"],
    ),
    "an error after a measurement": (f"{HEAD}{MEASUREMENT}1 / 0\n", 7, ["ZeroDivisionError"]),
    "no family": (f'{HEAD}@register("selectr", "mine")\nclass Mine: pass\n', 4, ["'selectr'", "'selector'"]),
    "another family": (f'{HEAD}@register("mixer", "mine")\nclass Mine(Order): pass\n', 4, ["Mine", "extend Mixer"]),
    "a function": (f'{HEAD}@register("mixer", "mine")\ndef mine(): pass\n', 4, ["mine", "extend Mixer"]),
    "no name": (f'{HEAD}@register("selector", 3)\nclass Mine(Selector):\n{SCORE}', 4, ["text", "got 3"]),
    "no score": (selector("    pass\n"), 4, ["Mine does not define score() or choose()"]),
    "a misspelt score": (selector(SCORE.replace("score", "scores")), 4, ["score() or choose()", "it has scores()"]),
    "no mix": (f'{HEAD}@register("mixer", "mine")\nclass Mine(Mixer): pass\n', 4, ["Mine does not define mix()"]),
    "no loss weights": (
        f'{HEAD}@register("mixer", "mine")\nclass Mine(Mixer):\n    weighs_loss = True\n'
        "    def mix(self, ctx):\n        return [1]\n",
        4,
        ["Mine does not define loss_weights() or update_weights()"],
    ),
    "no arrange": (f'{HEAD}@register("order", "mine")\nclass Mine(Order): pass\n', 4, ["define arrange()"]),
    "an order that draws and does not say so": (
        f'{HEAD}@register("order", "mine")\nclass Mine(Order):\n    def draw(self, ctx): pass\n',
        4,
        ["Mine.draws must be True in an order that defines draw()"],
    ),
    "no weigh": (f'{HEAD}@register("weighter", "mine")\nclass Mine(Weighter): pass\n', 4, ["define weigh()"]),
    "a weigh of the earlier release": (
        f'{HEAD}@register("weighter", "mine")\nclass Mine(Weighter):\n    def weigh(self, losses, step): pass\n',
        4,
        ["Mine.weigh(self, losses, step) must take (self, batch).", "Write def weigh(self, batch), a StepBatch"],
    ),
    "no parameters": (selector(f"    def __init__(self): pass\n{SCORE}"), 4, ["Mine.__init__(self)", "(self, params)"]),
    "too few arguments": (
        selector("    def score(self, candidates):\n        return candidates\n"),
        4,
        ["Mine.score(self, candidates) must take (self, ctx, candidates)"],
    ),
    "other arguments of a hook": (
        selector(f"    def on_step(self): pass\n{SCORE}"),
        4,
        ["Mine.on_step(self) must take (self, statistics)"],
    ),
    "no model of parameters": (selector(f"    Params = dict\n{SCORE}"), 4, ["Mine.Params", "ComponentParams"]),
    "no model of parameters in brackets": (
        f'{HEAD}class P:\n    pass\n@register("selector", "mine")\nclass Mine(Selector[P]):\n{SCORE}',
        6,
        ["Mine.Params", "ComponentParams"],
    ),
    "parameters without a rule": (
        selector(f"    Params = MineParams\n{SCORE}", params("x: int = 1", "ComponentParams")),
        6,
        ["MineParams has no rule and temperature", "SelectorParams"],
    ),
    "a default of another type": (
        selector(f"    Params = MineParams\n{SCORE}", params('x: int = "much"')),
        6,
        ["MineParams.x", "default 'much'", "integer"],
    ),
    "a default out of range": (
        selector(f"    Params = MineParams\n{SCORE}", params("x: float = Field(2.0, gt=0, lt=1)")),
        6,
        ["MineParams.x", "default 2.0", "less than 1"],
    ),
    "a word nobody knows": (
        selector(f'    chooses = "sometimes"\n{SCORE}'),
        4,
        ["Mine.chooses must be one of True, False, got 'sometimes'"],
    ),
    "a flag of an earlier release": (
        selector(f"    needs_validation = True\n{SCORE}"),
        4,
        ["Mine.needs_validation belongs to an earlier release and is not read", "Needs(validation=self.params)"],
    ),
    "an estimate of an earlier release": (
        selector(f"    def expected_forwards(self, run):\n        return 1.0\n{SCORE}"),
        4,
        ["Mine.expected_forwards belongs to an earlier release and is not read", "measured_samples()"],
    ),
    "a mixer without the parameters of mixers": (
        f'{HEAD}{params("x: int = 1", "ComponentParams")}@register("mixer", "mine")\nclass Mine(Mixer):\n'
        "    Params = MineParams\n    def mix(self, ctx):\n        return [1]\n",
        6,
        ["MineParams has no max_epochs_per_domain", "extend dataflex.MixerParams"],
    ),
    "state of a parameter that is none": (
        selector(f'    state_depends_on = {{"temprature"}}\n{SCORE}'),
        4,
        ["Mine.state_depends_on", "'temprature'", "'temperature'"],
    ),
    "a base that is not filled in": (
        f"{HEAD}from dataflex.mixers.base_loss_weights import LossWeightMixer\n"
        '@register("mixer", "mine")\nclass Mine(LossWeightMixer): pass\n',
        5,
        ["Mine does not define updated()"],
    ),
    "a gradient selector that scores nothing": (
        f"{HEAD}from dataflex.selectors.base_gradients import InfluenceSelector\n"
        '@register("selector", "mine")\nclass Mine(InfluenceSelector): pass\n',
        5,
        ["Mine does not define score() or choose()"],
    ),
    "a name that is taken": (
        f'{HEAD}@register("selector", "loss")\nclass Mine(Selector):\n{SCORE}',
        4,
        ["selector 'loss' is already registered by dataflex.selectors.loss.LossSelector"],
    ),
}
UNMADE: dict[str, tuple[str, int, list[str]]] = {
    "no super": (selector(f"    def __init__(self, params): pass\n{SCORE}"), 4, ["super().__init__(params)"]),
    "an error": (
        selector(f"    def __init__(self, params):\n        super().__init__(params)\n        {{}}['x']\n{SCORE}"),
        8,
        ["Mine", "cannot be constructed", "KeyError: 'x'"],
    ),
}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what a test registers."""
    registry.load_components([])
    for module in (registry, measurement):
        monkeypatch.setattr(module, "_registered", dict(module._registered))


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    file = folder / name
    file.write_text(f"{text}# {folder}\n")  # a file is known by its contents
    return file


def said_of(file: Path, section: dict[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        split_config({"dataflex": {"plugins": [str(file)], **(section or {})}}).build_components()
    (problem,) = error.value.problems
    return str(problem)


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_whose_components_cannot_work(tmp_path: Path, name: str) -> None:
    text, line, words = BROKEN[name]
    (tmp_path / "beside.py").write_text("")
    file = write(tmp_path, text)
    before = dict(registry._registered), measurement.available_measurements()
    said = said_of(file)
    place = str(file) if line is None else f"{file}, line {line}"
    assert said.startswith(f"dataflex.plugins: {place}: ")
    for word in words:
        assert word in said, said
    assert (registry._registered, measurement.available_measurements()) == before


def test_a_file_may_register_nothing_but_measurements(tmp_path: Path) -> None:
    registry.load_components([str(write(tmp_path, f"{HEAD}{MEASUREMENT}"))])
    assert "mine" in measurement.available_measurements()


@pytest.mark.parametrize("name", UNMADE)
def test_a_component_that_cannot_be_made(tmp_path: Path, name: str) -> None:
    text, line, words = UNMADE[name]
    file = write(tmp_path, text)
    said = said_of(file, {"select": {"method": "mine"}})
    assert said.startswith("dataflex.select: Mine ")
    for word in [f"{file}, line {line}", *words]:
        assert word in said, said


def test_two_files_of_one_name(tmp_path: Path) -> None:
    first = write(tmp_path, selector(SCORE), "first.py")
    second = write(tmp_path, selector(SCORE) + "# another\n", "second.py")
    with pytest.raises(ConfigError) as error:
        split_config({"dataflex": {"plugins": [str(first), str(second), str(tmp_path / "secnd.py")]}})
    taken, gone = (str(problem) for problem in error.value.problems)  # together
    assert f"{second}, line 4: selector 'mine' is already registered by Mine ({first}, line 4)" in taken
    assert "no file" in gone
    assert "did you mean" not in gone
    with pytest.raises(ConfigError, match=r"no file 'secnd.py' in .*; did you mean 'second.py'\?"):
        registry.find_plugin("secnd.py", tmp_path)


def test_a_good_one_with_everything(tmp_path: Path) -> None:
    body = (
        "    Params = MineParams\n    def __init__(self, params, extra=None):\n        super().__init__(params)\n"
        "    def score(self, ctx, candidates, *, more=1):\n        return candidates\n"
        "    def on_step(self, *whatever):\n        pass\n"
    )
    fields = "x: int = Field(1, ge=1)\n    y: list[str] = []\n    z: float"
    file = write(tmp_path, selector(body, params(fields)))
    config = split_config({"dataflex": {"plugins": [str(file)], "select": {"method": "mine", "z": 2}}})
    built = config.build_components().select[0].component
    assert built is not None
    assert built.params.z == 2


def failing(folder: Path) -> tuple[Path, Selector]:
    text = selector(
        "    def score(self, ctx, candidates):\n        return helper(candidates)\n"
        "    def choose(self, ctx, candidates, count):\n        return np.zeros(count, dtype='nothing')\n",
        "def helper(candidates):\n    return {}[candidates] if candidates else next(iter(()))\n",
    )
    file = write(folder, text)
    found = (
        split_config({"dataflex": {"plugins": [str(file)], "select": {"method": "mine"}}})
        .build_components()
        .select[0]
        .component
    )
    assert found is not None
    return file, found


def test_an_error_under_a_component_names_it_and_the_line(tmp_path: Path) -> None:
    file, component = failing(tmp_path)
    with pytest.raises(KeyError) as own:
        component.score(None, "x")  # type: ignore[arg-type]
    said = registry.failure_of_component(own.value)
    assert said == f"selector 'mine' failed in helper, {file}, line 5: KeyError: 'x'"
    with pytest.raises(RuntimeError, match="generator raised StopIteration") as stopped:
        next(component.score(None, "").__next__() for _ in [1])  # type: ignore[arg-type]
    assert (
        registry.failure_of_component(stopped.value)
        == f"selector 'mine' failed in helper, {file}, line 5: StopIteration"
    )
    with pytest.raises(TypeError) as below:
        component.choose(None, None, 3)  # type: ignore[arg-type]
    said = registry.failure_of_component(below.value)
    assert said is not None
    assert said.startswith(f"selector 'mine' failed in choose, {file}, line 11: TypeError: ")


def test_an_error_of_the_framework_is_none_of_a_component(tmp_path: Path) -> None:
    failing(tmp_path)
    with pytest.raises(ZeroDivisionError) as error:
        1 / 0  # noqa: B018
    assert registry.failure_of_component(error.value) is None
    loss = registry.get("selector", "loss")
    with pytest.raises(AttributeError) as built_in:
        loss(loss.Params()).choose(None, np.arange(3), 1)  # type: ignore[arg-type]
    assert registry.failure_of_component(built_in.value) is None


def test_the_command_line_tells_it_and_keeps_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, component = failing(tmp_path)
    monkeypatch.setitem(cli._COMMANDS, "version", lambda options: component.score(None, "x"))  # type: ignore[arg-type]
    assert cli.main(["version"]) == 2
    text = capsys.readouterr().err
    expected = f"dataflex: selector 'mine' failed in helper, {file}, line 5: KeyError: 'x'. DATAFLEX_TRACEBACK=1 prints"
    assert text.startswith(expected)
    assert "Traceback" not in text
    monkeypatch.setenv("DATAFLEX_TRACEBACK", "1")
    assert cli.main(["version"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.delenv("DATAFLEX_TRACEBACK")
    monkeypatch.setitem(cli._COMMANDS, "version", lambda options: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["version"])


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": [1, {2}]}}, ["a set as 'a.b[1]'"]),
        ({"a": np.array([None])}, ["array of object as 'a'"]),
        ({"a": {3: 1}}, ["'a.3'"]),
        ([1], ["a list as its state"]),
    ],
)
def test_a_state_that_no_checkpoint_holds(state: object, words: list[str]) -> None:
    class Stateful(Order):
        family, name = "order", "stateful"

        def arrange(self, ctx, selection):  # type: ignore[no-untyped-def]
            return selection.indices

        def state_dict(self):  # type: ignore[no-untyped-def]
            return state

    with pytest.raises(ComponentError) as error:
        state_of(Stateful(ComponentParams()))
    for word in ["order 'stateful' (Stateful.state_dict, ", f"{Path(__file__).name}, line", *words]:
        assert word in str(error.value)


def test_a_state_that_a_checkpoint_holds() -> None:
    class Stateful(Mixer):
        family, name = "mixer", "stateful"

        def state_dict(self):  # type: ignore[no-untyped-def]
            return {"a": [1, None, "x", True, (2.5,)], "b": {"c": np.arange(3), "d": np.float32(1)}}

    component = Stateful(Mixer.Params())
    assert state_of(component)["b"]["d"] == 1
