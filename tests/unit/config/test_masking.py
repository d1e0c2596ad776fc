"""Secrets: which values are secret, that no file holds them, and that runs still receive them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import tiny
from dataflex.compare.experiment import keyed, run_yaml
from dataflex.config.arguments import llamafactory_keys
from dataflex.config.loading import RunConfig, load_config, split_config
from dataflex.config.masking import HANDED_ON, filled, handed_on, is_secret, masked, masked_argument, masks, secrets
from dataflex.errors import ConfigError
from dataflex.explain.samples import load_texts
from dataflex.record.configuration import read_configuration, recorded
from dataflex.record.environment import environment
from dataflex.record.schema import to_json

SECRET = "hf_abcDEF123"


@pytest.mark.parametrize(
    "key",
    [
        "hf_hub_token", "ms_hub_token", "om_hub_token", "hub_token", "push_to_hub_token", "swanlab_api_key", "apiKey",
        "swanlab_lark_secret", "swanlab_lark_webhook_url", "wandb_api_key", "WANDB_API_KEY", "api-key", "password",
        "db_passwd", "client_secret", "access_key", "AWS_SECRET_ACCESS_KEY", "private_key", "credentials", "hftoken",
        "token", "tokens", "Authorization Token", "openai_apikey",
    ],
)  # fmt: skip
def test_keys_of_secrets_are_recognised(key: str) -> None:
    assert is_secret(key, SECRET)
    assert not is_secret(key, "")
    assert not is_secret(key, None)
    assert not is_secret(key, "128")
    assert not is_secret(key, "false")


@pytest.mark.parametrize(
    "key",
    [
        "add_tokens", "add_special_tokens", "new_special_tokens_config", "init_special_tokens", "skip_special_tokens",
        "tokenized_path", "tokenizer", "tokenizer_name", "api_key_env", "eos_token", "stop_tokens", "max_new_tokens",
        "probe_batch_tokens_file", "token_column", "key", "hub_model_id", "normalization", "unit", "secretary_name",
    ],
)  # fmt: skip
def test_keys_that_resemble_secrets_are_not_masked(key: str) -> None:
    assert not is_secret(key, "some text")


def test_the_secret_keys_of_llamafactory_are_known() -> None:
    assert {key for key in llamafactory_keys() if is_secret(key, SECRET)} == {
        "hf_hub_token", "ms_hub_token", "om_hub_token", "hub_token",
        "swanlab_api_key", "swanlab_lark_webhook_url", "swanlab_lark_secret",
    }  # fmt: skip


NESTED: dict[str, Any] = {
    "hf_hub_token": SECRET,
    "report_to": ["wandb"],
    "deepspeed": {"comms": {"auth_token": SECRET, "steps": 3}},
    "dataflex": {
        "select": {"reward": {"base_url": f"https://me:{SECRET}@host/v1", "options": {"headers": [{"token": SECRET}]}}}
    },
    "tokens": [SECRET, "other"],
}


def test_a_mask_names_its_key_and_is_replaced_by_the_value() -> None:
    hidden = masked(NESTED)
    text = yaml.safe_dump(hidden)
    assert SECRET not in text
    assert hidden["hf_hub_token"] == "<not recorded: hf_hub_token>"
    assert hidden["dataflex"]["select"]["reward"]["base_url"] == "https://<not recorded>@host/v1"
    assert masks(hidden) == [
        "hf_hub_token", "deepspeed.comms.auth_token", "dataflex.select.reward.base_url",
        "dataflex.select.reward.options.headers.0.token", "tokens.0", "tokens.1",
    ]  # fmt: skip
    assert masked(hidden) == hidden
    assert set(secrets(NESTED)) == set(masks(hidden))
    assert filled(yaml.safe_load(text), handed_on(NESTED)[HANDED_ON]) == NESTED
    assert filled(hidden, None) == hidden
    assert handed_on({"dataset": "chat"}) == {}


def test_secrets_in_command_line_arguments_are_masked() -> None:
    assert masked_argument(f"hub_token={SECRET}") == "hub_token=<not recorded: hub_token>"
    assert SECRET not in masked_argument(f"--dataflex.select.reward.options.api_key={SECRET}")
    assert masked_argument("max_new_tokens=64") == "max_new_tokens=64"
    assert masked_argument(f"base_url=http://a:{SECRET}@h") == "base_url=http://<not recorded>@h"


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    data = tiny.make_data(tmp_path / "data")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    changes = {"hf_hub_token": SECRET, "hub_token": SECRET, "swanlab_api_key": SECRET, "dataflex": {}}
    return tiny.arguments(model, data, tmp_path / "out", **changes)


def test_the_record_has_no_secret_and_repeating_it_asks_for_the_secret(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["dataflex-cli", "train", "run.yaml", f"hub_token={SECRET}"])
    config = split_config(keys)
    kept = recorded(config)
    assert SECRET not in json.dumps([kept.configuration, to_json(environment(config, kept, 1, 0))])
    file = tmp_path / "run" / "dataflex" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump(kept.configuration))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    for name in ("hf_hub_token", "hub_token", "swanlab_api_key"):
        assert f"{name}=" in str(caught.value)
    again = load_config(file, ["hf_hub_token=new", "hub_token=null", "swanlab_api_key=null"])
    assert again.llamafactory["hf_hub_token"] == "new"
    assert again.llamafactory["hub_token"] is None
    # a record of the first release had them
    file.write_text(yaml.safe_dump({"llamafactory": keys, "dataflex": {}}))
    assert SECRET not in json.dumps(read_configuration(tmp_path / "run"))


def test_runs_of_a_comparison_get_secrets_by_their_environment(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Run:
        configuration: dict[str, Any]

    key, Run.configuration = keyed(split_config(keys), tmp_path, {})
    text = run_yaml(Run)  # type: ignore[arg-type]
    assert SECRET.encode() not in text
    file = tmp_path / "run.yaml"
    file.write_bytes(text)
    monkeypatch.setenv(HANDED_ON, handed_on(Run.configuration)[HANDED_ON])
    assert load_config(file).llamafactory["hub_token"] == SECRET
    other, _ = keyed(split_config({**keys, "hub_token": "another"}), tmp_path, {})
    assert other == key  # a run is the same with another token


def test_no_mask_is_used_as_a_token_when_texts_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def pool_of(config: RunConfig, column: str | None, whole: bool) -> None:
        seen.update(config.llamafactory)
        raise ConfigError("enough")

    monkeypatch.setattr("dataflex.integrations.llamafactory.pool_only.pool_of", pool_of)
    config = masked({"dataset": "chat", "hf_hub_token": SECRET, "dataflex": {}})
    record = SimpleNamespace(config=config, path=Path("run"), rounds=())
    assert "enough" in str(load_texts(record, full=False))  # type: ignore[arg-type]
    assert seen == {"dataset": "chat"}
