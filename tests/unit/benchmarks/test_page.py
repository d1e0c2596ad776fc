"""The results page: claims judged by findings, every figure of the result files, and the pages that are committed."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.errors import ConfigError
from dataflex.report.figures import unpacked

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks" / "leaderboard"))

import page  # noqa: E402
import page_charts  # noqa: E402
import page_form  # noqa: E402
from page_claims import judged, verdict  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MACHINE = {"processor": "Abacus <2>", "cores": 2, "versions": {"torch": "1.0"}}


def difference(variant: str, mean: float, low: float, high: float, p_holm: float, finding: str) -> dict[str, Any]:
    return {
        "variant": variant,
        "baseline": "full",
        "metric": "maths_loss",
        "higher_is_better": False,
        "seeds": [1, 2, 3],
        "mean": mean,
        "t_interval_95": [low, high],
        "p_value": p_holm / 3,
        "p_holm": p_holm,
        "finding": finding,
    }


def run(variant: str, seed: int, loss: float) -> dict[str, Any]:
    domains = {"maths": loss, "code": loss + 1.0}
    metrics = {f"{name}_loss": value for name, value in domains.items()}
    metrics |= {f"{name}_loss_stderr": 0.125 for name in domains}
    metrics |= {f"{name}_bits_per_byte": value / 2 for name, value in domains.items()}
    metrics |= {f"{name}_perplexity": value * 4 for name, value in domains.items()}
    metrics |= {"token_weighted_loss": loss + 0.5, "token_weighted_bits_per_byte": loss + 0.25, "quiz/acc": 0.5}
    costs = {"train_seconds": 10.0, "decision_seconds": 5.0, "tokens": 4000, "steps": 9}
    found = {"variant": variant, "seed": seed, "status": "compared", "problem": None, "key": "k", "runs_at_once": 1}
    return {**found, "fingerprint": "a", "costs": costs, "metrics": metrics}


def comparison() -> dict[str, Any]:
    """Return a comparison with a better, a worse and an unclear variant, the last one with two of three seeds."""
    variants = {"full": 2.0, "less": 1.5, "loss": 2.5, "near": 2.0}
    runs = [run(variant, seed, loss + 0.25 * seed) for variant, loss in variants.items() for seed in (1, 2, 3)]
    failed = next(each for each in runs if (each["variant"], each["seed"]) == ("near", 3))
    failed |= {"status": "failed", "problem": "out of memory | at\n step 3", "metrics": {}, "costs": {}}
    next(each for each in runs if each["variant"] == "loss")["runs_at_once"] = 3
    costs = {"train_seconds": 10.0, "decision_seconds": 5.0, "evaluate_seconds": 1.0, "task_seconds": 0.0, "steps": 9.0}
    return {
        "baseline": "full",
        "equal": {"tokens": 4000.0},
        "seeds": [1, 2, 3],
        "claims": ["maths_loss"],
        "differences": [
            difference("less", -0.5, -0.75, -0.25, 0.0125, "better"),
            difference("loss", 0.5, 0.125, 0.875, 0.00001, "worse"),
            {**difference("near", 0.25, -0.0625, 0.5625, 0.75, "unclear"), "seeds": [1, 2]},
        ],
        "sentences": ["not shown"],
        "notes": ["A run ends with a whole step."],
        "variants": {
            name: {"means": {"maths_loss": loss}, "stderr": {"maths_loss": 0.125}, "costs": {**costs, "tokens": 4000.0}}
            for name, loss in variants.items()
        },
        "runs": runs,
    }


def claim(text: str, *variants: str) -> dict[str, Any]:
    return {"text": text, "source": "a paper", "table": "a", "metric": "maths_loss", "variants": list(variants)}


def ratio(low: float, median: float, high: float, *, reckoned: bool = False) -> dict[str, Any]:
    return {"low": low, "median": median, "high": high, "reckoned": reckoned}


def part(ratios: dict[str, Any]) -> dict[str, Any]:
    own = {"seconds": [1.0, 4.0, 2.0], "reckoned": False, "peak_bytes": 3_000_000_000, "samples": 48}
    other = {"seconds": [900.0], "reckoned": True, "peak_bytes": None, "samples": 48}
    agreement = {"cosine": {"mean": 0.99991, "lowest": 0.875}, "ranks": [1, 2]}
    return {
        "about": "seconds of one pass",
        "variants": {"dataflex": own, "authors": other},
        "ratios": ratios,
        "agreement": agreement,
    }


def result() -> dict[str, Any]:
    """Return a result file with claims of every verdict."""
    table = {"track": "A", "title": "Towards maths", "setting": ["A tiny model."], "seconds": 600}
    return {
        "tier": "small",
        "command": "make leaderboard",
        "date": "2026-01-02",
        "seconds": 4890,
        "machine": MACHINE,
        "versions": {"torch": "1.0"},
        "tables": [
            {"name": "a", **table, "comparison": comparison()},
            {"name": "b", **table, "track": "B", "title": "Mixtures", "comparison": comparison()},
        ],
        "missing": [],
        "chosen": {"a": {"less": {"dolly": 0.25, "gsm8k": 0.75}, "near": {"gsm8k": 1.0}}},
        "above_chance": [
            {"task": "quiz", "model": "tiny", "accuracy": 0.5, "stderr": 0.125, "chance": 0.25, "questions": 500},
            {"task": "hard", "model": "tiny", "accuracy": 0.5, "stderr": 0.1875, "chance": 0.25, "questions": 500},
        ],
        "shared_costs": [{"what": "embeddings", "seconds": 12.5, "used_by": ["near", "less"]}],
        "claims": [
            claim("Selection helps", "less", "near"),
            claim("High losses help", "loss"),
            claim("Everything helps", "less", "loss"),
            claim("Neighbours help", "near"),
            {"text": "It is fast", "costs": ["fast"]},
        ],
        "costs": {
            "parts": {"fast": part({"authors / dataflex": ratio(4.0, 5.0, 6.0, reckoned=True)})},
            "measured": {"fast": {"command": "python cost.py", "machine": MACHINE, "seconds": 30.0}},
            "skipped": {"slow": "no peer"},
        },
    }


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(content: dict[str, Any], name: str = "small.json") -> Path:
        path = tmp_path / "results" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    (tmp_path / "docs").mkdir()
    return written


def text_of(path: Path) -> str:
    docs = path.parents[1] / "docs"
    return page.markdown(page.read_tiers([path]), [path], docs)


def rows(text: str, name: str, section: str = "# Results") -> dict[str, list[str]]:
    """Return first cell -> other cells of the Markdown table below a bold name, after a heading."""
    table = text.split(section, 1)[1].split(f"**{name}**\n\n")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells}


def test_every_claim_has_one_sentence_with_its_verdict_and_the_differences_that_are_not_ruled_out(write: Write) -> None:
    text = text_of(write(result()))
    maths = "Towards maths: {} with full in maths loss, "
    one, two = maths.format("1 comparison"), maths.format("2 comparisons")
    assert re.findall(r"^- (.* tier\): .*)$", text, flags=re.MULTILINE) == [
        f"Supported (small tier): Selection helps (a paper). {two}1 better (less) and 1 unclear (near with 2 of 3 "
        "seeds); differences of up to 0.7500 better (less) and 0.5625 worse (near) cannot be ruled out.",
        f"Refuted (small tier): High losses help (a paper). {one}1 worse (loss); differences of up to 0.8750 worse "
        "(loss) cannot be ruled out.",
        f"Mixed (small tier): Everything helps (a paper). {two}1 better (less) and 1 worse (loss); differences of up "
        "to 0.7500 better (less) and 0.8750 worse (loss) cannot be ruled out.",
        f"Open (small tier): Neighbours help (a paper). {one}1 unclear (near with 2 of 3 seeds); differences of up to "
        "0.0625 better (near) and 0.5625 worse (near) cannot be ruled out.",
        "Supported (small tier): It is fast. 1 ratio of seconds, 1 above 1, 0 below 1 and 0 neither: fast, authors / "
        "dataflex, 5 (4 to 6, reckoned); the measured ratios reach from 4 to 6.",
    ]
    assert "| small | Everything helps | a paper | maths loss | mixed | 2 | 1 | 1 | 0 |" in text


def test_the_sides_of_a_metric_whose_higher_values_are_better_are_exchanged(write: Write) -> None:
    content = result()
    for table in content["tables"]:
        for each in table["comparison"]["differences"]:
            each["higher_is_better"] = True
    assert "up to 0.5625 better (near) and 0.0625 worse (near)" in text_of(write(content))


def test_a_claim_without_findings_is_open(write: Write) -> None:
    content = result()
    without = {"mean": 0.1, "t_interval_95": None, "p_value": None, "p_holm": None, "finding": "no claim"}
    content["tables"][0]["comparison"]["differences"][0] |= without
    del content["tables"][0]["comparison"]["differences"][2]
    found = judged(page_form.read(write(content)))
    assert [each.verdict for each in found[:4]] == ["open", "refuted", "refuted", "open"]
    assert found[0].sentence == (
        "Towards maths: 2 comparisons with full in maths loss, 2 without a finding (less and near with 0 of 3 seeds); "
        "without an interval, no difference can be ruled out for less and near."
    )
    assert found[2].sentence.endswith(
        "1 worse (loss) and 1 without a finding (less); differences of up to 0.8750 worse (loss) cannot be ruled out; "
        "without an interval, no difference can be ruled out for less."
    )


def test_verdicts_follow_the_findings() -> None:
    assert [verdict(*each) for each in ((1, 0), (0, 1), (2, 1), (0, 0))] == ["supported", "refuted", "mixed", "open"]


@pytest.mark.parametrize(
    "spreads, expected",
    [
        ([(1.1, 2.0)], "supported"),
        ([(1.1, 2.0), (3.0, 4.0)], "supported"),
        ([(1.0, 2.0)], "open"),
        ([(1.1, 2.0), (0.9, 1.2)], "open"),
        ([(0.5, 0.9)], "refuted"),
        ([(0.5, 0.9), (0.9, 1.2)], "refuted"),
        ([(0.5, 0.9), (1.1, 1.2)], "mixed"),
        ([(3.0, 3.0)], "open"),
        ([(3.0, 3.0), (1.1, 1.2)], "supported"),
        ([], "open"),
    ],
)
def test_a_claim_about_costs_needs_the_whole_spread(
    spreads: list[tuple[float, float]], expected: str, write: Write
) -> None:
    content = result()
    found = {f"r{i}": ratio(low, (low + high) / 2, high) for i, (low, high) in enumerate(spreads)}
    content["costs"]["parts"]["fast"] = part(found)
    assert judged(page_form.read(write(content)))[-1].verdict == expected


def test_a_claim_about_costs_that_are_not_measured_is_open(write: Write) -> None:
    content = result()
    content["claims"] = [{"text": "It is fast", "costs": ["fast", "slow"]}]
    (found,) = judged(page_form.read(write(content)))
    assert found.verdict == "open"
    assert found.sentence == (
        "1 ratio of seconds, 1 above 1, 0 below 1 and 0 neither: fast, authors / dataflex, 5 (4 to 6, reckoned); slow "
        "not measured; the measured ratios reach from 4 to 6."
    )
    (found,) = judged(page_form.read(write({**content, "costs": None})))
    assert found.verdict == "open"
    assert found.sentence == "0 ratios of seconds, 0 above 1, 0 below 1 and 0 neither: fast and slow not measured."


def test_the_tables_have_the_figures_of_the_file(write: Write) -> None:
    text = text_of(write(result()))
    assert "| small | make leaderboard | 2026-01-02 | processor Abacus &lt;2>, cores 2 | torch 1.0 | 81.5 min |" in text
    assert "The large tier has not been run. To run it: make leaderboard-gpu" in text
    section = "### Small tier: Towards maths"
    named = "maths loss (lower is better)"
    found = rows(text, "Findings", section)
    assert found["full"] == [named, "baseline", "3", "2.0000", "0.1250", "-", "-", "-"]
    assert found["less"] == [named, "better", "3", "1.5000", "0.1250", "-0.5000", "[-0.7500, -0.2500]", "0.0125"]
    assert found["loss"][-1] == "&lt;0.0001"
    assert found["near"] == [named, "unclear", "2", "2.0000", "0.1250", "+0.2500", "[-0.0625, +0.5625]", "0.7500"]
    assert "Not compared: near, seed 3 (failed): out of memory \\| at step 3\n" in text
    costs = rows(text, "Cost, mean of the complete runs", section)
    assert costs["near"] == ["2", "1", "10.0", "5.0", "0.500", "4,000", "9.0", "12.5"]
    assert costs["loss"] == ["3", "1 to 3", "10.0", "5.0", "0.500", "4,000", "9.0", "-"]
    others = rows(text, "Losses on the other data sets", section)
    assert others["method"] == ["code"]
    assert others["full"] == ["3.5000 ± 0.2500"]  # of 3.25, 3.5 and 3.75
    assert others["near"] == ["3.3750 ± 0.1768"]  # of 3.25 and 3.5
    shares = rows(text, "Shares of the sources among the chosen samples", section)
    assert shares == {
        "method": ["dolly", "gsm8k"],
        "---": ["---:", "---:"],
        "less": ["0.250", "0.750"],
        "near": ["-", "1.000"],
    }
    chance = rows(text, "Accuracy before the training")
    assert [chance["quiz"][1], chance["hard"][1]] == ["yes", "not shown"]


def test_runs_that_are_left_out_for_one_reason_share_a_line(write: Write) -> None:
    content = result()
    for each in content["tables"][0]["comparison"]["runs"]:
        if each["variant"] == "less" and each["seed"] > 1:
            each |= {"status": "missing", "problem": "the run is not complete yet", "metrics": {}}
    text = text_of(write(content))
    assert "Not compared: less, seeds 2 and 3 (missing): the run is not complete yet\n" in text


def test_shared_work_counts_only_in_its_tables(write: Write) -> None:
    content = result()
    content["shared_costs"].append({"what": "more", "seconds": 1.0, "used_by": ["near"], "tables": ["b"]})
    text = text_of(write(content))
    found = [
        rows(text, "Cost, mean of the complete runs", f"### Small tier: {name}") for name in ("Towards", "Mixtures")
    ]
    assert [each["near"][-1] for each in found] == ["12.5", "13.5"]
    assert text.count("Once: more, 1.0 s, done once for all runs of near.") == 1


def test_mixtures_have_bits_per_byte_and_perplexity_by_domain(write: Write) -> None:
    text = text_of(write(result()))
    section = "### Small tier: Mixtures"
    bits = rows(text, "Bits per byte by domain", section)
    assert bits["method"] == ["token-weighted", "maths", "code"]
    assert bits["less"] == ["2.2500 ± 0.2500", "1.0000 ± 0.1250", "1.5000 ± 0.1250"]
    perplexity = rows(text, "Perplexity by domain", section)
    assert perplexity["method"] == ["maths", "code"]
    assert perplexity["less"] == ["8.0000 ± 1.0000", "12.0000 ± 1.0000"]
    assert "Losses on the other data sets" not in text.split(section)[1]


def test_costs_beside_others_say_which_figures_are_reckoned(write: Write) -> None:
    text = text_of(write(result()))
    section = "### Small tier: cost beside other implementations"
    assert "| fast | dataflex | measured | 48 | 2 | 1 to 4 | 3 | 3.00 |" in text.split(section)[1]
    assert "| fast | authors | reckoned | 48 | 900 | 900 to 900 | 1 | - |" in text.split(section)[1]
    assert rows(text, "Ratios of seconds", section)["fast"] == ["authors / dataflex", "reckoned", "5", "4 to 6"]
    assert "| fast | cosine, lowest | 0.875 |\n| fast | ranks | 1, 2 |" in text
    assert "- fast: python cost.py (processor Abacus &lt;2>, cores 2, 30.0 s)\n" in text
    assert "\n- Not measured: slow (no peer)\n" in text
    assert "were written for this benchmark" in text.split(section)[1]
    assert section not in text_of(write({**result(), "costs": None}))


def test_charts_have_the_differences_and_their_intervals() -> None:
    table = page_form.Comparison.model_validate(comparison())
    (chart,) = page_charts.forests("here", table)
    assert chart.figure is not None
    drawn = {trace["name"]: trace for trace in chart.figure["data"]}
    assert list(drawn) == ["better", "worse", "unclear"]
    assert unpacked(drawn["unclear"]["x"]) == [0.25]
    assert unpacked(drawn["unclear"]["y"]) == [2]
    assert unpacked(drawn["unclear"]["error_x"]["arrayminus"]) == [0.3125]
    assert unpacked(drawn["better"]["error_x"]["array"]) == [0.25]
    assert chart.figure["layout"]["yaxis"]["ticktext"] == ["less", "loss", "near"]


def test_a_tier_that_is_missing_is_named(write: Write, tmp_path: Path) -> None:
    large = write({**result(), "tier": "large"}, "large.json")
    text = text_of(large)
    assert "The small tier has not been run. To run it: make leaderboard\n" in text
    assert "## Large tier" in text
    both = page.markdown(page.read_tiers([large, write(result())]), [large], tmp_path / "docs")
    assert "The small tier has not been run" not in both
    assert "The large tier has not been run" not in both
    assert both.index("## Small tier") < both.index("## Large tier")
    assert page.write_pages([], tmp_path / "docs") == [tmp_path / "docs" / "results.md"]
    assert "The small tier has not been run." in (tmp_path / "docs" / "results.md").read_text()


def test_equal_files_give_equal_pages(write: Write, tmp_path: Path) -> None:
    path = write(result())
    docs = tmp_path / "docs"
    written = page.write_pages([path], docs)
    assert written == [docs / "results.md", docs / "results.html"]
    first = [each.read_bytes() for each in written]
    assert [each.read_bytes() for each in page.write_pages([path], docs)] == first
    assert b"(../results/small.json)" in first[0]


def test_the_html_page_has_every_table_and_sentence_and_loads_nothing(write: Write, tmp_path: Path) -> None:
    path = write(result())
    html = page.write_pages([path], tmp_path / "docs")[1].read_text()
    assert "default-src 'none'" in html
    assert not re.search(r'(?:src|href)="', html)
    for part_ in page.parts(page.read_tiers([path])):
        told = [*part_.lines, *(note for table in part_.tables for note in table.notes)]
        told += [cell for table in part_.tables for row in table.rows for cell in row]
        for each in told:
            assert each.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#x27;") in html
    assert html.count("<figure>") == 3  # the differences of two tables and the ratios


def test_the_html_page_draws_its_charts_without_a_request(write: Write, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    html = page.write_pages([write(result())], tmp_path / "docs")[1]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page()
        asked: list[str] = []
        complaints: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.goto(html.as_uri())
        opened.wait_for_selector("body[data-state=drawn]", timeout=60_000)
        assert opened.locator(".plot .errorbars, .plot .errorbar").count() > 0
        browser.close()
    assert complaints == []
    assert asked == [html.as_uri()]


@pytest.mark.parametrize(
    "path, said",
    [
        (("date",), "the file has no key 'date'"),
        (
            ("tables", 0, "comparison", "differences", 1, "p_holm"),
            "tables[0].comparison.differences[1] has no key 'p_h",
        ),
        (("tables", 1, "comparison", "notes"), "tables[1].comparison has no key 'notes'"),
        (
            ("costs", "parts", "fast", "variants", "dataflex", "seconds"),
            "costs.parts.fast.variants.dataflex has no key 'seconds'",
        ),
    ],
)
def test_a_missing_key_is_an_error_that_names_file_and_key(path: tuple[Any, ...], said: str, write: Write) -> None:
    content = result()
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        page_form.read(write(content))
    assert "small.json" in str(error.value)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"tier": "huge"}, "tier is 'huge'"),
        ({"claims": [claim("x", "lass")]}, "claims[0].variants: 'lass' is unknown; expected one of less, loss, near"),
        ({"claims": [claim("x", "full")]}, "claims[0].variants: 'full' is unknown"),
        ({"claims": [claim("x")]}, "claims[0].variants is empty"),
        ({"claims": [{**claim("x", "less"), "table": "c"}]}, "claims[0].table: 'c' is unknown; expected one of a, b"),
        ({"claims": [{**claim("x", "less"), "metric": "loss"}]}, "claims[0].metric: 'loss' is unknown"),
        (
            {"claims": [{"text": "x", "costs": ["last"]}]},
            "claims[0].costs: 'last' is unknown; expected one of fast, slow",
        ),
        (
            {"claims": [{"text": "x", "table": "a"}]},
            "claims[0] has table; expected table, metric and variants, or costs",
        ),
        ({"chosen": {"c": {}}}, "chosen: 'c' is unknown"),
        ({"chosen": {"a": {"lass": {}}}}, "chosen.a: 'lass' is unknown"),
        ({"shared_costs": [{"what": "w", "seconds": 1, "used_by": ["lass"]}]}, "used_by: 'lass' is unknown"),
    ],
)
def test_a_name_that_stands_for_nothing_is_an_error(change: dict[str, Any], said: str, write: Write) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        page_form.read(write({**result(), **change}))


def test_files_of_one_tier_and_files_that_are_no_json_are_errors(write: Write) -> None:
    first = write(result())
    with pytest.raises(ConfigError, match=r"other\.json: another file has the tier 'small', too"):
        page.read_tiers([first, write(copy.deepcopy(result()), "other.json")])
    first.write_text('{"tier": 1, "tier": 2}')
    with pytest.raises(ConfigError, match=r"small\.json is not JSON \('tier' is there twice\)"):
        page.read_tiers([first])


def test_the_committed_pages_are_those_of_the_committed_results(tmp_path: Path) -> None:
    results = sorted(page.RESULTS.glob("*.json"))
    found = page.read_tiers(results)
    assert (page.DOCS / page.MARKDOWN).read_text() == page.markdown(found, results, page.DOCS)
    committed = page.DOCS / page.HTML
    assert committed.is_file() == bool(found)
    if found:
        made = tmp_path / page.HTML
        page.write_html(found, made)
        # The compressed scripts depend on the versions of Plotly and zlib.
        visible = [re.sub(r'<script type="text/plain".*', "", each.read_text()) for each in (committed, made)]
        assert visible[0] == visible[1]
