"""Stored checkpoints: weights for a while and the model's own bits afterwards, moments, learning rates."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import tiny
import vision
from dataflex.errors import ComponentError, ConfigError
from dataflex.probe.checkpoints import learning_rates, load_renamed, saved_moments, weights_of
from dataflex.probe.moments import Moments, read_moments
from unit.probe.pairs import with_value_head

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def mixtral(**changes: Any) -> Any:
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_experts_per_tok": 2, "num_local_experts": 4, **changes}))


def qwen3_moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **experts}))


def lora(base: Any = None, **changes: Any) -> Any:
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    return get_peft_model(llama() if base is None else base, LoraConfig(**options))


def freeze(model: Any) -> Any:
    for name, value in model.named_parameters():
        value.requires_grad_("layers.1." in name)
    return model


def in_two_precisions() -> Any:
    model = freeze(llama().bfloat16())
    for value in model.parameters():
        if value.requires_grad:
            value.data = value.data.float()
    return model


KINDS = {
    "full": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "freeze": lambda: freeze(llama()),
    "freeze in two precisions": in_two_precisions,
    "mixtral": mixtral,
    "mixtral, a part": lambda: freeze(mixtral()),
    "qwen3 moe": qwen3_moe,
    "lora": lora,
    "lora and a whole head": lambda: lora(modules_to_save=["lm_head"]),
    "dora": lambda: lora(use_dora=True),
}


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def trained(model: Any, seed: int = 1) -> Any:
    """Return a copy whose trainable parameters have moved."""
    torch.manual_seed(seed)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for value in moved.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value))
    return moved


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_has_the_weights_of_the_checkpoint_inside_and_its_own_afterwards(
    tmp_path: Path, kind: str, fails: bool
) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]()
    other = trained(model)
    other.save_pretrained(tmp_path)
    before, wanted = bits(model), bits(other)
    places = {name: value.data_ptr() for name, value in model.named_parameters()}
    assert any(not torch.equal(before[name], wanted[name]) for name in before)
    try:
        with weights_of(model, tmp_path):
            assert_same(bits(model), wanted)
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    assert_same(bits(model), before)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == places  # the optimizer's too


def save_reward(model: Any, folder: Path) -> None:
    """Write a checkpoint as LLaMA-Factory does: the value head in a file beside the weights or the adapter."""
    model.pretrained_model.save_pretrained(folder)
    head = {f"v_head.{name}": value for name, value in model.v_head.state_dict().items()}
    save_file(head, folder / "value_head.safetensors")


@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_a_reward_model_has_the_value_head_of_the_checkpoint_too(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = with_value_head(KINDS[kind]())
    other = trained(model)
    save_reward(other, tmp_path)
    before, wanted = bits(model), bits(other)
    with weights_of(model, tmp_path):
        assert_same(bits(model), wanted)
    assert_same(bits(model), before)
    (tmp_path / "value_head.safetensors").unlink()
    with (
        pytest.raises(ComponentError, match=r"holds no value_head\.safetensors"),
        weights_of(model, tmp_path),
    ):
        pass
    save_file({"v_head.other": torch.zeros(1)}, tmp_path / "value_head.safetensors")
    with pytest.raises(ComponentError, match=r"v_head\.other"), weights_of(model, tmp_path):
        pass
    assert_same(bits(model), before)


def test_checkpoints_in_several_files_are_read(tmp_path: Path) -> None:
    model = llama()
    other = trained(model)
    other.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with weights_of(model, tmp_path):
        assert_same(bits(model), bits(other))


def test_frozen_parameters_stay_unchanged(tmp_path: Path) -> None:
    model = freeze(llama())
    llama().save_pretrained(tmp_path)  # everything in it is different
    before = bits(model)
    with weights_of(model, tmp_path):
        changed = {name for name, value in bits(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("layers.1." in name for name in changed)
    assert_same(bits(model), before)


@pytest.mark.parametrize(
    "mine, theirs, text",
    [
        (lora, llama, "holds no adapter"),
        (llama, lora, "no model weights"),
        (llama, lambda: llama(num_hidden_layers=3), "layers.2"),
        (lambda: llama(num_hidden_layers=3), llama, "layers.2"),
        (llama, lambda: llama(hidden_size=32), "size mismatch"),
        (mixtral, lambda: mixtral(num_local_experts=8), "size mismatch"),
        (mixtral, llama, r"layers\.0\.mlp\.down_proj"),
        (llama, lambda: llama(tie_word_embeddings=True), "lm_head"),
        (lambda: llama(tie_word_embeddings=True), llama, "lm_head"),
        (lora, lambda: lora(r=8), r"with r = 8, this run has 4"),
        (lora, lambda: lora(target_modules=["q_proj"]), "k_proj"),
        (lambda: lora(target_modules=["q_proj"]), lora, r"down_proj\.lora_A"),
    ],
)
def test_a_checkpoint_of_another_model_is_an_error(tmp_path: Path, mine: Any, theirs: Any, text: str) -> None:
    theirs().save_pretrained(tmp_path)
    model = mine()
    before = bits(model)
    with pytest.raises(ComponentError, match=f"checkpoints: .*{text}"), weights_of(model, tmp_path):
        pass
    assert_same(bits(model), before)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_experts_stored_separately_and_in_several_files_are_read(tmp_path: Path, make: Any) -> None:
    model = make()
    other = trained(model)
    other.save_pretrained(tmp_path, max_shard_size="8KB")
    stored = {name: value for path in tmp_path.glob("*.safetensors") for name, value in load_file(path).items()}
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert any(".experts.3." in name for name in stored)
    assert not any(".experts." in name and name in stored for name in dict(model.named_parameters()))
    before = bits(model)
    with weights_of(model, tmp_path):
        assert_same(bits(model), bits(other))
    assert_same(bits(model), before)


@pytest.mark.parametrize("make", [llama, mixtral, lora])
def test_reading_a_checkpoint_draws_no_random_number(tmp_path: Path, make: Any) -> None:
    model = make()
    trained(model).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    with weights_of(model, tmp_path):
        pass
    assert torch.equal(torch.get_rng_state(), state)


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, path, {"format": "pt"})
    state = torch.get_rng_state()
    text = r"not of this model: model\.layers\.1\.mlp\.up_proj"
    with pytest.raises(ComponentError, match=text), weights_of(model, tmp_path):
        pass
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("damage", ["absent", "cut"])
def test_an_unreadable_file_is_named(tmp_path: Path, damage: str) -> None:
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    path = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:100])
    before = bits(model)
    with pytest.raises(ComponentError, match=f"checkpoints: {tmp_path} cannot be read"), weights_of(model, tmp_path):
        pass
    assert_same(bits(model), before)


@pytest.mark.parametrize(
    "key, theirs, mine",
    [
        ("lora_alpha", 16, 8),
        ("lora_alpha", 8, 16),
        ("use_rslora", True, False),
        ("use_rslora", False, True),
        ("use_dora", True, False),
        ("r", 2, 4),
        ("rank_pattern", {"q_proj": 2}, {}),
        ("alpha_pattern", {}, {"q_proj": 64}),
    ],
)
def test_an_adapter_of_another_configuration_is_an_error(tmp_path: Path, key: str, theirs: Any, mine: Any) -> None:
    base = llama()
    lora(copy.deepcopy(base), **{key: theirs}).save_pretrained(tmp_path)
    model = lora(base, **{key: mine})
    before = bits(model)
    text = re.escape(f"the adapter in {tmp_path} was trained with {key} = {theirs!r}, this run has {mine!r}")
    with pytest.raises(ComponentError, match=f"checkpoints: {text}"), weights_of(model, tmp_path):
        pass
    assert_same(bits(model), before)


def test_an_adapter_configuration_of_an_older_peft_is_read(tmp_path: Path) -> None:
    base, path = llama(), tmp_path / "adapter_config.json"
    model = lora(base)
    other = trained(model)
    other.save_pretrained(tmp_path)
    kept = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    path.write_text(json.dumps(kept))
    with weights_of(model, tmp_path):
        assert_same(bits(model), bits(other))
    path.write_text(json.dumps({**kept, "lora_alpha": 32}))
    with pytest.raises(ComponentError, match="lora_alpha = 32, this run has 8"), weights_of(model, tmp_path):
        pass
    path.unlink()
    with pytest.raises(ComponentError, match=r"no adapter_config\.json"), weights_of(model, tmp_path):
        pass


# Moments


def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Decay and no decay, as the Trainer has them."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    return [
        {"params": [value for name, value in named if "norm" not in name], "weight_decay": 0.1},
        {"params": [value for name, value in named if "norm" in name], "weight_decay": 0.0},
    ]


def stepped(model: torch.nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(groups(model), lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(0, SIZES["vocab_size"], (2, 7), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def assert_same_moments(found: dict[str, Moments], expected: dict[str, Moments]) -> None:
    assert found.keys() == expected.keys()
    for name, item in expected.items():
        assert torch.equal(found[name].exp_avg, item.exp_avg), name
        assert torch.equal(found[name].exp_avg_sq, item.exp_avg_sq), name
        assert (found[name].step, found[name].betas, found[name].eps) == (item.step, item.betas, item.eps)


@pytest.mark.parametrize("kind", ["full", "tied", "freeze", "lora"])
def test_saved_moments_are_read_back(tmp_path: Path, kind: str) -> None:
    model = KINDS[kind]()
    optimizer = stepped(model)
    expected = read_moments(optimizer, model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = KINDS[kind]()  # a later process: the same parameters, an optimizer without a step
    found = saved_moments(tmp_path, torch.optim.AdamW(groups(other)), other)
    assert all(item.step == 3 and item.exp_avg.any() for item in found.values())
    assert_same_moments(found, expected)


def test_a_parameter_that_never_had_a_gradient_has_zero_moments_in_both(tmp_path: Path) -> None:
    model = llama()
    model.idle = torch.nn.Linear(3, 3)
    optimizer = stepped(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = saved_moments(tmp_path, optimizer, model)
    assert found["idle.weight"].step == 0
    assert_same_moments(found, read_moments(optimizer, model))


def test_a_checkpoint_without_an_optimizer_file_is_refused(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(ComponentError, match=r"no optimizer\.pt.* preconditioner: none"):
        saved_moments(tmp_path, torch.optim.AdamW(groups(model)), model)


@pytest.mark.parametrize(
    "mine, theirs, text",
    [
        (llama, lambda: llama(num_hidden_layers=1), "state of 12 parameters, the model has 21"),
        (lora, lambda: lora(r=2), "no Adam moments of .*lora_A"),
        (llama, lambda: llama(intermediate_size=32), "no Adam moments of .*mlp"),
    ],
)
def test_moments_of_other_parameters_are_refused(tmp_path: Path, mine: Any, theirs: Any, text: str) -> None:
    torch.save(stepped(theirs()).state_dict(), tmp_path / "optimizer.pt")
    model = mine()
    with pytest.raises(ComponentError, match=f"{text}.* preconditioner: none"):
        saved_moments(tmp_path, torch.optim.AdamW(groups(model)), model)


def test_moments_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    model = llama()
    optimizer = torch.optim.SGD(groups(model), lr=0.1, momentum=0.9)
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ComponentError, match=r"no Adam moments of model\.embed_tokens\.weight"):
        saved_moments(tmp_path, torch.optim.AdamW(groups(model)), model)


# Learning rates


def states(root: Path, log: dict[int, float | None], steps: list[int]) -> list[Path]:
    """Write checkpoints of one run: each has the log so far; None: an entry of an evaluation."""
    folders = []
    for step in steps:
        entries = [
            {"step": at, "eval_loss": 1.0} if rate is None else {"step": at, "learning_rate": rate}
            for at, rate in log.items()
            if at <= step
        ]
        folder = root / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": entries}))
        folders.append(folder)
    return folders


def test_weights_are_the_mean_rates_before_each_checkpoint_scaled_to_one(tmp_path: Path) -> None:
    log = {1: 1.0, 2: 3.0, 3: None, 4: 2.0, 5: 5.0, 6: 3.0, 7: 2.0, 8: 0.0}
    folders = states(tmp_path, log, [4, 6, 8])
    assert learning_rates(folders) == pytest.approx([2 / 7, 4 / 7, 1 / 7])
    assert learning_rates(folders[:1]) == [1.0]
    assert learning_rates(folders[1:]) == pytest.approx([14 / 19, 5 / 19])  # the first stretch begins with the run


def test_a_checkpoint_without_a_logged_rate_is_refused(tmp_path: Path) -> None:
    folders = states(tmp_path, {10: 1.0, 20: 0.5}, [10, 15])
    with pytest.raises(ConfigError, match=r"checkpoint-15.*after step 10; set checkpoint_weights"):
        learning_rates(folders)
    with pytest.raises(ConfigError, match="after step 15"):
        learning_rates(folders[::-1])


def test_rates_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all 0; set checkpoint_weights"):
        learning_rates(states(tmp_path, {1: 0.0, 2: 0.0}, [1, 2]))


def test_an_unreadable_trainer_state_is_refused(tmp_path: Path) -> None:
    folders = states(tmp_path, {1: 1.0}, [1, 2])
    (folders[0] / "trainer_state.json").write_text('{"log')
    with pytest.raises(ConfigError, match=r"checkpoint-1/trainer_state\.json cannot be read.*set checkpoint_weights"):
        learning_rates(folders[:1])
    (folders[1] / "trainer_state.json").unlink()
    with pytest.raises(ConfigError, match=r"checkpoint-2/trainer_state\.json cannot be read"):
        learning_rates(folders[1:])


@pytest.mark.parametrize("kind", ["llava", "experts"])
def test_weights_stored_under_other_names_are_loaded(tmp_path: Path, kind: str) -> None:
    """The Trainer loads by name without an error, and so nothing or a part."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder = vision.make_llava(tmp_path / "model") if kind == "llava" else tiny.make_experts(tmp_path / "model")
    auto = AutoModelForImageTextToText if kind == "llava" else AutoModelForCausalLM
    trained, model = auto.from_pretrained(folder), auto.from_pretrained(folder)
    with torch.no_grad():
        for value in trained.parameters():
            value.add_(torch.randn_like(value))
    trained.save_pretrained(tmp_path / "checkpoint")
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert not stored.keys() <= model.state_dict().keys()
    load_renamed(model, tmp_path / "checkpoint")
    for (name, value), (_, expected) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        assert torch.equal(value, expected), name


def test_weights_stored_under_their_names_are_left_to_the_trainer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path / "model"))
    before = copy.deepcopy(model.state_dict())
    tiny.make_model(tmp_path / "other", seed=1)
    load_renamed(model, tmp_path / "other")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
