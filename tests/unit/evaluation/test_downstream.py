"""Downstream tasks, compared with the harness called by hand, plain transformers and numpy."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import tiny
from dataflex.cli import main
from dataflex.commands.evaluate import resolve_target
from dataflex.errors import ConfigError
from dataflex.evaluation.results import Metric, SubjectResult, chance_note, mean_metric, mean_of_subjects
from dataflex.evaluation.tasks import TaskSettings, load_task, read_settings, task_problems

SUBJECTS = {"red_birds": 9, "old_trees": 7, "moon": 4}
SHOTS = 2


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _choice_rows(seed: str, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Rows with two to five choices of different lengths, answers as letters or indices."""
    rng = random.Random(seed)
    rows = []
    for subject, size in sizes.items():
        for number in range(size):
            choices = [tiny.sentence(rng, 1, 5) for _ in range(2 + number % 4)]
            gold = rng.randrange(len(choices))
            answer: str | int = "ABCDE"[gold] if number % 2 else gold
            row = {"question": tiny.sentence(rng), "choices": choices, "answer": answer, "subject": subject}
            rows.append(row)
    rng.shuffle(rows)
    return rows


def _gold(row: dict[str, Any]) -> int:
    return row["answer"] if isinstance(row["answer"], int) else "ABCDE".index(row["answer"])


def _number_rows(seed: str, size: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(size):
        number = rng.randrange(10)
        rows.append({"instruction": tiny.sentence(rng), "input": "", "output": f"{tiny.sentence(rng)}\n#### {number}"})
    return rows


@dataclass
class Evaluated:
    """What one command wrote and printed, and the model by hand."""

    folder: Path
    run: Path
    results: dict[str, dict[str, Any]]
    printed: str
    model: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """Evaluate the folder of a LoRA run with the command, without a network."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("downstream")
    base = tiny.make_model(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():  # a digit is the likeliest word about half the time
        model.lm_head.weight[[tokenizer.vocab[digit] for digit in "123456789"]] *= 2.0
    model.save_pretrained(base)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    run = folder / "run"
    get_peft_model(model, lora).save_pretrained(run)
    tokenizer.save_pretrained(run)
    (run / "dataflex").mkdir()
    (run / "dataflex" / "config.yaml").write_text(yaml.safe_dump({"dataflex": {}}))
    (run / "dataflex" / "summary.json").write_text("{}")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run).eval()

    _write(folder / "choice.jsonl", _choice_rows("test", SUBJECTS))
    _write(folder / "dev.jsonl", _choice_rows("dev", dict.fromkeys(SUBJECTS, 3)))
    _write(folder / "numbers_dev.jsonl", _number_rows("dev", 3))
    numbers = _number_rows("test", 6)
    for row in numbers[::2]:  # what the model answers, found by hand, becomes the right answer
        ids = tokenizer(_number_prompt(folder, row), return_tensors="pt").input_ids
        made = adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        digits = re.findall(r"\d", tokenizer.decode(made, skip_special_tokens=True))
        row["output"] = f"so\n#### {digits[-1] if digits else 0}.0"
    _write(folder / "numbers.jsonl", numbers)
    long = {"question": " ".join(["moon"] * 300), "choices": ["sun", "cat"], "answer": 0}
    _write(folder / "long.jsonl", [long, {**long, "question": "the sun"}])
    shots = {"fewshot_file": "dev.jsonl", "num_fewshot": SHOTS}
    tasks = [
        {"name": "letters", "file": "choice.jsonl", **shots},
        {"name": "text", "file": "choice.jsonl", "choices": "text"},
        {"name": "part", "file": "choice.jsonl", "choices": "text", "limit": 8},
        {"file": "numbers.jsonl", "fewshot_file": "numbers_dev.jsonl", "num_fewshot": 1, "max_new_tokens": 6},
        {"file": "long.jsonl", "description": ""},
    ]
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(text)))
        command = ["eval", str(run), "--tasks", str(folder / "tasks.yaml"), "--batch-size", "4", "--device", "cpu"]
        assert main(command) == 0
    results = {path.stem: json.loads(path.read_text()) for path in (run / "dataflex" / "tasks").glob("*.json")}
    assert sorted(results) == ["letters", "long", "numbers", "part", "text"]
    return Evaluated(folder, run, results, "\n".join(printed), adapted, tokenizer)


def _number_prompt(folder: Path, row: dict[str, Any]) -> str:
    shot = _read(folder / "numbers_dev.jsonl")[0]
    return f"Question: {shot['instruction']}\nAnswer: {shot['output']}\n\nQuestion: {row['instruction']}\nAnswer:"


def _log_likelihood(of: Evaluated, prompt: str, target: str) -> float:
    """Sum of the log-probabilities of the target's tokens, by one plain forward."""
    import torch

    start = len(of.tokenizer(prompt).input_ids)
    ids = of.tokenizer(prompt + target, return_tensors="pt").input_ids
    with torch.no_grad():
        logs = of.model(ids).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


def _letters_prompt(of: Evaluated, row: dict[str, Any]) -> str:
    """MMLU's prompt, written out."""
    subject = row["subject"]
    text = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    shots = [shot for shot in _read(of.folder / "dev.jsonl") if shot["subject"] == subject][:SHOTS]
    for each in [*shots, row]:
        text += each["question"] + "\n"
        for number, choice in enumerate(each["choices"]):
            text += f"{'ABCDE'[number]}. {choice}\n"
        text += "Answer:" if each is row else f"Answer: {'ABCDE'[_gold(each)]}\n\n"
    return text


def _check(metric: dict[str, float], right: list[bool]) -> None:
    values = np.array(right, dtype=float)
    assert metric["value"] == pytest.approx(values.mean())
    assert metric["stderr"] == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))


