"""The page in a browser: every chart shows the record; colours, widths and keys work."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.api.component import Component
from dataflex.mixers.random import RandomMixer
from dataflex.orders.sort import SortOrder
from dataflex.record.reader import read_run
from dataflex.record.schema import Cost, Evaluation, Summary, from_json
from dataflex.report.charts.sections import charts
from dataflex.report.measure import measure
from dataflex.report.report import report
from records import round_lines
from unit.fakes import FakeProbe, ScoreSelector, begin_record, build, make_planner, make_pool, plans
from unit.fakes import raw_plans as raw_tables

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

SIZES = {"alpha": 60, "beta": 30, "gamma <b>$x$": 10}
STEPS, BATCH, ROUNDS = 3, 4, 6
FAMILIES = ("select", "mix", "order", "weight")
READ_CHARTS = """() => Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [
  plot.closest("figure").querySelector("h3").textContent,
  plot._fullData.map((trace) => ({
    name: trace.name, type: trace.type, mode: trace.mode, visible: trace.visible,
    x: Array.from(trace.x), y: Array.from(trace.y),
    error: trace.error_x?.array ? Array.from(trace.error_x.array) : null,
    faint: trace.hoverinfo === "skip",
    look: JSON.stringify([trace.type, trace.line?.dash, trace.marker?.symbol, trace.marker?.pattern?.shape,
      trace.fillpattern?.shape, trace.fillcolor?.replace(/[0-9]+, ?[0-9]+, ?[0-9]+/, "")]),
  })),
]))"""


def evaluation(step: int, shift: float = 0.0) -> dict[str, Any]:
    losses = {"held": 3 - step / 10 + shift, "other <i>": 2 - step / 20 + shift}
    domains = {
        name: {
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "bits_per_byte": loss / 2 if name == "held" else None,
            "tokens": 100 * (i + 1),
            "bytes": 400 if name == "held" else 0,
            "samples": 10,
        }
        for i, (name, loss) in enumerate(losses.items())
    }
    weighted = (losses["held"] + 2 * losses["other <i>"]) / 3
    return {
        "step": step,
        "tokens": 50 * step,
        "train_seconds": 2.0 * step,
        "decision_seconds": 1.0 + step // 3,
        "evaluate_seconds": 0.5 * step,
        "fingerprint": "ab12",
        "domains": domains,
        "token_weighted": {"loss": weighted, "perplexity": float(np.exp(weighted)), "bits_per_byte": 1.0},
        "unweighted": {"loss": sum(losses.values()) / 2, "perplexity": 1.0, "bits_per_byte": None},
    }


def log_entry(step: int, weighted: bool) -> dict[str, Any]:
    entry = {"step": step, "loss": 3 - step / 10 + step % 2 / 20, "dataflex/loss/alpha": 2.5 - step / 20}
    entry |= {"dataflex/loss/beta": 1.5, "dataflex/domain_tokens/alpha": 30 * step, "dataflex/domain_tokens/beta": 20}
    entry |= {"dataflex/tokens": 50 * step, "dataflex/train_seconds": 2.0 * step}
    entry |= {"dataflex/decision_seconds": 1.0 + step // 3, "dataflex/evaluate_seconds": 0.5 * (step // 3)}
    return {**entry, "dataflex/weight_min": 0.5, "dataflex/weight_max": 1 + step / 10} if weighted else entry


def loss_weights(step: int) -> np.ndarray:
    return np.array([0.5, 0.25 + step / 100, 0.25 - step / 100])


def evaluation_entry(step: int) -> dict[str, Any]:
    """What the Trainer logs after an evaluation: the seconds of this one count too."""
    seconds = {key: value for key, value in log_entry(step, False).items() if key.endswith("seconds")}
    return {"step": step, "eval_loss": 9.0, **seconds, "dataflex/evaluate_seconds": 0.5 * (step // 3) + 7}


def task(name: str, value: float, chance: float | None) -> dict[str, Any]:
    form, metric = ("generation", "exact_match") if chance is None else ("multiple_choice", "acc")
    metrics = {metric: {"value": value, "stderr": 0.02}}
    return {"task": name, "form": form, "file": "x", "samples": 100, "num_fewshot": 5, "metrics": metrics} | {
        "chance": chance,
        "notes": [] if chance is None else ["acc cannot be told from chance."],
    }


def make_run(folder: Path, families: tuple[str, ...], shift: float = 0.0) -> Path:
    """Write a run's record with the writer and the planner of real runs; the numbers are made up."""
    pool = make_pool(SIZES, lengths=np.arange(100) % 13 + 1)
    made: dict[str, Component] = {
        "select": ScoreSelector(lambda candidates: np.sin(candidates + shift)),
        "mix": build(RandomMixer),
        "order": build(SortOrder, by="length"),
    }
    components = {family: made[family] for family in families if family != "weight"}
    section = {family: {"method": made[family].name if family in made else "loss"} for family in families}
    methods = {family: each["method"] for family, each in section.items()}
    writer = begin_record(folder, pool, methods, {"stage": "sft", "dataflex": section})
    if components:
        planner = make_planner(pool, steps=STEPS, batch=BATCH, rounds=ROUNDS - 1, warmup=STEPS, **components)
        for number, plan in enumerate(plans(planner, ROUNDS, FakeProbe(np.zeros(pool.size)))):
            writer.round(plan, pool, Cost(0.25 * number, 10, 100))
    steps = range(1, STEPS * ROUNDS + 1)
    if families == FAMILIES:
        for step in steps:
            writer.loss_weights(step, tuple(SIZES), loss_weights(step))
    log = []
    for step in steps:
        log += [log_entry(step, "weight" in families), *([evaluation_entry(step)] if step % 3 == 0 else [])]
    lines = [evaluation(step, shift) for step in steps if step % 3 == 0]
    for line in [*lines, lines[-1]]:
        writer.evaluation(from_json(Evaluation, line, "made up"))
    means = {"eval_token_weighted_loss": 9.0, "eval_unweighted_loss": 9.0, "eval_loss": 9.0}
    state = {"global_step": len(steps), "log_history": [*log, {"step": len(steps), **means}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    cost = {"train_seconds": 36.0, "decision_seconds": 7.0, "evaluate_seconds": 9.0, "overhead_fraction": 7 / 36}
    told = {**cost, "rounds": ROUNDS, "tokens": 900, "steps": len(steps), "evaluation": lines[-1]}
    writer.summary(from_json(Summary, told, "made up"))
    if len(families) == len(FAMILIES):
        (folder / "dataflex" / "tasks").mkdir()
        for each in (task("quiz", 0.26, 0.25), task("arithmetic", 0.4, None)):
            (folder / "dataflex" / "tasks" / f"{each['task']}.json").write_text(json.dumps(each))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    found = {family: make_run(base / family, (family,), 0.3 * (family == "weight")) for family in FAMILIES}
    return {**found, "all": make_run(base / "all", FAMILIES)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


class Opened:
    """A page in the browser, and what it complained about or asked the network for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.page = browser.new_context(**options).new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def drawn(self) -> Opened:
        self.page.wait_for_selector("body[data-state=drawn]", timeout=60_000)
        return self

    def asked_for_nothing(self) -> None:
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []

    def charts(self) -> dict[str, list[dict[str, Any]]]:
        return self.page.evaluate(READ_CHARTS)


@pytest.fixture(scope="module")
def whole(browser: Any, runs: dict[str, Path]) -> Opened:
    """The report of the run in which every family decides."""
    return Opened(browser, report([runs["all"]]), viewport={"width": 1280, "height": 900}).drawn()


def raw_plans(run: Path) -> list[dict[str, list[Any]]]:
    return [table.to_pydict() for table in raw_tables(run)]


def points(traces: list[dict[str, Any]], name: str) -> list[tuple[Any, Any]]:
    (found,) = (trace for trace in traces if trace["name"] == name and not trace["faint"])
    return list(zip(found["x"], found["y"], strict=True))


def close(found: list[tuple[Any, Any]], expected: list[tuple[Any, Any]]) -> None:
    assert [x for x, _ in found] == [x for x, _ in expected]
    np.testing.assert_allclose([y for _, y in found], [y for _, y in expected], rtol=1e-6, atol=1e-7)


def settled(ask: Callable[[], Any], done: Callable[[Any], bool]) -> Any:
    """Return what ``ask`` finds once ``done`` says it is there; after ten seconds, whatever it is."""
    end = time.monotonic() + 10
    while not done(found := ask()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def test_charts_show_the_losses_of_the_record(whole: Opened) -> None:
    shown = whole.charts()
    log = [log_entry(step, True) for step in range(1, 19)]
    clock = [step * 2.0 + 1 + step // 3 + 0.5 * (step // 3) for step in range(1, 19)]
    close(
        points(shown["Training loss against tokens"], "all"), [(each["dataflex/tokens"], each["loss"]) for each in log]
    )
    close(
        points(shown["Training loss against time"], "all"),
        [(s, each["loss"]) for s, each in zip(clock, log, strict=True)],
    )
    close(points(shown["Training loss by domain: all"], "alpha"), [(50 * s, 2.5 - s / 20) for s in range(1, 19)])
    own = shown["Training loss against the domain's own tokens: all"]
    close(points(own, "alpha"), [(30 * s, 2.5 - s / 20) for s in range(1, 19)])
    lines = [evaluation(step) for step in range(3, 19, 3)]
    for kind, key in (("token-weighted", "token_weighted"), ("mean of the sets", "unweighted")):
        expected = [(each["tokens"], each[key]["loss"]) for each in lines]
        close(points(shown[f"Evaluation loss against tokens, {kind}"], "all"), expected)
        seconds = [each["train_seconds"] + each["decision_seconds"] + each["evaluate_seconds"] for each in lines]
        expected = [(at, loss) for at, (_, loss) in zip(seconds, expected, strict=True)]
        close(points(shown[f"Evaluation loss against time, {kind}"], "all"), expected)
    by_domain = shown["Evaluation loss by domain"]
    assert [trace["name"] for trace in by_domain] == ["held", "other &lt;i&gt;"]
    close(points(by_domain, "held"), [(50 * s, 3 - s / 10) for s in range(3, 19, 3)])
    (bits,) = shown["Bits per byte by domain"]
    np.testing.assert_allclose(bits["y"], [1.5 - s / 20 for s in range(3, 19, 3)], rtol=1e-6)
    assert not any("eval_loss" in title for title in shown)


def test_data_charts_show_the_counts_of_the_plans(whole: Opened, runs: dict[str, Path]) -> None:
    shown, made = whole.charts(), raw_plans(runs["all"])
    rounds = round_lines(runs["all"])
    sets = [set(plan["index"]) for plan in made]
    overlap = [len(a & b) / len(a | b) for a, b in itertools.pairwise(sets)]
    close(points(shown["Overlap of consecutive rounds"], "all"), list(enumerate(overlap, start=1)))
    names = {"alpha": "alpha", "beta": "beta", "gamma <b>$x$": "gamma &lt;b&gt;&#36;x&#36;"}
    ever: dict[str, set[int]] = {name: set() for name in SIZES}
    earlier: set[int] = set()
    repeated, seen = [], {name: [] for name in SIZES}
    for plan in made:
        repeats = 0
        for index, name in zip(plan["index"], plan["domain"], strict=True):
            repeats += index in earlier
            earlier.add(index)
            ever[name].add(index)
        repeated.append(repeats / len(plan["index"]))
        for name, found in ever.items():
            seen[name].append(len(found) / SIZES[name])
    assert any(0 < share < 1 for share in repeated)
    close(points(shown["Repeated samples in each round"], "all"), list(enumerate(repeated)))
    for name, curve in seen.items():
        close(points(shown["Share of each domain ever seen: all"], names[name]), list(enumerate(curve)))
        counts = [Counter(plan["domain"])[name] for plan in made]
        close(
            points(shown["Passes over each domain: all"], names[name]),
            list(enumerate(np.cumsum(counts) / SIZES[name])),
        )
        drawn = points(shown["Proportions: all"], names[name])
        shares = [line["proportions"][name] for line in rounds]
        close(drawn, [(STEPS * i, share) for i, share in enumerate([*shares, shares[-1]])])
        assert all(
            abs(share * len(plan["index"]) - count) < 1 for share, plan, count in zip(shares, made, counts, strict=True)
        )
    often = Counter(Counter(index for plan in made for index in plan["index"]).values())
    (bars,) = shown["How often samples were planned"]
    heights = dict(zip(bars["x"], bars["y"], strict=True))
    assert heights.pop("never") == 100 - sum(often.values())
    assert {int(label): count for label, count in heights.items() if count} == often
    scores = shown["Scores of the selected samples: all"]
    medians = [(i, float(np.median(plan["score"]))) for i, plan in enumerate(made) if i]
    close(points(scores, "median"), medians)
    close(points(scores, "highest"), [(i, max(plan["score"])) for i, plan in enumerate(made) if i])


def test_charts_show_costs_weights_and_tasks_of_the_record(whole: Opened) -> None:
    shown = whole.charts()
    assert {bar["name"]: bar["x"] for bar in shown["Seconds by run"]} == {
        "training": [36],
        "decisions": [7],
        "evaluation": [9],
    }
    close(points(shown["Seconds of each decision"], "all"), [(i, 0.25 * i) for i in range(ROUNDS)])
    close(points(shown["Sample weights"], "all max"), [(50 * s, 1 + s / 10) for s in range(1, 19)])
    for i, name in enumerate(["alpha", "beta", "gamma &lt;b&gt;&#36;x&#36;"]):
        weights = [(step, loss_weights(step)[i]) for step in range(1, 19)]
        close(points(shown["Loss weights of the domains: all"], name), weights)
    run, chance = shown["Downstream tasks"]
    assert (run["x"], run["error"], run["y"]) == ([0.4, 0.26], [0.02, 0.02], [0, 1])
    assert (chance["name"], chance["x"], chance["y"]) == ("chance", [0.25], [1])
    assert "all, quiz: acc cannot be told from chance." in whole.page.inner_text("body")


COMMON = {"Training loss against tokens", "Training loss against time", "Training loss by domain: {}", "Seconds by run"}
COMMON |= {
    f"Evaluation loss against {a}, {k}" for a in ("tokens", "time") for k in ("token-weighted", "mean of the sets")
}
COMMON |= {"Evaluation loss by domain", "Bits per byte by domain"}
COMMON |= {"Training loss against the domain's own tokens: {}"}
PLANNED = {
    "Proportions: {}",
    "Passes over each domain: {}",
    "Overlap of consecutive rounds",
    "Share of each domain ever seen: {}",
}
PLANNED |= {"Repeated samples in each round", "How often samples were planned", "Seconds of each decision"}
ASKED = {"Sample weights", "Loss weights of the domains: {}"}
SCORED = {"Scores of the selected samples: {}"}
DRAWN = {
    "select": COMMON | PLANNED | SCORED,
    "mix": COMMON | PLANNED,
    "order": COMMON | PLANNED,
    "weight": COMMON | {"Sample weights"},
    "all": COMMON | PLANNED | SCORED | ASKED | {"Downstream tasks"},
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_family_has_its_charts_or_a_reason(runs: dict[str, Path], name: str) -> None:
    found = charts(measure([read_run(runs[name])]))
    assert {each.title for each in found if each.figure} == {title.format(name) for title in DRAWN[name]}
    not_asked = ASKED | ({"Passes over each domain: {}"} if name == "weight" else set())
    missing = {each.title: each.caption for each in found if not each.figure}
    assert set(missing) == {title.format(name) for title in DRAWN["all"] - DRAWN[name] - not_asked}
    assert all(len(reason) > 10 and reason.endswith(".") for reason in missing.values())


def test_runs_can_be_distinguished_without_colours(browser: Any, runs: dict[str, Path]) -> None:
    opened = Opened(browser, report([runs[name] for name in DRAWN], runs["all"] / "all.html")).drawn()
    shown = opened.charts()
    alone = {title for titles in (COMMON, PLANNED, SCORED, ASKED) for title in titles if "{}" in title}
    assert {title.format(name) for name, titles in DRAWN.items() for title in alone & titles} <= set(shown)
    losses = shown["Evaluation loss: held"]
    assert [trace["name"] for trace in losses] == list(DRAWN)
    close(points(losses, "weight"), [(50 * s, 3 - s / 10 + 0.3) for s in range(3, 19, 3)])
    for traces in shown.values():
        looks = {trace["name"]: trace["look"] for trace in traces if not trace["faint"]}
        assert len(set(looks.values())) == len(looks)
    swatches = opened.page.evaluate(
        """() => [...document.querySelectorAll(".legend")].map((legend) => [...legend.querySelectorAll("svg")].map(
             (svg) => svg.outerHTML.replace(/#[0-9A-Fa-f]{6}/g, "").replace(/rgba.[0-9]+,[0-9]+,[0-9]+/g, "")))"""
    )
    assert all(len(set(legend)) == len(legend) for legend in swatches)
    opened.asked_for_nothing()
    opened.page.context.close()


def test_the_page_makes_no_request_and_logs_no_error(whole: Opened) -> None:
    assert set(whole.charts()) == {title.format("all") for title in DRAWN["all"]}
    whole.asked_for_nothing()


def test_dark_mode_has_other_colours(whole: Opened) -> None:
    ask = """() => [getComputedStyle(document.body).backgroundColor,
      ...[...document.querySelectorAll(".plot")].map((plot) => plot._fullLayout.paper_bgcolor)]"""
    light = whole.page.evaluate(ask)
    whole.page.emulate_media(color_scheme="dark")
    dark = settled(lambda: whole.page.evaluate(ask), lambda found: found[-1] != light[-1])
    whole.page.emulate_media(color_scheme="light")
    assert len(set(dark[1:])) == len(set(light[1:])) == 1
    assert all(one != other for one, other in zip(light, dark, strict=True))


def test_narrow_screen_needs_no_scrolling_to_the_side(whole: Opened) -> None:
    whole.page.set_viewport_size({"width": 360, "height": 700})
    widths = "[...document.querySelectorAll('.plot')].map((plot) => plot._fullLayout.width)"
    settled(lambda: whole.page.evaluate(widths), lambda found: max(found) <= 360)
    for details in ("", "document.querySelectorAll('details').forEach((each) => { each.open = true; });"):
        width = whole.page.evaluate(f"() => {{ {details} return document.documentElement.scrollWidth; }}")
        assert width <= 360
    rows = whole.page.evaluate("[...document.querySelectorAll('.plot')].map((p) => p._fullLayout.yaxis.ticktext)")
    assert ["arithmetic<br>exact_match", "quiz acc"] in rows
    inner = whole.page.evaluate("[...document.querySelectorAll('.plot')].map((p) => p._fullLayout._size.w)")
    whole.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = false; })")
    whole.page.set_viewport_size({"width": 1280, "height": 900})
    assert min(inner) > 120


def test_tab_reaches_every_control_with_visible_focus(whole: Opened) -> None:
    page = whole.page
    count = page.evaluate(
        """() => { const all = document.querySelectorAll("button, summary, a, input, [tabindex='0']");
             const shown = [...all].filter((each) => each.checkVisibility());
             shown.forEach((each, i) => { each.dataset.control = i; });
             document.activeElement.blur(); window.scrollTo(0, 0); return shown.length; }"""
    )
    reached = set()
    for _ in range(count):
        page.keyboard.press("Tab")
        number, outline = page.evaluate(
            """() => { const control = document.activeElement; const style = getComputedStyle(control);
                 return [control.dataset.control, [style.outlineStyle, parseFloat(style.outlineWidth)]]; }"""
        )
        assert outline[0] == "solid"
        assert outline[1] >= 2
        reached.add(number)
    assert reached == {str(i) for i in range(count)}


def test_the_keyboard_hides_curves_and_opens_data(whole: Opened) -> None:
    figure = whole.page.locator("figure", has=whole.page.get_by_text("Evaluation loss by domain", exact=True))
    button = figure.get_by_role("button", name="other <i>")
    button.focus()
    whole.page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert [trace["visible"] for trace in whole.charts()["Evaluation loss by domain"]] == [True, "legendonly"]
    whole.page.keyboard.press("Space")
    assert [trace["visible"] for trace in whole.charts()["Evaluation loss by domain"]] == [True, True]
    figure.locator("summary").focus()
    whole.page.keyboard.press("Enter")
    rows = figure.locator("tbody tr").all_inner_texts()
    figure.locator("summary").press("Enter")
    assert rows == [f"{50 * s}\t{3 - s / 10:.5g}\t{2 - s / 20:.5g}" for s in range(3, 19, 3)]


def test_every_chart_is_described(whole: Opened) -> None:
    labels = whole.page.evaluate(
        """() => [...document.querySelectorAll(".plot")].map((plot) => [plot.getAttribute("role"),
             plot.getAttribute("aria-label"), plot.closest("figure").querySelector("h3").textContent,
             plot.closest("figure").querySelectorAll("details tbody tr").length])"""
    )
    assert len(labels) == len(DRAWN["all"])
    for role, label, title, rows in labels:
        assert role == "img"
        assert label.startswith(f"Chart: {title}")
        assert 1 <= rows <= 50
    (loss,) = (label for _, label, title, _ in labels if title == "Evaluation loss by domain")
    assert loss == (
        "Chart: Evaluation loss by domain over tokens 150 to 900: held from 2.7 to 1.2; other <i> from 1.85 to 1.1."
    )


def test_without_scripts_or_in_an_old_browser_the_page_shows_a_message(browser: Any, runs: dict[str, Path]) -> None:
    file = report([runs["select"]])
    silent = Opened(browser, file, java_script_enabled=False).page
    assert "The charts need JavaScript." in str(silent.locator("noscript").text_content())
    assert silent.locator("noscript").bounding_box()["height"] > 10
    old = browser.new_context()
    old.add_init_script("delete window.DecompressionStream")
    page = old.new_page()
    page.goto(file.as_uri())
    assert page.get_by_role("alert").get_by_text("too old to draw the charts").is_visible()
    for each in (silent, page):
        assert not each.locator(".plot").first.is_visible()
        each.locator("summary").first.click()
        assert each.locator("details table").first.is_visible()
        each.context.close()
