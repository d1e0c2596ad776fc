"""``check`` on broken files made from the tables of keys, and on every YAML example of the documentation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from dataflex import cli
from dataflex.api import registry
from dataflex.config.arguments import llamafactory_arguments, llamafactory_keys, required_packages
from dataflex.config.checks import packages, problems_of
from dataflex.config.checks.keys import RANGES
from dataflex.config.loading import DataFlexConfig, load_config

ROOT = Path(__file__).parents[3]
SELECT = {"update_steps": 2, "select": {"method": "loss"}}
Case = tuple[dict[str, Any], str]
"""Changes to a good configuration, and the key that the message must name."""


def misplaced() -> Iterator[Case]:
    registry.load_components([])
    for key in DataFlexConfig.model_fields:
        if key not in llamafactory_keys():
            yield {key: 1}, key
    for key in sorted(llamafactory_keys() - set(DataFlexConfig.model_fields))[::40]:
        yield {"dataflex": {**SELECT, key: 1}}, f"dataflex.{key}"
    for family, kind in registry.CONFIG_KEYS.items():
        for name, cls in registry.available(kind).items():
            for parameter in list(cls.Params.model_fields)[:1]:
                yield {"dataflex": {family: {"method": name}, parameter: 1}}, f"dataflex.{parameter}"
        yield {"dataflex": {family: {"method": next(iter(registry.available(kind))), "updates": 1}}}, "updates"


def misspelt() -> Iterator[Case]:
    for key in sorted(llamafactory_keys())[::15]:
        yield {f"{key[:-1]}{key[-1]}x": 1}, f"{key}x"
    for key in DataFlexConfig.model_fields:
        yield {"dataflex": {**SELECT, f"{key}x": 1}}, f"dataflex.{key}x"
    for family, kind in registry.CONFIG_KEYS.items():
        for name in registry.available(kind):
            yield {"dataflex": {family: {"method": f"{name}x"}}}, f"dataflex.{family}.method"
    yield {"dataflex": {"select": {"method": "loss", "fokus": "high"}}}, "dataflex.select.fokus"


def wrong_type() -> Iterator[Case]:
    values = {"str": 2024, "int": "many", "float": "much", "bool": "maybe"}
    for key, argument in list(sorted(llamafactory_arguments().items()))[::3]:
        types = argument.types - {"None"}
        if "any" in types or key.startswith(("kt_", "ray_", "vllm_", "export_")):
            continue
        yield {key: next((values[kind] for kind in values if kind in types), 3)}, key
    for key in ("output_dir", "model_name_or_path", "dataset_dir", "template", "run_name"):
        for value in (1, 2.5, True, ["a"], {"a": 1}):
            yield {key: value}, key
    for key in DataFlexConfig.model_fields:
        yield {"dataflex": {**SELECT, key: {"nothing": "of this"}}}, f"dataflex.{key}"
    for family in registry.CONFIG_KEYS:
        for value in ("loss", ["loss"], 5, True):
            yield {"dataflex": {family: value}}, f"dataflex.{family}"


def out_of_range() -> Iterator[Case]:
    for key, (low, low_allowed, high, high_allowed) in RANGES.items():
        whole = "float" not in llamafactory_arguments()[key].types
        yield {key: math.ceil(low - 1) if whole or low_allowed else low}, key
        if high < math.inf:
            yield {key: high + 1 if high_allowed else high}, key
    for value in (0, -2):
        yield {"max_steps": value}, "max_steps"
    for key in ("learning_rate", "weight_decay"):
        yield {key: math.nan}, key
        yield {key: math.inf}, key
    yield {"dataflex": {**SELECT, "update_steps": 0}}, "dataflex.update_steps"
    yield {"dataflex": {**SELECT, "train_seconds": math.inf}}, "dataflex.train_seconds"


def missing_package() -> Iterator[Case]:
    for name, modules in packages.TRACKERS.items():
        if modules:
            yield {"report_to": name}, "report_to"
    for key, values in packages.VALUES.items():
        for name in values:
            yield {key: name}, key
    for key in [*packages.FLAGS, *dict(required_packages())]:
        if key not in ("deepspeed", "use_kt"):
            yield {key: True}, key
    for method in packages.QUANTIZATION:
        yield {"quantization_bit": 8, "quantization_method": method}, "quantization_bit"


def missing_file() -> Iterator[Case]:
    for key in ("deepspeed", "fsdp_config", "accelerator_config", "new_special_tokens_config"):
        yield {key: "gone.json"}, key
    for key in ("adapter_name_or_path", "model_name_or_path", "ref_model"):
        yield {key: "./gone"}, key
    yield {"dataset_dir": "gone"}, "dataset_dir"
    for key in ("dataset", "eval_dataset"):
        for name in ("gone", "nobody", "text", "list", "number", "nothing", "columns", "role", "empty", "cut", "pairs"):
            yield {key: name}, key
    yield {"dataflex": {**SELECT, "plugins": ["gone.py"]}}, "plugins"
    yield {"dataflex": {"mix": {"method": "static", "proportions": "gone.json"}}}, "dataflex.mix.proportions"
    tracin = {"method": "tracin", "checkpoints": ["gone"], "validation": "held"}
    yield {"dataflex": {"select": tracin}}, "dataflex.select.checkpoints"


def contradictory() -> Iterator[Case]:
    evaluating = {"eval_strategy": "steps", "eval_dataset": "held", "eval_steps": 2}
    yield {"load_best_model_at_end": True}, "load_best_model_at_end"
    yield {"load_best_model_at_end": True, **evaluating}, "load_best_model_at_end"
    both = {"save_strategy": "steps", "save_steps": 3}
    yield {"load_best_model_at_end": True, **evaluating, **both}, "load_best_model_at_end"
    yield {"early_stopping_steps": 3}, "early_stopping_steps"
    yield {"early_stopping_steps": 3, **evaluating}, "metric_for_best_model"
    yield {"save_strategy": "best"}, "save_strategy"
    yield {"metric_for_best_model": "beta_loss", "early_stopping_steps": 2, **evaluating}, "metric_for_best_model"
    yield {"fsdp": "full_shard auto_wrp"}, "fsdp"
    yield {"log_level": "loud"}, "log_level"
    yield {"eval_strategy": "steps"}, "eval_strategy"
    yield {"do_eval": True}, "do_eval"
    yield {"do_predict": True, "eval_dataset": "held"}, "do_predict"
    yield {"eval_dataset": "held", "val_size": 0.1}, "val_size"
    yield {"bf16": True, "fp16": True}, "bf16"
    yield {"bf16_full_eval": True, "fp16_full_eval": True}, "bf16_full_eval"
    yield {"quantization_bit": 4, "finetuning_type": "full"}, "quantization_bit"
    yield {"quantization_bit": 3}, "quantization_bit"
    yield {"quantization_bit": 4, "quantization_method": "gptq"}, "quantization_method"
    yield {"dataset": "pairs"}, "dataset"
    yield {"stage": "dpo"}, "dataset"
    yield {"stage": "ppo", "reward_model": "m", "dataflex": SELECT}, "stage"
    yield {"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"
    yield {"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs"
    yield {"optim_args": "momentum"}, "optim_args"
    yield {"deepspeed": {"zero_optimization": {"stage": 3}}, "pure_bf16": True}, "pure_bf16"
    yield {"deepspeed": {}, "fsdp": "full_shard"}, "fsdp"
    yield {"galore_layerwise": True, "gradient_accumulation_steps": 2}, "galore_layerwise"
    # What LLaMA-Factory's own parser finds; the key is read from the condition that refuses.
    yield {"finetuning_type": "full", "pissa_init": True}, "pissa_init"
    yield {"finetuning_type": "full", "loraplus_lr_ratio": 2.0}, "loraplus_lr_ratio"
    yield {"interleave_probs": "0.5,0.5"}, "interleave_probs"
    yield {"mask_history": True, "train_on_prompt": True}, "mask_history"
    yield {"quantization_device_map": "auto"}, "quantization_device_map"
    for family in ("select", "order", "weight"):
        by_column = {"method": "score_column", "column": "quality"}
        yield {"dataflex": {family: by_column}}, f"dataflex.{family}"  # no data set has it
        yield {"dataflex": {family: {**by_column, "column": "output"}}}, f"dataflex.{family}"  # it is text
        yield {"dataflex": {family: {"method": "score_column"}}}, f"dataflex.{family}.column"
    free = {"method": "score_column", "column": "quality", "max_overhead": 0.1}
    yield {"dataflex": {"select": free}}, "dataflex.select.max_overhead"
    yield {"dataflex": {**SELECT, "columns": ["outputs"]}}, "dataflex.columns"
    yield {"dataflex": {**SELECT, "columns": "output"}}, "dataflex.columns"
    yield {"dataflex": {**SELECT, "columns": ["output"]}, "packing": True}, "dataflex.columns"
    yield {"dataflex": {"columns": ["output"]}, "streaming": True}, "streaming"
    yield {"dataflex": {"columns": ["output"]}, "mix_strategy": "interleave_under"}, "mix_strategy"
    yield {"infer_backend": "vllm"}, "infer_backend"
    yield {"stage": "pt", "dataset": "texts", "neat_packing": True}, "neat_packing"
    yield {"finetuning_type": "full", "adapter_name_or_path": "org/adapter"}, "adapter_name_or_path"
    yield {"use_llama_pro": True, "finetuning_type": "full"}, "use_llama_pro"
    yield {"streaming": True, "max_steps": -1}, "streaming"
    yield {"accelerator_config": {"nope": 1}}, "accelerator_config"
    yield {"fsdp_config": {"min_num_params": "many"}}, "fsdp_config"
    yield {"image_max_pixels": 10, "image_min_pixels": 20}, "image_max_pixels"
    yield {"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"
    yield {"save_strategy": "steps", "save_steps": 1.5}, "save_steps"


def of_other_launchers() -> Iterator[Case]:
    yield (
        {"model_name_or_path": None, "model": "org/m", "train_dataset": "a.yaml", "dist_config": {"name": "fsdp2"}},
        "v1",
    )
    yield {"model_name_or_path": None, "model": "org/m", "peft_config": {"name": "lora"}, "dataflex": SELECT}, "v1"
    yield {"micro_batch_size": 1}, "per_device_train_batch_size"
    for section in ({}, {"dataflex": SELECT}):
        yield {"ray_num_workers": 4, "resources_per_worker": {"GPU": 1}, **section}, "Ray"
        yield {"tensor_model_parallel_size": 2, "moe_grouped_gemm": True, **section}, "Megatron"
        yield {"use_kt": True, "kt_optimize_rule": "x.yaml", "cpu_infer": 32, **section}, "KTransformers"
    yield {"do_train": None, "output_dir": None, "infer_backend": "vllm"}, "infer_backend"
    yield {"do_train": None, "output_dir": None, "task": "mmlu_test", "n_shot": 5}, "dataflex-cli eval"
    yield {"do_train": None, "output_dir": None, "export_dir": "merged", "export_size": 2}, "export"


GROUPS = {
    each.__name__: each
    for each in (
        misplaced, misspelt, wrong_type, out_of_range, missing_package, missing_file, contradictory, of_other_launchers,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    tiny.make_data(root / "data", {"alpha": 48, "beta": 32, "held": 12})
    entries = {
        "gone": {"file_name": "gone.json"},
        "text": "alpha.json",
        "list": ["alpha.json"],
        "number": 5,
        "nothing": {},
        "columns": {"file_name": "alpha.json", "columns": {"prompt": "question"}},
        "cut": {"file_name": "cut.json"},
    }
    tiny.add_entries(root / "data", entries)
    conversation = {"conversations": [{"role": "user", "content": "a"}]}
    tiny.add_data(root / "data", "role", [conversation] * 3, formatting="sharegpt")
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    tiny.add_data(root / "data", "pairs", [{"q": "a", "a": "b", "b": "c"}] * 3, ranking=True, columns=columns)
    tiny.add_data(root / "data", "empty", [])
    (root / "data" / "cut.json").write_text('[{"instruction": "a", "input')
    return root


def write(folder: Path, changes: dict[str, Any]) -> Path:
    keys = {**tiny.arguments(folder / "model", folder / "data", folder / "out"), **changes}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    return path


def test_the_corpus_is_large() -> None:
    assert sum(len(list(cases())) for cases in GROUPS.values()) > 500
    assert all(len(list(cases())) >= 9 for cases in GROUPS.values())


@pytest.mark.parametrize("group", GROUPS)
def test_every_broken_file_is_refused_with_its_key(
    folder: Path, group: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every broken file ends with status 2 and a message that names its key; all of a group in one test, for speed."""
    monkeypatch.chdir(folder)
    there = group != "missing_package"
    monkeypatch.setattr(packages, "_there", lambda module: there)
    monkeypatch.setattr(packages, "_satisfied", lambda requirement: there)
    wrong = []
    for changes, key in GROUPS[group]():
        path = write(folder, changes)
        try:
            status = cli.main(["check", str(path)])
        except Exception as error:  # noqa: BLE001 - that is what must not happen
            status = repr(error)
        text = capsys.readouterr().err
        if (
            status != 2
            or "Traceback" in text
            or key not in text.replace(path.name, "")
            or not text.startswith("dataflex: ")
        ):
            wrong.append((changes, key, status, text))
    assert not (folder / "out").exists()
    assert not wrong, "\n".join(map(str, wrong))