def test_choices_by_letter_equal_plain_transformers(evaluated: Evaluated) -> None:
    result = evaluated.results["letters"]
    right: dict[str, list[bool]] = {subject: [] for subject in SUBJECTS}
    for row in _read(evaluated.folder / "choice.jsonl"):
        prompt = _letters_prompt(evaluated, row)
        scores = [_log_likelihood(evaluated, prompt, f" {'ABCDE'[i]}") for i in range(len(row["choices"]))]
        right[row["subject"]].append(int(np.argmax(scores)) == _gold(row))
    everything = [each for found in right.values() for each in found]
    assert 0 < sum(everything) < len(everything)
    _check(result["metrics"]["acc"], everything)
    assert result["metrics"]["acc_norm"] == result["metrics"]["acc"]
    for subject, found in right.items():
        _check(result["subjects"][subject]["metrics"]["acc"], found)
        assert result["subjects"][subject]["samples"] == SUBJECTS[subject]
    means = [np.mean(found) for found in right.values()]
    assert result["subject_mean"]["acc"]["value"] == pytest.approx(np.mean(means))
    assert (result["samples"], result["num_fewshot"]) == (20, SHOTS)
    assert result["form"] == "multiple_choice"


def test_choices_by_text_equal_plain_transformers(evaluated: Evaluated) -> None:
    result = evaluated.results["text"]
    right, right_norm = [], []
    rows = _read(evaluated.folder / "choice.jsonl")
    for row in rows:
        prompt = f"Question: {row['question']}\nAnswer:"
        scores = [_log_likelihood(evaluated, prompt, f" {choice}") for choice in row["choices"]]
        right.append(int(np.argmax(scores)) == _gold(row))
        shares = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right_norm.append(int(np.argmax(shares)) == _gold(row))
    assert right != right_norm
    _check(result["metrics"]["acc"], right)
    _check(result["metrics"]["acc_norm"], right_norm)
    assert result["chance"] == pytest.approx(np.mean([1 / len(row["choices"]) for row in rows]))


