"""The losses of a frozen reference model at every token, computed with each batch or for many samples at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex import distributed
from dataflex.api.reference import vocabulary_problem
from dataflex.data.samples import Samples
from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ConfigError
from dataflex.probe.batches import inputs_of, length_batches
from dataflex.probe.collation import Collation
from dataflex.probe.head import chunked_values, full_values
from dataflex.probe.memory import BatchLimit
from dataflex.probe.mode import preserved_rng
from dataflex.probe.particulars import head_agrees

_SINGLE = "Shorten cutoff_len, or name a smaller reference_model."
_OF_A_MODEL = ("config.json", "adapter_config.json", "model", "pytorch_model", "adapter_model")
"""Beginnings of the names of the files that define a model."""


class Reference(Protocol):
    """Source of the reference's losses of a batch."""

    def losses(self, inputs: dict[str, Any], labels: Tensor, indices: IndexArray | None) -> Tensor:
        """Return the loss at each position that counts, (n,), float32: row after row, left to right.

        Args:
            inputs: arguments of the model's forward, without labels.
            labels: shifted labels, (B, T).
            indices: indices of the samples in the pool, (B,); None in a stream.
        """
        ...


@dataclass
class ReferenceModel:
    """A frozen model that runs on every batch; the head is applied in chunks if that gives the same losses."""

    model: torch.nn.Module
    autocast: Callable[[], AbstractContextManager[Any]]
    limit: BatchLimit = field(default_factory=lambda: BatchLimit("compute a reference's losses", _SINGLE))
    """Limit of batches of samples outside of training steps."""
    _chunked: bool | None = None

    @torch.no_grad()
    def losses(self, inputs: dict[str, Any], labels: Tensor, indices: IndexArray | None = None) -> Tensor:
        """Return the loss at each position that counts, (n,), float32."""
        with self.autocast():
            if self._chunked is None:
                self._chunked = head_agrees(self.model, inputs, labels, labels.device)
            values = full_values if self._chunked is False else chunked_values
            return values(self.model, inputs, labels)[2]


def load_reference(
    name: str,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None,
    options: dict[str, Any],
    setting: str,
) -> torch.nn.Module:
    """Return a frozen model for token losses, whole on this process, also under DeepSpeed and FSDP.

    Args:
        name: folder of a model or of an adapter, or a hub name.
        tokenizer: tokenizer of the run.
        device: device of the model.
        dtype: number type of the weights.
        attention: name of Transformers' attention implementation. None means the model's default.
        options: options of LLaMA-Factory: cache_dir, trust_remote_code and the like.
        setting: the setting that names the reference, for messages.

    Raises:
        ConfigError: if the model cannot be loaded, or uses other token ids.
    """
    from transformers import AutoTokenizer

    try:
        with whole_models(), preserved_rng():
            theirs = AutoTokenizer.from_pretrained(name, **options)
            problem = vocabulary_problem(tokenizer.get_vocab(), theirs.get_vocab(), name)
            if problem is not None:
                raise ConfigError(f"{setting}: {problem}")
            model = _model_of(name, options, {"dtype": dtype, "attn_implementation": attention})
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{setting}: {name!r} cannot be loaded: {error}") from error
    return model.to(device).eval().requires_grad_(False)