SYNTAX = {
    "learning_rate: 1\nlearning_rate: 2\n": ["line 2, column 1", "duplicate key learning_rate"],
    "dataflex:\n\tselect: 1\n": ["line 2", "tabs"],
    "stage: sft\nlearning_rate 1e-4\nseed: 1\n": ["line 3", "could not find expected ':'", "'learning_rate 1e-4'"],
    "learning_rate 1e-4\nseed: 1\n": ["line 2", "'learning_rate 1e-4', has no colon"],
    "dataset: [a, b\nseed: 1\n": ["line 2", "did not find expected ',' or ']'"],
    "dataset: 'a\nseed: 1\n": ["line 3", "quoted scalar in line 1", "dataset: 'a"],
    "output_dir: a: b\n": ["line 1", "column", "quotes"],
    "dataset: *a\n": ["line 1", "undefined alias"],
    "dataset: @a\n": ["line 1", "cannot start any token"],
    "a: 1\n---\nb: 2\n": ["line 2", "another document"],
    "output_dir: ${nowhere}\n": ["output_dir", "'nowhere' not found"],
    "output_dir: ${oc.env:NOT_SET_ANYWHERE}\n": ["output_dir", "NOT_SET_ANYWHERE"],
    "": ["empty"],
    "# only a comment\n": ["empty"],
    "just words\n": ["mapping"],
    "- a\n- b\n": ["mapping"],
    "stage:sft\n": ["stage:sft", "space"],
    '{"a": 1,}': ["line 1, column 9", "double quotes"],
    '{"stage": "sft", "stage": "pt"}': ["duplicate key stage"],
    '{"a": 1 "b": 2}': ["line 1, column 9", "','"],
    "[1]": ["mapping"],
}