def test_results_equal_the_harness_called_by_hand(evaluated: Evaluated, tmp_path: Path) -> None:
    """The same numbers from tasks in the harness's own style, written here."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    def local(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        data = {"test": str(_write(tmp_path / f"{name}.jsonl", rows))}
        return {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
        }

    def accuracy(*names: str) -> list[dict[str, Any]]:
        return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]

    rows = [{**row, "answer": _gold(row)} for row in _read(evaluated.folder / "choice.jsonl")]
    shots = [{**row, "answer": _gold(row)} for row in _read(evaluated.folder / "dev.jsonl")]
    subject = "red_birds"
    lettered = "{{question}}\n{% for c in choices %}{{'ABCDE'[loop.index0]}}. {{c}}\n{% endfor %}Answer:"
    mmlu = {
        **local("mmlu", [row for row in rows if row["subject"] == subject]),
        "output_type": "multiple_choice",
        "description": "The following are multiple choice questions (with answers) about red birds.\n\n",
        "doc_to_text": lettered,
        "doc_to_choice": "{{['A', 'B', 'C', 'D', 'E'][:choices|length]}}",
        "doc_to_target": "answer",
        "num_fewshot": SHOTS,
        "fewshot_config": {"sampler": "first_n", "samples": [row for row in shots if row["subject"] == subject]},
        "metric_list": accuracy("acc"),
    }
    arc = {
        **local("arc", rows),
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": accuracy("acc", "acc_norm"),
    }
    gsm = {
        **local("gsm", _read(evaluated.folder / "numbers.jsonl")),
        "output_type": "generate_until",
        "doc_to_text": "Question: {{instruction}}\nAnswer:",
        "doc_to_target": "{{output}}",
        "num_fewshot": 1,
        "fewshot_config": {"sampler": "first_n", "samples": _read(evaluated.folder / "numbers_dev.jsonl")},
        "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "max_gen_toks": 6},
        "metric_list": [
            {
                **accuracy("exact_match")[0],
                "ignore_case": True,
                "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.0*$"],
            }
        ],
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                    {"function": "take_first"},
                ],
            },
        ],
    }
    lm = HFLM(pretrained=str(evaluated.folder / "model"), peft=str(evaluated.run), device="cpu", batch_size=3)
    tasks = {config["task"]: ConfigurableTask(config=config) for config in (mmlu, arc, gsm)}
    by_hand = evaluate(lm=lm, task_dict={"tasks": tasks, "groups": {}})["results"]

    def same(found: dict[str, float], name: str, metric: str, way: str = "none") -> None:
        assert found["value"] == pytest.approx(by_hand[name][f"{metric},{way}"])
        assert found["stderr"] == pytest.approx(by_hand[name][f"{metric}_stderr,{way}"])

    results = evaluated.results
    same(results["letters"]["subjects"][subject]["metrics"]["acc"], "mmlu", "acc")
    same(results["text"]["metrics"]["acc"], "arc", "acc")
    same(results["text"]["metrics"]["acc_norm"], "arc", "acc_norm")
    same(results["numbers"]["metrics"]["exact_match"], "gsm", "exact_match", "strict-match")
    same(results["numbers"]["metrics"]["exact_match_flexible"], "gsm", "exact_match", "flexible-extract")
    assert 0 < results["numbers"]["metrics"]["exact_match_flexible"]["value"] < 1
    assert results["numbers"]["form"] == "generation"
    assert results["numbers"]["chance"] is None


def test_tasks_of_the_harness_are_run_by_name(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of two tasks that the harness knows by name: its numbers, with errors and chance."""
    from lm_eval.tasks import TaskManager

    from dataflex.evaluation import downstream, harness

    rows = [{**row, "answer": _gold(row)} for row in _read(evaluated.folder / "choice.jsonl")]
    for name, part in (("one", rows[:13]), ("two", rows[13:])):
        config = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(_write(tmp_path / f"{name}.jsonl", part))},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    metrics = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "local", "task": ["local_one", "local_two"], "aggregate_metric_list": metrics}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    monkeypatch.setattr(harness, "TaskManager", lambda: TaskManager(include_path=str(tmp_path), include_defaults=False))
    model = str(evaluated.folder / "model")
    found, single = downstream.evaluate_tasks(
        model, evaluated.run, read_settings(["local", "local_one"]), tmp_path / "out", downstream.Asking(device="cpu")
    )
    text = evaluated.results["text"]
    assert found.metrics["acc"].value == pytest.approx(text["metrics"]["acc"]["value"])
    assert found.chance == pytest.approx(text["chance"])
    assert [part.samples for part in found.subjects.values()] == [13, 7]
    assert (found.samples, found.file, found.form) == (20, None, "multiple_choice")
    assert single.metrics["acc"] == found.subjects["local_one"].metrics["acc"]
    assert single.metrics["acc"].stderr is not None
    assert single.subjects == {}
    with pytest.raises(ConfigError, match=r"'local_tow'; did you mean 'local_two'"):
        downstream.evaluate_tasks(model, None, read_settings(["local_tow"]), tmp_path / "out")


