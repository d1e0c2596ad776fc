"""Sampled responses: the same on any number of processes, ended at eos, and no trace left in the training."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from dataflex import distributed
from dataflex.api.probe import GenerationSettings
from dataflex.errors import ComponentError, DivergenceError
from dataflex.probe import generation
from dataflex.probe.generation import Generator, generate_responses
from dataflex.probe.memory import BatchLimit
from dataflex.trainer.probing import _tokens
from tiny import make_model

EOS = 2
SETTINGS = GenerationSettings(samples=3, max_new_tokens=6, temperature=1.2, top_p=0.95, top_k=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), dropout=0.3)


@pytest.fixture
def model(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder).train()


def some_prompts(count: int = 7) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 100, size).tolist() for size in rng.integers(1, 20, count)]


def responses(model: Any, prompts: list[list[int]], settings: GenerationSettings = SETTINGS, **changes: Any) -> Any:
    seed = changes.pop("seed", 5)
    given: dict[str, Any] = {"pad_token_id": EOS, "eos_token_ids": [EOS], "batch_tokens": 150, **changes}
    given.setdefault("limit", BatchLimit("generate responses", "Set fewer."))
    return generate_responses(Generator(model, device=torch.device("cpu"), **given), prompts, settings, seed)


def test_a_batch_that_does_not_fit_is_halved(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, generate, sizes = some_prompts(), type(model).generate, []

    def short_of_memory(self: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError
        return generate(self, **kwargs)

    whole = responses(model, prompts)
    monkeypatch.setattr(type(model), "generate", short_of_memory)
    limit = BatchLimit("generate responses", "Set fewer.")
    found = responses(model, prompts, limit=limit)
    assert [len(each) for each in found] == [len(each) for each in whole]
    assert max(sizes) > 2
    assert limit.tokens is not None
    collective = BatchLimit("generate responses", "Set fewer.", collective=True)
    with pytest.raises(ComponentError, match=r"to generate responses of \d samples .*probe_batch_tokens to less than"):
        responses(model, prompts, limit=collective)


def test_every_prompt_gets_its_number_of_responses(model: Any) -> None:
    found = responses(model, some_prompts())
    assert [len(own) for own in found] == [3] * 7
    assert all(1 <= len(response) <= 6 for own in found for response in own)
    assert len({tuple(response) for own in found for response in own}) > 10
    assert responses(model, []) == []


def test_responses_depend_on_the_seed_alone(model: Any) -> None:
    first = responses(model, some_prompts())
    torch.rand(11)
    assert responses(model, some_prompts()) == first
    assert responses(model, some_prompts(), seed=6) != first


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_several_ranks_generate_the_responses_of_one(
    model: Any, monkeypatch: pytest.MonkeyPatch, world_size: int, synced: bool
) -> None:
    prompts = some_prompts()
    alone = responses(model, prompts)
    calls: list[int] = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **given: calls.append(1) or generate(**given | {"synced_gpus": False})
    )
    parts: list[dict[int, Any]] = []
    counts = []
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "gather_objects", lambda value: parts.append(dict(value)) or [])
        for rank in range(world_size):
            calls.clear()
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            with pytest.raises(KeyError):  # alone, a rank has only its share
                responses(model, prompts, synced=synced)
            counts.append(len(calls))
    assert sum(map(len, parts)) == len(prompts)  # every prompt once
    assert not synced or len(set(counts)) == 1  # as many collective forwards everywhere
    monkeypatch.setattr(distributed, "gather_objects", lambda value: parts)
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert responses(model, prompts, synced=synced) == alone


def test_padding_and_batch_neighbours_do_not_change_the_distribution(model: Any) -> None:
    """At a temperature near 0 responses are greedy: a batch of unequal prompts gives what each prompt alone gives."""
    settings = GenerationSettings(samples=1, max_new_tokens=5, temperature=1e-4)
    prompts = some_prompts(4)
    together = responses(model, prompts, settings, batch_tokens=10_000)
    model.eval()
    for prompt, (response,) in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == EOS:
                break
        assert response == tokens[len(prompt) :]


def test_responses_end_with_the_first_eos(model: Any) -> None:
    ends = list(range(2, 60))  # about half of the vocabulary
    found = responses(model, some_prompts(), eos_token_ids=ends, pad_token_id=0)
    flat = [response for own in found for response in own]
    assert any(len(response) < 6 for response in flat)
    for response in flat:
        assert not set(response[:-1]) & set(ends)
        assert response[-1] in ends or len(response) == 6


def test_token_frequencies_follow_the_policy(model: Any) -> None:
    prompt = [5, 9, 20]
    settings = GenerationSettings(samples=4000, max_new_tokens=1, temperature=2.0)
    ((*drawn,),) = responses(model, [prompt], settings)
    counts = np.bincount([token for (token,) in drawn], minlength=model.config.vocab_size)
    model.eval()
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1] / 2, -1).numpy()
    assert np.abs(counts / 4000 - expected).max() < 5 * np.sqrt(expected.max() / 4000)
    # top_k = 1 leaves the likeliest
    greedy = responses(model, [prompt], GenerationSettings(samples=8, max_new_tokens=1, top_k=1))
    assert {token for ((*own,),) in [greedy] for (token,) in own} == {int(expected.argmax())}


def test_generation_leaves_no_trace(model: Any) -> None:
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.model.layers[0].eval()
    model.generation_config.repetition_penalty = 1.3
    settings_before, modes = model.generation_config, [module.training for module in model.modules()]
    states = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002
    plain = responses(model, some_prompts())
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings_before
    assert model.config.use_cache is False
    assert all(parameter.grad is None for parameter in model.parameters())
    # neither dropout, nor checkpointing, nor the model's own penalty took part
    fresh = LlamaForCausalLM.from_pretrained(model.config._name_or_path).eval()
    assert responses(fresh, some_prompts()) == plain


def test_generation_caches_although_training_checkpoints(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    widths = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **given: widths.append(given["input_ids"].shape[1]) or forward(*args, **given)
    )
    responses(model, [[4, 5, 6, 7]])
    assert widths[0] == 4
    assert set(widths[1:]) == {1}


def test_the_adapter_is_active_in_generation(model: Any) -> None:
    plain = responses(model, some_prompts())
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)).train()
    before = set(vars(wrapped.base_model))
    assert responses(wrapped, some_prompts()) == plain  # B starts at zero
    assert set(vars(wrapped.base_model)) == before
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    changed = responses(wrapped, some_prompts())
    assert changed != plain
    assert changed == responses(wrapped.merge_and_unload(), some_prompts())


def test_bad_requests_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ComponentError, match="prompt 1 has no token"):
        responses(model, [[3], []])
    vllm = GenerationSettings(backend="vllm")
    with pytest.raises(ComponentError, match="pip install vllm"):
        responses(model, [[3]], vllm)
    with pytest.raises(ComponentError, match="use backend hf"):
        responses(model, [[3]], vllm, synced=True)
    monkeypatch.setattr(generation, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ComponentError, match="CUDA GPU"):
        responses(model, [[3]], vllm)


STAND_IN = """
import json, os, pathlib
class SamplingParams:
    def __init__(self, **given): self.__dict__.update(given)
