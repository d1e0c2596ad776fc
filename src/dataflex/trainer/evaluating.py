"""Part of the trainer that evaluates: the metrics of every evaluation set, from the Trainer's own forward passes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dataflex import distributed
from dataflex.probe.stage_loss import StageLosses
from dataflex.trainer.base import RunTrainer, warn
from dataflex.trainer.evaluation import (
    DomainEvaluation,
    Numbers,
    SampleEvaluation,
    TokenEvaluation,
    as_logs,
    check_evaluation,
    means,
)
from dataflex.trainer.rounds import INDEX_KEY, IndexedCollator, IndexedDataset


class EvaluatingTrainer(RunTrainer):
    """Adds the metrics of each evaluation set to the Trainer's metrics and to the run record."""

    _evaluated: dict[str, Numbers]
    """Metrics of the running evaluation, by evaluation set."""
    _has_logits: bool
    """Whether every evaluation batch on this process returned logits for each sample and token."""
    _evaluated_indices: torch.Tensor | None = None
    """Index of each sample of the running evaluation batch, in a stage in which a sample has one loss."""

    def _make_evaluation(self) -> DomainEvaluation | None:
        """Return the measurement of the evaluation sets; None without sets, or if evaluation generates responses."""
        sets = self.dataflex.data.evaluation
        if sets is None or getattr(self.args, "predict_with_generate", False):
            return None
        if self.stage_loss is not None:
            return SampleEvaluation(sets, self.args.device)
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return TokenEvaluation(sets, decode, self.args.device)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch as the stage's trainer does.

        In a stage in which a sample has one loss, the trainer's code calls :meth:`mean_of_samples` with the losses.
        """
        if self.stage_loss is None:  # `compute_loss` takes the indices
            return super().prediction_step(model, inputs, *args, **kwargs)
        self._evaluated_indices = inputs.pop(INDEX_KEY, None)
        try:
            return super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self._evaluated_indices = None

    def mean_of_samples(self, model: torch.nn.Module, mean: torch.Tensor, found: StageLosses) -> torch.Tensor:
        """Return the loss of a micro-batch, with loss coefficients in training. In evaluation, store the losses.

        Forward passes in evaluation mode that are not part of an evaluation, such as those before a step, are not
        stored.
        """
        if self._evaluated_indices is not None:
            assert isinstance(self.domain_evaluation, SampleEvaluation)
            self.domain_evaluation.add(self._evaluated_indices.cpu().numpy(), found)
        return super().mean_of_samples(model, mean, found)

    def _evaluation_loss(
        self, model: Any, inputs: dict[str, Any], indices: torch.Tensor, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the Trainer's own loss of an evaluation batch, and store the losses of its samples."""
        assert isinstance(self.domain_evaluation, TokenEvaluation)
        given = {key: inputs[key] for key in ("input_ids", "labels")}  # the Trainer may remove the labels from `inputs`
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        logits = outputs.get("logits") if isinstance(outputs, dict) else next(iter(outputs[1:]), None)
        shape = (len(indices), given["labels"].shape[1])
        if isinstance(logits, torch.Tensor) and logits.shape[:2] == shape:
            self.domain_evaluation.add(indices.cpu().numpy(), logits, given["input_ids"], given["labels"])
        else:
            self._has_logits = False
        return (loss, outputs) if return_outputs else loss

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Return the Trainer's loader. The batches of an evaluation set also hold the index of each sample.

        Training batches hold the indices, too, if LLaMA-Factory draws the samples and the run has a weighter, which may
        read them.
        """
        first = self._first_index(dataset) if description == "Evaluation" else None
        if (
            description == "Training"
            and self.dataflex.data.whole is not None
            and self.dataflex.inputs.components.weight
        ):
            first = 0
        if first is None:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        # The Trainer reads its collator from this attribute and has no argument for it.
        collate = self.data_collator
        self.data_collator = IndexedCollator(collate, first)
        try:
            return super()._get_dataloader(IndexedDataset(dataset), description, *args, **kwargs)
        finally:
            self.data_collator = collate

    def _first_index(self, dataset: Any) -> int | None:
        """Return the index of an evaluation set's first sample among all evaluation samples.

        None for another data set.
        """
        if self.domain_evaluation is None:
            return None
        sets = self.domain_evaluation.sets
        if isinstance(self.eval_dataset, dict):
            found = [name for name, part in self.eval_dataset.items() if part is dataset]
            return int(sets.offsets[sets.domains.index(found[0])]) if found else None
        return 0 if dataset is self.eval_dataset else None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the Trainer's sampler for the rows themselves, because it may read fields of them, such as lengths."""
        rows = train_dataset.dataset if isinstance(train_dataset, IndexedDataset) else train_dataset
        return super()._get_train_sampler(rows)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Return the Trainer's sampler for the rows themselves, because it may read fields of them, such as lengths."""
        rows = eval_dataset.dataset if isinstance(eval_dataset, IndexedDataset) else eval_dataset
        return super()._get_eval_sampler(rows)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's evaluation loop, and add the metrics of each evaluation set to its metrics."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.domain_evaluation is None:
            return output
        if not distributed.everywhere(self._has_logits):
            warn(
                f"{type(self.causal_model()).__name__} gives no logits for each sample and token in evaluation, so "
                "the loss of each evaluation set cannot be computed. The Trainer's eval_loss is reported alone."
            )
            self.domain_evaluation = None
            self._evaluated = {}
            return output
        found = self.domain_evaluation.finish()
        if found is None:
            return output
        self._evaluated |= found
        prefix = str(kwargs.get("metric_key_prefix", "eval"))
        if isinstance(self.eval_dataset, dict):  # a pass over one of the sets, whose name ends the prefix
            prefix = prefix.removesuffix("_" + next(iter(found)))
            output.metrics.update(as_logs(found, prefix))
        else:
            output.metrics.update(as_logs({**found, **means(found)}, prefix))
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the Trainer does, and write the metrics of each evaluation set to the run record."""
        clock = self.dataflex.clock
        if clock.is_evaluating:  # with several data sets, the Trainer's `evaluate` calls this method for each of them
            return super().evaluate(*args, **kwargs)
        self._evaluated = {}
        with clock.evaluating():
            metrics = super().evaluate(*args, **kwargs)
        if not self._evaluated:
            return metrics
        check_evaluation(self._evaluated, self.state.global_step)
        found = means(self._evaluated)
        if isinstance(self.eval_dataset, dict):
            further = as_logs(found, str(kwargs.get("metric_key_prefix", "eval")))
            self.log(dict(further))
            metrics.update(further)
        if self._started is not None:
            record = partial(self._started.recorder.evaluation, self.state.global_step, self._evaluated, found)
            distributed.on_main(record)
        return metrics