def test_prompts_use_the_chat_template(evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples become turns. A template without a system prompt gives a note about the description."""
    from dataflex.evaluation import harness
    from dataflex.evaluation.downstream import Asking, evaluate_tasks

    model = tmp_path / "model"
    shutil.copytree(evaluated.folder / "model", model)
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ '<' + m.role + '>' + m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (model / "chat_template.jinja").write_text(template)
    files = {"file": evaluated.folder / "choice.jsonl", "fewshot_file": evaluated.folder / "dev.jsonl"}
    tasks = [TaskSettings(name="t", **files, num_fewshot=SHOTS)]
    asked = []
    score = harness.Model.loglikelihood

    def note(self: Any, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        asked.extend(request.args for request in requests)
        return score(self, requests, disable_tqdm)

    monkeypatch.setattr(harness.Model, "loglikelihood", note)
    (result,) = evaluate_tasks(str(model), None, tasks, tmp_path, Asking(device="cpu", apply_chat_template=True))
    expected = []
    for row in _read(evaluated.folder / "choice.jsonl"):
        plain = _letters_prompt(evaluated, row).split("\n\n", 1)[1]
        turns = plain.replace("Answer: ", "Answer:<assistant>").replace("\n\n", "<user>")
        expected += [(f"<user>{turns}<assistant>", "ABCDE"[i]) for i in range(len(row["choices"]))]
    assert sorted(asked) == sorted(expected)
    assert any("accepts no system message" in note for note in result.notes)


def test_an_adapter_with_trained_embeddings_is_loaded_onto_its_base(evaluated: Evaluated, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from dataflex.evaluation.harness import load_model

    folder = tiny.make_model(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(base.config.vocab_size + 13)  # as LLaMA-Factory's resize_vocab pads them
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False)
    trained = get_peft_model(base, config).eval()
    trained.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(folder), tmp_path / "adapter", 1, "cpu", "float32")
    ids = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        assert torch.allclose(loaded.model(ids).logits, trained(ids).logits, atol=1e-6)


def test_results_are_written_and_printed(evaluated: Evaluated) -> None:
    result = evaluated.results["part"]
    assert (result["samples"], result["settings"]["limit"], result["settings"]["batch_size"]) == (8, 8, 4)
    assert (result["model"], result["adapter"]) == (str(evaluated.folder / "model"), str(evaluated.run))
    assert result["file"] == str(evaluated.folder / "choice.jsonl")
    assert {"lm_eval", "torch", "transformers"} <= result["versions"].keys()
    for name in ("letters", "text"):
        result = evaluated.results[name]
        chances = np.array([1 / len(row["choices"]) for row in _read(evaluated.folder / "choice.jsonl")])
        error = max(result["metrics"]["acc"]["stderr"], np.sqrt((chances * (1 - chances)).sum()) / len(chances))
        unclear = abs(result["metrics"]["acc"]["value"] - chances.mean()) <= 2 * error
        assert any(note.startswith("acc ") for note in result["notes"]) is bool(unclear)
        assert name == "text" or not any(note.startswith("acc_norm ") for note in result["notes"])
        numbers = [result["metrics"]["acc"]["value"], result["metrics"]["acc"]["stderr"], chances.mean()]
        shown = "  ".join([f"{number:.4f}" for number in numbers])
        assert re.search(rf"^{name} +acc +" + re.sub(" +", " +", shown), evaluated.printed, re.MULTILINE)
    assert "warning: part: acc" in evaluated.printed
    assert re.search(r"old_trees +7 +\d\.\d{4} +\d\.\d{4}", evaluated.printed)
    assert not list((evaluated.run / "dataflex" / "tasks").glob(".*"))


def test_a_prompt_that_is_cut_gives_a_note(evaluated: Evaluated) -> None:
    notes = evaluated.results["long"]["notes"]
    assert any(note.startswith("1 prompts were longer than the model's context of 256 tokens") for note in notes)


def test_a_limit_draws_the_questions_by_the_seed(tmp_path: Path) -> None:
    rows = _choice_rows("x", {"a": 30, "b": 30})
    settings = TaskSettings(name="t", file=_write(tmp_path / "t.jsonl", rows), limit=20)
    task, problems = load_task(settings)
    assert task is not None
    assert not problems
    order = {question.prompt: number for number, question in enumerate(task.questions)}
    first, again, other = (task.limited(seed).questions for seed in (1, 1, 2))
    assert first == again != other
    numbers = [order[question.prompt] for question in first]
    assert len(set(numbers)) == 20
    assert numbers == sorted(numbers)
    assert {question.subject for question in first} == {"a", "b"}


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        ("5 + 13 = 18\n#### 18", 1, 1),
        ("#### $18.00", 0, 1),
        ("#### 18.0", 1, 1),
        ("it is 18.", 0, 1),
        ("it is $18", 0, 1),
        ("#### 1,8", 1, 1),
        ("18 of 20", 0, 0),
        ("#### 19", 0, 0),
        ("#### -18", 0, 0),
        ("#### 180", 0, 0),
        ("none", 0, 0),
        ("", 0, 0),
    ],
)
def test_the_last_number_of_an_answer_is_found(tmp_path: Path, response: str, strict: int, flexible: int) -> None:
    from dataflex.evaluation.harness import configured

    rows = [{"question": "how many?", "answer": "so\n#### $18.0"}]
    task, _ = load_task(TaskSettings(name="n", file=_write(tmp_path / "n.jsonl", rows)))
    assert task is not None
    (built,) = configured(task).values()
    built.build_all_requests()
    (request,) = built.instances
    assert request.args[0] == "Question: how many?\nAnswer:"
    request.resps.append(response)
    built.apply_filters()
    found = {
        way: built.process_results(request.doc, [kept])["exact_match"] for way, kept in request.filtered_resps.items()
    }
    assert found == {"strict-match": strict, "flexible-extract": flexible}


def test_errors_and_means_against_numpy() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    metric = mean_metric(values)
    assert metric.value == pytest.approx(2 / 3)
    assert metric.stderr == pytest.approx(np.sqrt(np.var(values, ddof=1) / 6))
    assert mean_metric([1.0]).stderr is None
    pair = {
        "a": SubjectResult(samples=6, metrics={"acc": metric}),
        "b": SubjectResult(samples=2, metrics={"acc": mean_metric([0.0, 1.0])}),
    }
    mean = mean_of_subjects(pair)["acc"]
    assert mean.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert mean.stderr == pytest.approx(np.sqrt(np.var(values, ddof=1) / 6 + 0.25) / 2)
    pair["c"] = SubjectResult(samples=1, metrics={"acc": mean_metric([1.0])})
    assert mean_of_subjects(pair)["acc"].stderr is None


@pytest.mark.parametrize(
    ("value", "stderr", "count", "told"),
    [
        (0.25, 0.04, 100, True),
        (0.34, 0.047, 100, True),
        (0.36, 0.048, 100, False),
        (0.10, 0.03, 100, False),
        (0.0, 0.0, 3, True),  # three wrong answers say nothing, whatever their deviation
        (1.0, None, 1, True),
        (1.0, 0.0, 20, False),
    ],
)
def test_a_result_near_chance_gives_a_warning(value: float, stderr: float | None, count: int, told: bool) -> None:
    note = chance_note("acc", Metric(value=value, stderr=stderr), [0.25] * count)
    assert (note is not None) is told


# --- bad input --------------------------------------------------------------------------------------

GOOD = {"question": "q", "choices": ["a", "b"], "answer": "A", "subject": "s"}
NUMBER = {"instruction": "q", "output": "#### 4"}


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "has no rows"),
        (["x"], "line 1: not a JSON object"),
        (
            [{"text": "q"}],
            "the form of the first row is unknown; the row has the keys text. multiple_choice needs question",
        ),
        ([GOOD, NUMBER], "line 2: a row of the form multiple_choice needs question, choices, answer; this one has"),
        ([NUMBER, GOOD], "line 2: a row of the form generation needs"),
        ([{**GOOD, "choices": ["a"]}], "choices must be a list of two or more non-empty strings"),
        ([{**GOOD, "choices": ["a", " "]}], "choices must be a list of two or more non-empty strings"),
        ([{**GOOD, "choices": ["a"] * 27}], "has 27 choices"),
        ([{**GOOD, "answer": "C"}], "a letter from A to B or an index below 2, got 'C'"),
        ([{**GOOD, "answer": 2}], "got 2"),
        ([{**GOOD, "answer": True}], "got True"),
        ([{**GOOD, "question": " "}], "question must be a non-empty string"),
        ([{**NUMBER, "output": "4"}], "output has no '#### n', and the row has no final"),
        ([{**NUMBER, "final": "four"}], "the answer must be a number, got 'four'"),
        ([{**GOOD, "answer": "Z"}] * 9, "And 6 more like these"),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path: Path, rows: list[Any], text: str) -> None:
    problems = task_problems(TaskSettings(name="t", file=_write(tmp_path / "t.jsonl", rows)))
    assert text in "\n".join(map(str, problems))
    assert len(problems) <= 3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"file": None}, "t.file: needed"),
        ({"file": "choic.jsonl"}, "did you mean 'choice.jsonl'?"),
        ({"fewshot_file": "none.jsonl", "num_fewshot": 1}, "t.fewshot_file: no such file"),
        ({"num_fewshot": 1}, "t.fewshot_file: needed for num_fewshot: 1"),
        ({"fewshot_file": "dev.jsonl"}, "t.num_fewshot: needed with a fewshot_file"),
        ({"fewshot_file": "dev.jsonl", "num_fewshot": 3}, "has only 2 rows of subject 'two'"),
        ({"fewshot_file": "choice.jsonl", "num_fewshot": 1}, "its own example"),
        ({"fewshot_file": "numbers.jsonl", "num_fewshot": 1}, "numbers.jsonl, line 1: a row of the form"),
        ({"max_new_tokens": 5}, "t.max_new_tokens: has no effect for the form multiple_choice"),
        ({"file": "numbers.jsonl", "choices": "text"}, "t.choices: has no effect for the form generation"),
        ({"file": None, "task": "gsm8k", "form": "generation"}, "t.form: cannot be set for the harness's task"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    _write(tmp_path / "choice.jsonl", [{**GOOD, "subject": "one"}, {**GOOD, "subject": "two"}])
    _write(tmp_path / "dev.jsonl", [{**GOOD, "subject": name} for name in ("one", "two", "one", "two", "one")])
    _write(tmp_path / "numbers.jsonl", [NUMBER])
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"name": "t", "file": "choice.jsonl", **changes}))
    (settings,) = read_settings([str(tmp_path / "t.yaml")])
    assert text in "\n".join(map(str, task_problems(settings)))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[]", "must be a mapping of task settings, or a list of them"),
        ("a: [", "cannot be read"),
        ("{file: a.jsonl, num_fewshots: 2}", "a.num_fewshots: unknown key 'num_fewshots'; did you mean 'num_fewshot'?"),
        ("{file: a.jsonl, choices: leters}", "did you mean 'letters'?"),
        ("{file: a.jsonl, limit: 0}", "a.limit"),
        ("{file: a.jsonl, name: ../a}", "../a.name"),
        ("{file: a.jsonl, prompt: 'Q: {query}'}", "may contain {question}, {options}, {subject}, not {query}"),
        ("{file: a.jsonl, prompt: 'Q'}", "must contain {question}"),
        ("{file: a.jsonl, description: '{question}'}", "may contain {subject}, not {question}"),
        ("[{file: a.jsonl}, {file: b/a.jsonl}]", "a: two tasks have this name"),
    ],
)
def test_bad_task_files_are_refused(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_settings([str(path)])
    assert text in str(error.value)


def test_task_names_are_checked(tmp_path: Path) -> None:
    file = _write(tmp_path / "some.jsonl", [GOOD])
    first, second = read_settings([str(file), "arc_easy"], {"limit": 3})
    assert (first.name, first.file, first.limit, first.task) == ("some", file, 3, None)
    assert (second.name, second.file, second.limit, second.task) == ("arc_easy", None, 3, "arc_easy")
    for name in (str(tmp_path / "sone.jsonl"), str(tmp_path), "saves/some"):
        with pytest.raises(ConfigError):
            read_settings([name])


def test_prompts_can_be_given_by_a_template(tmp_path: Path) -> None:
    rows = [{**GOOD, "question": "1 {x}?", "subject": "old_maths"}]
    settings = TaskSettings(
        name="t",
        file=_write(tmp_path / "t.jsonl", rows),
        prompt="{subject}|{question}|{options}|{{}}",
        description="On {subject}: ",
    )
    task, _ = load_task(settings)
    assert task is not None
    assert task.questions[0].prompt == "old maths|1 {x}?|A. a\nB. b|{}"
    assert task.description("old_maths") == "On old maths: "


def test_tasks_are_found_by_their_targets(evaluated: Evaluated, tmp_path: Path) -> None:
    model = evaluated.folder / "model"
    assert resolve_target(str(evaluated.run)).adapter == evaluated.run
    by_hand = resolve_target(str(model), evaluated.run)
    assert (by_hand.model, by_hand.adapter, by_hand.run) == (str(model), evaluated.run, None)
    assert resolve_target("owner/name").model == "owner/name"
    full = tmp_path / "full"
    shutil.copytree(model, full)
    shutil.copytree(evaluated.run / "dataflex", full / "dataflex")
    whole = resolve_target(str(full))
    assert (whole.model, whole.adapter, whole.run) == (str(full), None, full)

    (full / "checkpoint-4").mkdir()
    (full / "checkpoint-12").mkdir()
    (full / "model.safetensors").unlink()
    _refused(full, "has no weights: they were not saved", "checkpoint-12")
    (full / "dataflex" / "summary.json").unlink()
    _refused(full, "the training has not ended", "checkpoint-12")
    merged = tmp_path / "merged"
    shutil.copytree(evaluated.run, merged)
    record = {"adapter_name_or_path": "a,b", "dataflex": {}}
    (merged / "dataflex" / "config.yaml").write_text(yaml.safe_dump(record))
    _refused(merged, "dataflex-cli export")
    shutil.rmtree(merged / "dataflex")
    config = json.loads((merged / "adapter_config.json").read_text())
    (merged / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/model"}))
    _refused(merged, "/gone/model does not exist")
    (merged / "adapter_model.safetensors").unlink()
    _refused(merged, "has no adapter weights")
    _refused(tmp_path, "has no weights")
    _refused(tmp_path / "nothing" / "here", "no such run or model folder")
    _refused("asset:smol", "unknown asset 'smol'")
    with pytest.raises(ConfigError, match="already has an adapter"):
        resolve_target(str(evaluated.run), evaluated.run)
    with pytest.raises(ConfigError, match="is no adapter folder"):
        resolve_target(str(model), model)


def _refused(target: Path | str, *texts: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_target(str(target))
    for text in texts:
        assert text in str(error.value)


def test_bad_arguments_are_reported_together(evaluated: Evaluated, capfd: pytest.CaptureFixture[str]) -> None:
    missing = str(evaluated.folder / "choicse.jsonl")
    assert main(["eval", str(evaluated.folder / "model"), "--tasks", missing]) == 2
    text = capfd.readouterr().err
    assert "did you mean 'choice.jsonl'?" in text
    assert "--output: required" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--device", "cuda:77"], "--device: 'cuda:77' cannot be used here"),
        (["--apply-chat-template"], "the model's tokenizer has no chat template"),
        (["--num-fewshot", "1", "--fewshot-file", "{folder}/numbers_dev.jsonl"], "max_new_tokens: 256 must be below"),
    ],
)
def test_problems_that_need_the_model_are_reported(
    evaluated: Evaluated, capfd: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], text: str
) -> None:
    command = ["eval", str(evaluated.folder / "model"), "--tasks", str(evaluated.folder / "numbers.jsonl")]
    further = [option.format(folder=evaluated.folder) for option in options]
    assert main([*command, "--output", str(tmp_path / "out"), *further]) == 2
    assert text in capfd.readouterr().err


def test_settings_need_neither_torch_nor_the_harness(tmp_path: Path) -> None:
    _write(tmp_path / "t.jsonl", [GOOD])
    code = (
        "import sys, dataflex.commands.evaluate; from dataflex.evaluation.tasks import *;"
        f"print([task_problems(each) for each in read_settings([{str(tmp_path / 't.jsonl')!r}])],"
        "{'torch', 'lm_eval', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[]] set()"


def test_a_missing_harness_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataflex.evaluation import downstream

    monkeypatch.setattr(downstream, "find_spec", lambda name: None)
    settings = TaskSettings(name="t", file=_write(tmp_path / "t.jsonl", [GOOD]))
    with pytest.raises(ConfigError, match=r'pip install "dataflex\[eval\]"'):
        downstream.evaluate_tasks("model", None, [settings], tmp_path / "out")
    assert not (tmp_path / "out").exists()