@pytest.mark.parametrize("text", SYNTAX)
def test_the_parsers_reason_is_kept(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ("run.json" if text.startswith(("{", "[")) else "run.yaml")
    path.write_text(text)
    assert cli.main(["check", str(path)]) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    for word in SYNTAX[text]:
        assert word in said, said


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_bytes("stage: sft\nrun_name: f\xfcr".encode("latin-1"))
    for path, word in (
        (tmp_path / "run.yaml", "line 2: not UTF-8"),
        (tmp_path, "is a folder"),
        (tmp_path / "rum.yaml", "did you mean 'run.yaml'"),
        (tmp_path / "run.txt", ".yaml"),
    ):
        assert cli.main(["check", str(path)]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("stage.x=1", "stage is 'sft'"),
        ("dataflex.select.method.x=1", "dataflex.select.method is 'loss'"),
        ("dataset=[a", "'[a' cannot be read"),
        ("=1", "key=value"),
        ("a..b=1", "key=value"),
        ("output_dir=${nowhere}", "output_dir"),
        ("lerning_rate=1", "did you mean 'learning_rate'"),
        ("dataflex={}", "changes nothing"),
        ("dataflex.select={}", "dataflex.select=null removes"),
    ],
)
def test_overrides_that_cannot_be_merged_are_refused(
    folder: Path, override: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, {"dataflex": SELECT})
    assert cli.main(["check", str(path), override]) == 2
    assert word in capsys.readouterr().err


