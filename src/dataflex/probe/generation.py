"""Responses sampled from the model in training, by Hugging Face's generate or by vLLM.

Prompts are batched by length under a token budget. The batches do not depend on the number of processes, and the number
of a batch seeds the random stream of that batch. So the responses depend only on the model, the prompts and the seed,
and the training's random streams are restored afterwards. A batch is halved only if it does not fit into memory. The
second half then uses a separate random stream.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from dataflex import distributed
from dataflex.api.probe import GenerationSettings
from dataflex.data.rng import key_of
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError, DivergenceError
from dataflex.files import json_text
from dataflex.probe.batches import length_batches
from dataflex.probe.head import language_model
from dataflex.probe.memory import BatchLimit, release_memory
from dataflex.probe.mode import probe_mode

_VLLM_MEMORY = 0.9
"""Share of the free device memory that vLLM may use."""


@dataclass(frozen=True)
class Generator:
    """A model with everything that generation needs.

    Attributes:
        model: a causal language model of Transformers, or PEFT's wrapper of one.
        pad_token_id: token that fills up shorter prompts on the left.
        eos_token_ids: tokens that end a response.
        batch_tokens: maximal tokens of a batch, counting prompts, responses and padding. A batch has at least one
            prompt.
        device: device of the model.
        limit: limit of tokens in a batch, counted in the same way and lowered when memory runs out.
        synced: whether a forward is collective (ZeRO-3, FSDP), so that all ranks must continue until the last is done.
    """

    model: torch.nn.Module
    pad_token_id: int
    eos_token_ids: list[int]
    batch_tokens: int
    device: torch.device
    limit: BatchLimit
    synced: bool = False


def generate_responses(
    generator: Generator, prompts: list[list[int]], settings: GenerationSettings, seed: int
) -> list[list[list[int]]]:
    """Return ``settings.samples`` responses to each prompt, the same on every rank. Call it on all ranks.

    Call it under the training precision (autocast). A response is the list of generated tokens up to and including the
    first end-of-sequence token, or ``settings.max_new_tokens`` tokens.

    Args:
        generator: the model.
        prompts: token ids of each prompt, at least one token each.
        settings: sampling settings.
        seed: seed of the samples.

    Returns:
        Token ids: for each prompt, a list with one list per response.

    Raises:
        ComponentError: if a prompt is empty or does not fit into memory, or if vLLM is selected and cannot run.
    """
    model, eos_token_ids = generator.model, generator.eos_token_ids
    empty = [number for number, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ComponentError(f"generation: prompt {empty[0]} has no token.")
    decoder = _decoder(model)
    if settings.backend == "vllm":
        if generator.synced:
            raise ComponentError("generation: backend vllm needs the whole weights on one process; use backend hf.")
        model = language_model(model)
        return distributed.on_main(lambda: _vllm_responses(model, eos_token_ids, prompts, settings, seed))
    with distributed.together():
        found = _own_responses(generator, decoder, prompts, settings, seed)
    for theirs in distributed.gather_objects(found):
        found.update(theirs)
    return [found[index] for index in range(len(prompts))]


def _own_responses(
    generator: Generator, decoder: Any, prompts: list[list[int]], settings: GenerationSettings, seed: int
) -> dict[int, list[list[int]]]:
    """Return the responses to this process's share of the prompts, by index of the prompt."""
    rows = settings.samples * np.array([len(prompt) + settings.max_new_tokens for prompt in prompts], dtype=np.int64)
    rank, world_size = distributed.rank(), distributed.world_size()
    mine, useful = length_batches(rows, generator.batch_tokens).share(rank, world_size)
    config = _generation_config(settings, generator.pad_token_id, generator.eos_token_ids)
    found: dict[int, list[list[int]]] = {}
    with (
        probe_mode(generator.model),
        _without_own_settings(decoder),
        _generate_of(generator.model, decoder) as generate,
    ):
        for number, batch in enumerate(mine if generator.synced else mine[:useful]):
            whole = rank + number * world_size  # number of the batch among the batches of all processes

            def responses(part: IndexArray, whole: int = whole, first: int = int(batch[0])) -> list[list[int]]:
                """Return the new tokens of each response to a part of the batch's prompts."""
                stream = (whole,) if part[0] == first else (whole, int(part[0]))
                torch.manual_seed(key_of(seed, "generate", *stream) % 2**63)
                inputs = _left_padded([prompts[index] for index in part], generator.pad_token_id, generator.device)
                tokens = generate(
                    **inputs,
                    generation_config=config,
                    synced_gpus=generator.synced,
                    logits_processor=[_refuse_broken],
                )
                new: list[list[int]] = tokens[:, inputs["input_ids"].shape[1] :].tolist()
                return new

            for part, new in generator.limit.parts(responses, batch, rows):
                if number < useful:
                    for place, index in enumerate(part.tolist()):
                        own = new[place * settings.samples : (place + 1) * settings.samples]
                        found[index] = [_ended(response, generator.eos_token_ids) for response in own]
    return found