class Sample:
    def __init__(self, token_ids): self.token_ids = token_ids
class LLM:
    def __init__(self, **given): self.given = given
    def generate(self, prompts, params, lora_request):
        if os.environ.get("STAND_IN_FAILS"):
            raise RuntimeError("no memory left")
        folder = lora_request or self.given["model"]
        seen = {"engine": self.given, "adapter": lora_request, "sampling": vars(params[0]),
                "environment": sorted(os.environ), "devices": os.environ["CUDA_VISIBLE_DEVICES"],
                "files": sorted(path.name for path in pathlib.Path(folder).iterdir())}
        pathlib.Path(os.environ["SEEN"]).write_text(json.dumps(seen))
        outputs = []
        for prompt, one in zip(prompts, params):
            output = Sample(None)
            output.outputs = [Sample((*prompt["prompt_token_ids"], number, 2, 7)) for number in range(one.n)]
            outputs.append(output)
        return outputs
"""


@pytest.mark.parametrize("adapted", [False, True])
def test_vllm_gets_the_generation_settings(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapted: bool
) -> None:
    package = tmp_path / "path" / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "lora" / "__init__.py").touch()
    (package / "lora" / "request.py").write_text("def LoRARequest(name, number, folder):\n    return folder\n")
    for name, value in {"PYTHONPATH": str(package.parent), "SEEN": str(tmp_path / "seen"), "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(generation, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50, 100))
    given = get_peft_model(model, LoraConfig(r=12, target_modules="all-linear")) if adapted else model
    settings = GenerationSettings(samples=2, max_new_tokens=9, backend="vllm")
    assert responses(given, [[5], [6, 4]], settings) == [[[5, 0, 2], [5, 1, 2]], [[6, 4, 0, 2], [6, 4, 1, 2]]]
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen["devices"] == "6"
    assert "RANK" not in seen["environment"]
    assert seen["engine"]["gpu_memory_utilization"] == pytest.approx(0.45)
    sampling = seen["sampling"]
    assert (sampling["n"], sampling["max_tokens"], sampling["top_k"], sampling["stop_token_ids"]) == (2, 9, -1, [EOS])
    if adapted:
        assert "adapter_config.json" in seen["files"]
        assert seen["engine"]["max_lora_rank"] == 16
        assert seen["engine"]["model"] == model.config._name_or_path
    else:
        assert {"config.json", "model.safetensors"} <= set(seen["files"])
        assert seen["adapter"] is None
        monkeypatch.setenv("STAND_IN_FAILS", "1")
        with pytest.raises(ComponentError, match=r"(?s)vLLM ended with 1:.*no memory left"):
            responses(given, [[5]], settings)


def test_responses_end_at_the_eos_token_by_default() -> None:
    tokenizer = SimpleNamespace(pad_token_id=1, eos_token_id=EOS, decode=lambda tokens, **_: "")
    assert _tokens(tokenizer, None).eos == (EOS,)
    assert _tokens(SimpleNamespace(tokenizer=tokenizer), [EOS, 7, EOS, 7, 5]).eos == (EOS, 7, 5)


def test_a_diverged_model_gives_no_response(model: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(DivergenceError, match=r"next token are not finite: has training diverged\?"):
        responses(broken, some_prompts())