def test_an_override_given_twice_with_other_values_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, {"dataflex": SELECT})
    assert cli.main(["check", str(path), "learning_rate=1e-4", "learning_rate=2e-4"]) == 2
    assert "learning_rate is given twice, before as '1e-4'" in capsys.readouterr().err
    assert cli.main(["check", str(path), "learning_rate=1e-4", "learning_rate=1e-4"]) == 0


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [
    (page.stem, number, example)
    for page in PAGES
    for number, example in enumerate(map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)))
    if isinstance(example, dict) and "dataflex" in example
]

SCORED = {("offline", 1)}
"""Files that are for ``score`` alone."""


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: plug-ins, checkpoints, a table of mixtures."""
    root = tmp_path_factory.mktemp("examples")
    pages = "".join((ROOT / name).read_text() for name in ("README.md", "docs/measurements.md"))
    for text in re.findall(r"```python\n(.*?)```", pages, re.DOTALL):
        name = re.match(r"# (\w+\.py)\n", text)
        if name is not None:
            (root / name[1]).write_text(text)
    for plugin in (ROOT / "tests" / "plugins").glob("*.py"):  # another text is another plug-in than that of other tests
        (root / plugin.name).write_text(plugin.read_text() + "\n# named by a page\n")
    for model in ("model", "models/llama-2-7b", "models/smollm2-135m", "saves/reference", "saves/held-out"):
        (root / model).mkdir(parents=True)
        (root / model / "config.json").write_text('{"num_local_experts": 8}')  # for moe_balance
    for step in (100, 200, 105, 211, 317, 420):
        folder = root / "saves" / "warm" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").touch()
        (folder / "optimizer.pt").touch()
        (folder / "adapter_config.json").write_text("{}")
        log = [{"step": step, "learning_rate": 1e-4, "loss": 1.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    (root / "proxies").mkdir()
    (root / "proxies" / "mixtures.csv").write_text(
        "index,web,code,papers\n1,0.61,0.29,0.1\n2,0.05,0.95,0\n3,0,0.5,0.5\n4,1,0,0\n"
    )
    (root / "proxies" / "losses.csv").write_text("index,web,code\n1,3.4,2.2\n2,4.1,1.7\n3,4.0,1.9\n4,3.1,2.9\n")
    return root


def named(example: dict[str, Any]) -> set[str]:
    section = example["dataflex"] or {}
    given = [example.get("dataset", "alpha"), example.get("eval_dataset")]
    for entries in map(section.get, ("select", "mix", "order", "weight")):
        each_entry = entries if isinstance(entries, list) else [entries or {}]
        given += [entry.get("validation") for entry in each_entry]
    words = [word for each in given for word in ([each] if isinstance(each, str) else each or [])]
    return {name.strip() for word in words for name in word.split(",")}


@pytest.mark.parametrize(
    ("page", "number", "example"), EXAMPLES, ids=[f"{page}-{number}" for page, number, _ in EXAMPLES]
)
@pytest.mark.usefixtures("all_packages")
def test_the_examples_of_the_documentation_pass_check(
    examples: Path,
    page: str,
    number: int,
    example: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(examples)
    data = examples / f"data-{page}-{number}"
    data.mkdir()
    scores = {"quality": 0.5, "complexity": 0.5, "difficulty": 2, "weight": 1, "spans": []}
    scores |= {"reward_chosen": 1.0, "reward_rejected": 0.0}
    answers = {"output": "b"} if example.get("stage") != "dpo" else {"chosen": "b", "rejected": "c"}
    pairs = {"columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}, "ranking": True}
    for name in named(example):
        rows = [{"instruction": "a", "input": "", **answers, "topic": "c", **scores}] * 2000
        tiny.add_data(data, name, rows, **(pairs if "chosen" in answers else {}))
    if "ptx" in (example["dataflex"] or {}):
        tiny.add_data(data, example["dataflex"]["ptx"]["dataset"], [{"text": "a"}] * 9, columns={"prompt": "text"})
    keys = tiny.arguments(examples / "model", data, examples / "out", **example)
    keys |= {"dataset_dir": str(data), "max_steps": example.get("max_steps", -1)}
    if not Path(str(keys["model_name_or_path"])).exists():
        keys["model_name_or_path"] = str(examples / "model")
    path = examples / "run.yaml"
    path.write_text(yaml.safe_dump(keys))
    if (page, number) in SCORED:
        assert problems_of(replace(load_config(path), offline=True)) == []
        return
    status = cli.main(["check", str(path)])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "no problems" in said.out
    assert "plan:" in said.out