def _model_of(name: str, options: dict[str, Any], of_model: dict[str, Any]) -> Any:
    """Return the model of a folder or hub name, of the class that LLaMA-Factory loads: with images if it reads some.

    Args:
        name: folder of a model or of an adapter, or a hub name.
        options: options for every file.
        of_model: further options for the model.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    is_adapter = (Path(name) / "adapter_config.json").is_file()
    base = PeftConfig.from_pretrained(name).base_model_name_or_path if is_adapter else name
    reads_images = type(AutoConfig.from_pretrained(base, **options)) in AutoModelForImageTextToText._model_mapping
    kind: Any = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    model = kind.from_pretrained(base, **of_model, **options)
    return PeftModel.from_pretrained(model, name) if is_adapter else model


def weights_dtype(args: Any, finetuning_args: Any) -> torch.dtype:
    """Return the number type of a reference's weights: the precision of the training.

    Args:
        args: arguments of the Trainer.
        finetuning_args: LLaMA-Factory's finetuning arguments.
    """
    bf16 = args.bf16 or finetuning_args.pure_bf16
    return torch.bfloat16 if bf16 else torch.float16 if args.fp16 else torch.float32


def loading_options(llamafactory: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of Transformers with which a reference is loaded, from LLaMA-Factory's keys."""
    names = {"cache_dir": "cache_dir", "trust_remote_code": "trust_remote_code", "hf_hub_token": "token"}
    return {theirs: llamafactory[ours] for ours, theirs in names.items() if llamafactory.get(ours) is not None}


@contextmanager
def whole_models() -> Iterator[None]:
    """Load models whole on every process while the context is open, even if the run shards its own model.

    DeepSpeed's and FSDP's settings are hidden from Transformers and restored at the end.
    """
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
        if fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp


Advance = Callable[[int], None]
"""Called with the number of tokens of samples whose losses are known."""


def losses_of(
    pool: Samples,
    indices: IndexArray,
    reference: ReferenceModel,
    collation: Collation,
    device: torch.device,
    batch_tokens: int,
    advance: Advance | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the number of losses of each sample, (n,), and the losses, sample after sample; the same on every process.

    Args:
        pool: the samples.
        indices: indices of the wanted samples, (n,).
        reference: the reference; each process runs it on its share of the batches.
        collation: the training collator's batches.
        device: device of the reference.
        batch_tokens: most tokens of one forward pass, padding counted.
        advance: called after each batch of this process.
    """
    lengths = pool.lengths[indices]
    batches = length_batches(lengths, batch_tokens)
    mine, useful = batches.share(distributed.rank(), distributed.world_size())
    found: list[tuple[IndexArray, tuple[Tensor, Tensor]]] = []

    def losses_of_batch(batch: IndexArray) -> tuple[Tensor, Tensor]:
        inputs, labels = inputs_of(collation.of(pool, indices[batch]), device)
        return (labels != IGNORE_INDEX).sum(1), reference.losses(inputs, labels)

    with distributed.together():
        for batch in mine[:useful]:
            found += reference.limit.parts(losses_of_batch, batch, lengths)
            if advance is not None:
                advance(int(lengths[batch].sum()))
    # The values of all batches come from the device in two copies, because a copy waits for the device's work.
    rows = np.concatenate([batch for batch, _ in found] or [np.empty(0, np.int64)])
    counts, losses = (_joined([values[part] for _, values in found], device) for part in (0, 1))
    known = np.zeros(indices.size, dtype=np.int64)
    known[rows] = counts.cpu().numpy()
    # Each process has filled in its own samples and left zeros elsewhere, so sums join the values of all processes.
    known = _summed(known, device)
    own, begins = known[rows], np.cumsum(known) - known
    values = np.zeros(int(known.sum()), dtype=np.float32)
    values[np.arange(own.sum()) + np.repeat(begins[rows] - (np.cumsum(own) - own), own)] = losses.cpu().numpy()
    return known, _summed(values, device)


def _joined(parts: list[Tensor], device: torch.device) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, device=device)


def _summed(values: NDArray[Any], device: torch.device) -> NDArray[Any]:
    """Return the sum of an array over the processes."""
    if distributed.world_size() == 1:
        return values
    return distributed.all_reduce_sum(torch.from_numpy(values).to(device)).cpu().numpy()


def model_files(name: str) -> list[Path]:
    """Return the files of a model folder that define the model, by name; none for a hub model."""
    folder = Path(name)
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.startswith(_OF_A_MODEL)]


def model_files_digest(name: str) -> str:
    """Return a digest of a model folder's configuration and weights; for a hub model, its name."""
    if not Path(name).is_dir():
        return f"hub:{name}"
    digest = hashlib.sha256()
    for path in model_files(name):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
