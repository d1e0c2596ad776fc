"""The results page: claims judged by findings, every figure of the result files, and the pages that are committed."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.compare import outcome
from dataflex.compare.result import cost_notes
from dataflex.errors import ConfigError
from dataflex.report.figures import unpacked

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks" / "leaderboard"))

import page  # noqa: E402
import page_charts  # noqa: E402
import page_form  # noqa: E402
import page_tables  # noqa: E402
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
    found |= {"folder": f"work/a/runs/{variant}/seed-{seed}", "taken_over_from": None}
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
        "notes": ["A run ends with a whole step.", "The bootstrap interval is too narrow for 3 seeds, so nothing"],
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
    table |= {"pool_samples": 100, "step_samples": 4}
    return {
        "tier": "small",
        "command": "make leaderboard",
        "date": "2026-01-02",
        "seconds": 4890,
        "machine": MACHINE,
        "versions": {"torch": "1.0"},
        "methods": {
            "full": {},
            "less": {"select": {"method": "less", "validation": "{validation}"}},
            "loss": {"weight": {"method": "loss"}},
            "near": {"select": {"method": "one_of_a_plug_in"}},
        },
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
    part_of_pool = " At this budget full trains on about 36 of the 100 samples of the pool."
    assert re.findall(r"^- (.* tier\): .*)$", text, flags=re.MULTILINE) == [
        f"Supported (small tier): Selection helps (a paper). {two}1 better (less by 0.2500 to 0.7500) and 1 unclear "
        "(near with 2 of 3 seeds); differences of up to 0.0625 better (near) and 0.5625 worse (near) cannot be ruled "
        f"out.{part_of_pool}",
        f"Refuted (small tier): High losses help (a paper). {one}1 worse (loss by 0.1250 to 0.8750).{part_of_pool}",
        f"Mixed (small tier): Everything helps (a paper). {two}1 better (less by 0.2500 to 0.7500) and 1 worse (loss "
        f"by 0.1250 to 0.8750).{part_of_pool}",
        f"Open (small tier): Neighbours help (a paper). {one}1 unclear (near with 2 of 3 seeds); differences of up to "
        f"0.0625 better (near) and 0.5625 worse (near) cannot be ruled out.{part_of_pool}",
        "Open (small tier): It is fast. 0 measured ratios of seconds, 0 above 1, 0 below 1 and 0 neither. 1 reckoned "
        "ratio, not counted, from 4 to 6: fast, authors / dataflex, 5 (4 to 6).",
    ]
    assert "| small | Everything helps | a paper | maths loss | mixed | 2 | 1 | 1 | 0 |" in text


def test_a_better_method_is_named_with_other_steps_and_long_decisions(write: Write) -> None:
    content = result()
    own = content["tables"][0]["comparison"]["variants"]["less"]["costs"]
    own |= {"steps": 12.6, "decision_seconds": 36.0}
    sentence = judged(page_form.read(write(content)))[0].sentence
    assert (
        "less took 12.6 steps with the same tokens, full 9.0. less decides 3.6 times as long as it trains." in sentence
    )
    content["tables"][0]["pool_samples"] = 36  # then full trains on the whole pool
    assert judged(page_form.read(write(content)))[0].sentence.endswith("as long as it trains.")


def test_a_check_of_the_reckoning_is_beside_the_reckoned_ratios(write: Write) -> None:
    content = result()
    content["costs"]["parts"]["fast"]["agreement"]["seconds of a step"] = {"whole": 5.0, "reckoned": 6.0}
    said = "A check of the reckoning (fast, seconds of a step): 5 s measured as a whole, 6 s reckoned, 20 % more."
    text = text_of(write(content))
    assert judged(page_form.read(write(content)))[-1].sentence.endswith(f"5 (4 to 6). {said}")
    assert text.count(said) == 2  # in the claim and below the agreement


def test_the_summary_has_the_findings_against_every_baseline_and_the_costs(write: Write) -> None:
    content = result()
    other = copy.deepcopy(content["tables"][0])
    for each, name, baseline in ((content["tables"][0], "s-vs-full", "full"), (other, "s-vs-loss", "loss")):
        each |= {"name": name, "title": f"Towards maths: against `{baseline}`"}
        each["comparison"]["baseline"] = baseline
    other["comparison"]["differences"] = [difference("full", -0.5, -0.875, -0.125, 0.0125, "better")]
    content |= {"tables": [content["tables"][0], other], "claims": [], "chosen": {}}
    text = text_of(write(content))
    summary = text.split("**Small tier: instruction tuning towards a target**\n\n")[1].split("\n\n")[0]
    assert summary.splitlines()[2:] == [
        "| Towards maths | full | baseline | better (-0.5000) | 10.0 | 5.0 | 0.500 | - | 9.0 |",
        "| Towards maths | less | better (-0.5000) | - | 10.0 | 5.0 | 0.500 | 12.5 | 9.0 |",
        "| Towards maths | loss | worse (+0.5000) | baseline | 10.0 | 5.0 | 0.500 | - | 9.0 |",
        "| Towards maths | near | unclear (+0.2500) | - | 10.0 | 5.0 | 0.500 | 12.5 | 9.0 |",
    ]


def test_methods_have_their_setting_and_their_page(write: Write) -> None:
    text = text_of(write(result()))
    table = text.split("## Methods\n\n")[1].split("\n\n## ")[0]
    link = Path(os.path.relpath(page.DOCS, write(result()).parents[1] / "docs"), "methods", "select-less.md").as_posix()
    setting = "select: {method: less, validation: '{validation}'}"
    assert f"| less | {setting} | [methods/select-less.md]({link}) |" in table
    assert "| full | - | - |" in table
    assert "| near | select: {method: one_of_a_plug_in} | - |" in table
    assert "full: a control: plain training" in table
    assert "{validation}: the validation samples of the target." in table


def test_runs_of_a_sibling_table_are_said_to_be_made_once(write: Write) -> None:
    content = result()
    for each in content["tables"][0]["comparison"]["runs"]:
        if each["variant"] == "loss":
            each["taken_over_from"] = "work/b"
        if each["variant"] == "less":
            each["taken_over_from"] = "elsewhere/b"
    text = text_of(write(content))
    assert '3 of 11 runs are those of "Mixtures": a run that tables share is made once.\n' in text
    assert "3 of 11 runs were taken over from elsewhere/b. Seconds of different machines cannot be compared.\n" in text
    assert "- Wall time of the 5 runs made for this table: 10.0 min.\n" in text
    for each in content["tables"][0]["comparison"]["runs"]:
        each["taken_over_from"] = "work/b"
    assert text_of(write(content)).count("Wall time of the") == 1  # of the other table


def test_the_notes_that_the_page_replaces_are_those_of_the_comparison() -> None:
    taken = SimpleNamespace(runs_at_once=1, taken_over_from="work/b")
    (note,) = cost_notes([taken])  # type: ignore[list-item]
    source = inspect.getsource(outcome)
    first, second = page_tables._NOT_SHOWN
    assert second in note
    assert first in source


def test_a_result_that_lacks_nothing_may_replace_another(write: Write) -> None:
    old = page_form.read(write(result()))
    assert page_form.lost(old, old) == []
    content = result()
    content["tables"][0]["comparison"]["runs"][4] |= {"problem": "missing", "metrics": {}}
    del content["tables"][1], content["costs"]["parts"]["fast"], content["above_chance"][0]
    content["claims"] = []
    new = page_form.read(write(content))
    expected = ["the table b", "1 run of a", "the costs of fast", "the accuracy in quiz"]
    assert page_form.lost(new, old) == expected
    assert page_form.lost(old, new) == []


def test_the_sides_of_a_metric_whose_higher_values_are_better_are_exchanged(write: Write) -> None:
    content = result()
    for table in content["tables"]:
        for each in table["comparison"]["differences"]:
            each["higher_is_better"] = True
    assert "up to 0.5625 better (near) and 0.0625 worse (near) cannot" in text_of(write(content))


def test_a_claim_without_findings_is_open(write: Write) -> None:
    content = result()
    without = {"mean": 0.1, "t_interval_95": None, "p_value": None, "p_holm": None, "finding": "no claim"}
    content["tables"][0]["comparison"]["differences"][0] |= without
    del content["tables"][0]["comparison"]["differences"][2]
    found = judged(page_form.read(write(content)))
    assert [each.verdict for each in found[:4]] == ["open", "refuted", "refuted", "open"]
    assert found[0].sentence == (
        "Towards maths: 2 comparisons with full in maths loss, 2 without a finding (less and near with 0 of 3 seeds); "
        "without an interval, no difference can be ruled out for less and near. At this budget full trains on "
        "about 36 of the 100 samples of the pool."
    )
    assert (
        "1 worse (loss by 0.1250 to 0.8750) and 1 without a finding (less); without an interval, no difference can be "
        "ruled out for less."
    ) in found[2].sentence


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
    found["reckoned"] = ratio(0.1, 0.2, 0.3, reckoned=True)  # does not count
    content["costs"]["parts"]["fast"] = part(found)
    assert judged(page_form.read(write(content)))[-1].verdict == expected


def test_a_claim_about_costs_that_are_not_measured_is_open(write: Write) -> None:
    content = result()
    content["claims"] = [{"text": "It is fast", "costs": ["fast", "slow"]}]
    content["costs"]["parts"]["fast"] = part({"authors / dataflex": ratio(4.0, 5.0, 6.0)})
    (found,) = judged(page_form.read(write(content)))
    assert found.verdict == "open"
    assert found.sentence == (
        "1 measured ratio of seconds, 1 above 1, 0 below 1 and 0 neither, from 4 to 6: fast, authors / dataflex, 5 (4 "
        "to 6). Not measured: slow."
    )
    (found,) = judged(page_form.read(write({**content, "costs": None})))
    assert found.verdict == "open"
    assert found.sentence == (
        "0 measured ratios of seconds, 0 above 1, 0 below 1 and 0 neither. Not measured: fast and slow."
    )


def test_the_tables_have_the_figures_of_the_file(write: Write) -> None:
    text = text_of(write(result()))
    tier = "| small | make leaderboard | make leaderboard | 2026-01-02 | processor Abacus &lt;2>, cores 2 | torch 1.0 |"
    assert f"{tier} 81.5 min |" in text
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
    assert [chance["quiz"][1], chance["hard"][1]] == ["yes (0.50 ± 0.24)", "no (0.50 ± 0.37)"]
    assert "No table of this tier has the target quiz and hard." in text
    assert "bootstrap" not in text


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