def _decoder(model: torch.nn.Module) -> Any:
    """Return the Transformers model whose ``generate`` is used; adapter layers stay in place."""
    from peft import PeftModel

    model = language_model(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _generate_of(model: torch.nn.Module, decoder: Any) -> Iterator[Callable[..., Tensor]]:
    """Give the function ``decoder.generate``.

    Under FSDP2 with an adapter, ``decoder.generate`` bypasses the forward of the FSDP root. The function is then
    registered on the root, so that the root's hooks run.
    """
    if decoder is model or not isinstance(model, FSDPModule):
        yield decoder.generate
        return
    model._dataflex_generate = decoder.generate
    register_fsdp_forward_method(model, "_dataflex_generate")
    try:
        yield model._dataflex_generate
    finally:
        del model._dataflex_generate


def _refuse_broken(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Return the scores of the next token unchanged.

    Raises:
        DivergenceError: if a score is NaN or plus infinity, so that no token can be sampled.
    """
    if torch.isnan(scores).any() or torch.isposinf(scores).any():
        raise DivergenceError("the scores of a response's next token are not finite")
    return scores


def _generation_config(settings: GenerationSettings, pad_token_id: int, eos_token_ids: list[int]) -> Any:
    """Return Transformers' generation configuration for the settings of a measurement."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        num_return_sequences=settings.samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_ids,
        use_cache=True,
    )


@contextmanager
def _without_own_settings(decoder: Any) -> Iterator[None]:
    """Ignore the generation settings stored with the model, such as a repetition penalty, while the context is open."""
    from transformers import GenerationConfig

    own = decoder.generation_config
    decoder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        decoder.generation_config = own


def _left_padded(prompts: list[list[int]], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask``, both (B, T), on the device."""
    width = max(len(prompt) for prompt in prompts)
    tokens = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(tokens, dtype=torch.long, device=device),
        "attention_mask": torch.tensor(mask, dtype=torch.long, device=device),
    }


def _ended(response: list[int], eos_token_ids: list[int]) -> list[int]:
    """Return the tokens up to and including the first end-of-sequence token."""
    for position, token in enumerate(response):
        if token in eos_token_ids:
            return response[: position + 1]
    return response


def _vllm_responses(
    model: torch.nn.Module, eos_token_ids: list[int], prompts: list[list[int]], settings: GenerationSettings, seed: int
) -> list[list[list[int]]]:
    """Return the responses of :func:`generate_responses`, computed by vLLM in a separate process on this process's GPU.

    The adapter, or the whole model if there is no adapter, is saved to a temporary folder. The engine is started for
    this call, and its memory is free afterwards. **This code has not been run with vLLM itself**: the tests use a
    stand-in.

    Raises:
        ComponentError: if vLLM is not installed, the process has no GPU, or the engine fails.
    """
    if find_spec("vllm") is None:
        raise ComponentError("generation: backend vllm needs the package vllm (pip install vllm); or use backend hf.")
    if not torch.cuda.is_available():
        raise ComponentError("generation: backend vllm needs a CUDA GPU; use backend hf.")
    from peft import PeftModel

    release_memory()
    free, total = torch.cuda.mem_get_info()
    engine: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": _VLLM_MEMORY * free / total,
        "enforce_eager": True,
    }
    with tempfile.TemporaryDirectory(prefix="dataflex_vllm_") as name:
        folder = Path(name)
        adapter = None
        model.save_pretrained(folder / "model")
        if isinstance(model, PeftModel):
            adapter = str(folder / "model")
            config = model.active_peft_config
            rank = max(8, 1 << (config.r - 1).bit_length())  # vLLM accepts powers of two only
            engine |= {"model": config.base_model_name_or_path, "enable_lora": True, "max_lora_rank": rank}
        else:
            engine["model"] = str(folder / "model")
        sampling = {
            "n": settings.samples,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "stop_token_ids": eos_token_ids,
            "detokenize": False,
        }
        seeds = [key_of(seed, "generate", number) % 2**63 for number in range(len(prompts))]
        request = {"engine": engine, "adapter": adapter, "sampling": sampling, "prompts": prompts, "seeds": seeds}
        (folder / "request.json").write_text(json_text(request))
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(folder)],
            env={key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}
            | {"CUDA_VISIBLE_DEVICES": _visible_device()},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ComponentError(f"generation: vLLM ended with {done.returncode}:\n{done.stderr[-2000:]}")
        responses = json.loads((folder / "responses.json").read_text())
    return [[_ended(response, eos_token_ids) for response in own] for own in responses]


_LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables hidden from the engine's process, which would otherwise join the training's process group."""


def _visible_device() -> str:
    """Return this process's GPU by the name that ``CUDA_VISIBLE_DEVICES`` uses."""
    number = torch.cuda.current_device()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number] if visible else str(number)


def _run_vllm(folder: Path) -> None:
    """Read ``request.json`` from a folder, generate with vLLM, and write ``responses.json``."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    request = json.loads((folder / "request.json").read_text())
    outputs = LLM(**request["engine"]).generate(
        [{"prompt_token_ids": prompt} for prompt in request["prompts"]],
        [SamplingParams(**request["sampling"], seed=seed) for seed in request["seeds"]],
        lora_request=LoRARequest("current", 1, request["adapter"]) if request["adapter"] else None,
    )
    responses = [[list(sample.token_ids) for sample in output.outputs] for output in outputs]
    (folder / "responses.json").write_text(json_text(responses))


if __name__ == "__main__":
    _run_vllm(Path(sys.argv[1]))
