"""Per-sample gradients of a batch from one forward pass and one backward pass.

Hooks on the layers that own trainable parameters catch the layer's input and the gradient of the layer's output. The
product of the two is each sample's gradient (see ``layers.py``). Autograd computes the gradients of layer outputs only,
never of parameters. So no ``.grad`` is written. DDP, DeepSpeed and FSDP reduce nothing, because their reductions start
in the nodes of the autograd graph that accumulate parameter gradients. After the last use of a parameter in the batch,
its gradients are passed to ``emit`` and freed.

Layers that the training recomputes are recomputed here, too (see ``checkpointing.py``). Their hooks act in the second
run, the one with gradients.

The model must be the raw module, not its wrapper. The hooks are placed before DeepSpeed's own hooks, because ZeRO-3
fetches parameters in the order of their use that it has recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dataflex.data.sums import row_sums, sum_dtype
from dataflex.data.token_loss import IGNORE_INDEX, sample_means
from dataflex.errors import ComponentError, DivergenceError
from dataflex.probe.checkpointing import Run, recomputed_layers, recomputing
from dataflex.probe.head import (
    HEAD_CHUNK,
    behind_head,
    counted_logits,
    head_of,
    language_model,
    replaced_forward,
    slope_behind_head,
)
from dataflex.probe.layers import (
    Contribution,
    DoraCalls,
    Lookup,
    NormRecipe,
    Outer,
    Rows,
    Whole,
    at_least_float32,
    dora_sum,
    flat_rows,
    is_dora,
    is_experts,
    norm_recipe,
    normalized,
    summed_over_tokens,
)
from dataflex.probe.media import MediaRows, is_patching, media_modules, patches

Emit = Callable[[str, list[Contribution]], None]
"""Receives a parameter's name and its contributions in a batch. The list is empty if the batch does not use it."""

_FLOAT16_SCALE = 2.0**14
"""Factor of the loss if the computation is in float16, so that small gradients do not underflow."""
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
"""Parts that DDP, FSDP, checkpointing and compilation add to names of parameters."""


class RoutedRows(Exception):
    """Raised if the rows of a layer cannot be assigned to samples. The caller then runs the samples one at a time."""


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Return the name of every trainable parameter by ``id``, the same under every wrapper.

    Tied parameters have one name.
    """
    return {id(value): canonical(name) for name, value in model.named_parameters() if value.requires_grad}


def canonical(name: str) -> str:
    """Return a parameter's name without the parts that DDP, FSDP, checkpointing and compilation add."""
    return _WRAPPERS.sub("", name)


@dataclass(frozen=True)
class _Call:
    """One call of a module whose operations are watched from inside.

    Attributes:
        module: the module.
        own: trainable parameters of the module itself, without submodules: attribute -> name.
        seen: names of the parameters whose use was caught in this call.
        args: positional arguments of the forward.
        kwargs: keyword arguments of the forward.
    """

    module: nn.Module
    own: dict[str, str]
    seen: set[str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class GradientPass:
    """Runs batches and gives the per-sample gradients of every trainable parameter to a function.

    Args:
        model: the raw module, in evaluation mode.
        emit: called once per batch for every trainable parameter that is not left out.
        reduction: whether to differentiate each sample's token mean or token sum.
        chunked_head: whether to apply the head in chunks, on the positions that count, inside the model's own forward.
        unsupported: whether a trainable parameter of a kind without a gradient rule raises an error or is left out.
        device: device of the batches. Parameters may be elsewhere (FSDP can offload them to the CPU).
    """

    def __init__(
        self,
        model: nn.Module,
        emit: Emit,
        reduction: Literal["mean", "sum"],
        chunked_head: bool,
        unsupported: Literal["error", "ignore"],
        device: torch.device,
    ) -> None:
        self.model, self.emit = model, emit
        self.reduction, self.chunked_head, self.unsupported = reduction, chunked_head, unsupported
        self.names = parameter_names(model)
        self.left_out: set[str] = set()
        """Names of the trainable parameters without a gradient rule, if they are to be left out."""
        if not self.names:
            raise ComponentError("the model has no trainable parameter, so there are no gradients to compute.")
        half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        self._device = device.type
        half |= torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
        self._scale = _FLOAT16_SCALE if half else 1.0
        self._batch = 0
        """Number of samples in the running batch, B."""
        self._of_sample = 1
        """Rows of model inputs of a sample. In the running batch, row r belongs to sample r mod B."""
        self._head_names: dict[str, str] = {}
        """Trainable parameters of a chunked head itself: attribute -> name."""
        self._inside_head: set[str] = set()
        """Names of the trainable parameters of modules inside a chunked head, such as an adapter's."""
        self._rows: Tensor | None = None
        """Sample of each row while a chunk goes through the head. None means that no chunk does."""
        self._mixed: str | None = None
        """Path of a layer that mixed the rows of samples in this batch; None if no layer did."""
        self._media = media_modules(model)
        """Modules that process images and other media. Their rows are not in the order of the samples."""
        self._media_rows: MediaRows | None = None
        """Share of each sample in the rows of these modules. None means unknown, or that no batch runs."""
        self._complete = False
        """Whether an earlier batch has passed the check that hooks see all uses of trainable parameters."""
        self._dora = DoraCalls()
        self._is_fsdp2 = any(isinstance(module, FSDPModule) for module in model.modules())
        """Whether FSDP2 shards the model."""
        self._roots: list[Tensor] = []
        """Tensors for which autograd is to compute gradients. A hook gets a gradient only on a path to one of them."""
        self._uses: dict[str, int] = {}
        """Number of uses whose gradients have not arrived yet, by the parameter's name."""
        self._layers = recomputed_layers(model)
        self._layer_names: dict[nn.Module, set[str]] = {}
        """Names of the trainable parameters inside each recomputed layer."""
        self._awaited: dict[str, int] = {}
        """Number of calls of recomputed layers that must still run again, by the name of each parameter inside them."""
        self._parts: dict[str, list[Contribution]] = {}
        """Contributions that have arrived, by the parameter's name."""
        self._done: set[str] = set()
        """Names of the parameters that have been passed on in this batch."""
        self._norms: dict[str, NormRecipe] = {}
        """Formula of each normalisation layer, by the name of its first parameter."""
        self._shared: tuple[Tensor, int, Tensor] | None = None
        """The last input that was cast, its version at that time, and the cast copy."""

    def run(self, inputs: dict[str, Any], targets: Tensor) -> Tensor:
        """Run a batch and return the token-mean losses, (B,); NaN for a sample in which no token counts.

        Args:
            inputs: arguments of the model's forward, without labels.
            targets: shifted labels, (B, T).

        Raises:
            RoutedRows: if the batch has several samples and a layer mixes their rows.
            ComponentError: if trainable parameters are of a kind without a rule; the message names them.
        """
        counts = (targets != IGNORE_INDEX).sum(1)
        self._media_rows = MediaRows.of(self.model, inputs) if self._media and targets.shape[0] > 1 else None
        sums = self._differentiated(targets.shape[0], 1, lambda: self._forward(inputs, targets, counts))
        return sample_means(sums, counts)

    def run_losses(self, batch: int, rows: int, losses: Callable[[], Tensor]) -> Tensor:
        """Run a batch whose samples have one loss each; return the losses, (B,), infinity in place of NaN.

        The loss may run the model several times, but only once with gradients. ``reduction`` has no effect, and the
        head must not be chunked.

        Args:
            batch: number of samples, B.
            rows: rows of model inputs of a sample. Row r of the batch belongs to sample r mod B.
            losses: computes the loss of each sample, (B,), with gradients.

        Raises:
            RoutedRows: if the batch has several samples and a layer mixes their rows.
            ComponentError: if trainable parameters are of a kind without a rule; the message names them.
        """

        def forward() -> tuple[Tensor, Tensor]:
            found = losses()
            return (found * self._scale).sum(), found.detach()

        found = self._differentiated(batch, rows, forward)
        return found.masked_fill(found.isnan(), torch.inf)

    def _differentiated(self, batch: int, rows: int, forward: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """Run a batch and give the gradients of its samples to ``emit``.

        Args:
            batch: number of samples, B.
            rows: rows of model inputs of a sample.
            forward: returns the objective to differentiate, and values to return, (B,).
        """
        self._batch, self._of_sample = batch, rows
        try:
            with torch.enable_grad(), self._hooks():
                objective, values = forward()
                if objective.requires_grad:
                    self._check_all_seen([objective])
                    # The returned gradients are not needed: the hooks receive them during the backward pass.
                    torch.autograd.grad(objective, self._roots, allow_unused=True)
                    self._check_all_seen_fsdp2()
                    self._complete = True
            if self._mixed is not None:  # raised only now, because FSDP2 must run a backward pass to its end
                raise RoutedRows(self._mixed)
            for name in self.names.values():  # parameters that the batch does not use have no contributions
                if name not in self._done and name not in self.left_out:
                    self._hand_on(name)
        finally:
            self._clear()
        return values

    def _clear(self) -> None:
        """Free everything that belongs to one batch."""
        self._roots, self._uses, self._parts, self._done, self._awaited = [], {}, {}, set(), {}
        self._rows = self._mixed = self._shared = self._media_rows = None
        self._dora.leave()

    def _forward(self, inputs: dict[str, Any], targets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective to differentiate, and each sample's summed loss, (B,)."""
        rows, columns = torch.nonzero(targets != IGNORE_INDEX, as_tuple=True)
        labels = targets[rows, columns]
        wide = sum_dtype(targets.device)
        per_token = torch.ones_like(counts) if self.reduction == "sum" else 1.0 / counts.clamp(min=1).to(wide)
        weights = (per_token * self._scale)[rows]
        if not self.chunked_head:
            # The model changes its logits in ways that are not known here, so all logits go through the rest of its
            # forward pass at once. A trained head gets all positions, because its hook needs the rows in the order of
            # the samples. A frozen head gets only the positions that count.
            if any(map(self._own, head_of(self.model).modules())):
                logits = self.model(**inputs, use_cache=False).logits[rows, columns]
            else:
                logits = counted_logits(self.model, inputs, rows, columns)
            logits = at_least_float32(logits)
            losses = F.cross_entropy(logits, labels, reduction="none")
            return (losses * weights.to(losses.dtype)).sum(), row_sums(losses.detach(), rows, columns, targets.shape)
        head, slope = head_of(self.model), slope_behind_head(self.model)
        found: list[Tensor] = []

        def run_head(apply: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            """Return, instead of the logits, values whose sum has the loss's gradient with respect to ``hidden``."""
            gradient = torch.zeros_like(hidden)
            gradient[rows, columns], losses = self._head(apply, hidden[rows, columns], labels, rows, weights)
            found.append(losses)
            # The values are 0, only their gradient matters. The model then scales and caps them as if they were logits.
            # The derivative of scale and cap at 0 is ``slope``, so the division cancels it.
            value = (hidden * gradient).sum(-1, keepdim=True)
            return (value - value.detach()) / slope

        # The backward pass starts at the model's output, because ZeRO-3 and FSDP gather parameters for a backward pass
        # only if it comes from there.
        with replaced_forward(head, run_head):
            objective = self.model(**inputs, use_cache=False).logits.sum()
        return objective, row_sums(found[0], rows, columns, targets.shape)

    def _head(
        self,
        apply: Callable[[Tensor], Tensor],
        hidden: Tensor,
        labels: Tensor,
        rows: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss's gradient with respect to ``hidden``, and the loss of every position.

        Each chunk of logits is differentiated and freed before the next chunk is computed.
        """
        trained = self._head_names
        starts = range(0, hidden.shape[0], HEAD_CHUNK)
        for name in trained.values():
            self._expect(name, len(starts))
        gradient, losses, finish = torch.zeros_like(hidden), [], behind_head(self.model)
        for begin in starts:
            part = slice(begin, begin + HEAD_CHUNK)
            chunk = hidden[part].detach().requires_grad_()
            self._rows = rows[part]
            logits = apply(chunk)
            loss = F.cross_entropy(at_least_float32(finish(logits)), labels[part], reduction="none")
            losses.append(loss.detach())
            self._check_all_seen([loss])
            wanted = [chunk, logits] if trained else [chunk]  # a trained head needs its output gradient, too
            gradients = torch.autograd.grad((loss * weights[part].to(loss.dtype)).sum(), wanted)
            gradient[part] = gradients[0]
            for key, name in trained.items():
                scaled = self._unscaled(gradients[1])
                made = (
                    self._outer(self._as_used(chunk, logits), scaled, rows[part])
                    if key == "weight"
                    else self._whole(scaled, rows[part])
                )
                self._arrived(name, made)
        self._rows = None
        # `_arrived` passes no parameter on while chunks run, because it cannot know which chunk is the last.
        for name in self._uses.keys() & {*trained.values(), *self._inside_head}:
            if not self._uses[name]:
                self._hand_on(name)
        return gradient, torch.cat(losses) if losses else hidden.new_zeros(0)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Keep the hooks and replaced forwards in place while the context is open."""
        head = head_of(self.model) if self.chunked_head else None
        self._head_names = self._own(head) if head is not None else {}
        below = [] if head is None else [module for module in head.modules() if module is not head]
        self._inside_head = {name for module in below for name in self._own(module).values()}
        for layer in self._layers:
            self._layer_names[layer] = {name for module in layer.modules() for name in self._own(module).values()}
        embedding = language_model(self.model).get_input_embeddings()
        handles, restore = [], []
        try:
            # All hooks are prepended, so that they run before DeepSpeed's hooks (see the docstring of this file).
            handles.append(embedding.register_forward_hook(self._start_graph, prepend=True))
            for name, module in self.model.named_modules():
                own = self._own(module)
                if not own or module is head:  # `_head` computes the gradients of a chunked head
                    continue
                # A subclass with its own forward may do more than its base class. Then the functions that its forward
                # calls are watched instead.
                if type(module).forward in (nn.Linear.forward, nn.Embedding.forward) or is_dora(module):
                    hook = partial(self._after_layer, own=own, path=name)
                    handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
                    if is_dora(module):
                        handles.append(module.register_forward_pre_hook(self._dora.enter))
                else:
                    restore.append(self._watch(module, own))
            with recomputing(self.model, self._layers, self._begin_layer, self._differentiate_layer):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for undo in reversed(restore):  # in reverse, because several modules may have changed one configuration
                undo()

    def _own(self, module: nn.Module) -> dict[str, str]:
        """Return the trainable parameters that a module itself owns, without submodules: attribute -> name.

        Under FSDP2 do not call this during a forward pass, because gathered parameters have other ids.
        """
        return {key: self.names[id(value)] for key, value in module._parameters.items() if id(value) in self.names}

    def _begin_layer(self, layer: nn.Module) -> None:
        """Hold the gradients of a layer's parameters back until the layer has run again."""
        for name in self._layer_names[layer]:
            self._awaited[name] = self._awaited.get(name, 0) + 1

    def _differentiate_layer(
        self, layer: nn.Module, run: Run, inputs: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor | None]:
        """Run a layer again with active hooks, and return the gradients of its inputs."""
        outer, self._roots = self._roots, []  # collects the roots of this layer's graph, which is separate
        pairs = [(out, grad) for out, grad in zip(run(), gradients, strict=True) if out.requires_grad]
        self._check_all_seen([out for out, _ in pairs])
        for name in self._layer_names[layer]:
            self._awaited[name] -= 1
        roots, self._roots = [*inputs, *self._roots], outer
        if not pairs:
            return [None] * len(inputs)
        outputs, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, roots, given, allow_unused=True)
        return list(found[: len(inputs)])

    def _start_graph(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Make the token embedding's output require a gradient, so that everything after it is differentiable.

        A pass without gradients, such as that of a reference model, stays without gradients.
        """
        if not torch.is_grad_enabled():
            return
        if not output.requires_grad:
            output.requires_grad_()
        self._roots.append(output)

    def _after_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, own: Any, path: str
    ) -> Tensor | None:
        """Catch a layer's input now and the gradient of its output later."""
        if is_dora(module):
            self._dora.leave()
        if not output.requires_grad:
            return None
        if self._dora.is_norm(args[0].detach(), args[0].requires_grad):
            return output.detach()  # the norm is a constant to autograd, so no gradient of this use would arrive
        # Autograd visits only the paths to its roots. If the input needs no gradient, no path leads from here to an
        # earlier root. The output then becomes a root itself.
        if not args[0].requires_grad:
            self._roots.append(output)
        for name in own.values():
            self._expect(name, 1)
        inputs = self._as_used(args[0], output)
        if is_dora(module):
            base = kwargs["base_result"]
            bias = kwargs["base_layer"].bias
            base = base.detach() if bias is None else base.detach() - bias.detach()
            inputs = dora_sum(output.detach(), base, module._parameters["weight"].detach())
        samples = self._samples_of(module, output, path, is_lookup=isinstance(module, nn.Embedding))

        def arrived(gradient: Tensor) -> None:
            if self._in_order(gradient, samples, path):
                for key, name in own.items():
                    self._arrived(name, self._rule(module, key, inputs, self._unscaled(gradient), samples))

        output.register_hook(arrived)
        return None

    def _as_used(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the input of a product in the product's own type, in which autocast has computed it.

        Under autocast this type has a lower precision than the input. The stored tensor then takes half the memory, and
        a device multiplies two factors of one low-precision type much faster. Consecutive layers with the same input
        share one stored copy.
        """
        if not inputs.is_floating_point() or inputs.dtype == output.dtype:
            return inputs.detach()
        if self._shared is not None:
            source, version, kept = self._shared
            if source is inputs and version == inputs._version and kept.dtype == output.dtype:
                return kept
        kept = inputs.detach().to(output.dtype)
        self._shared = inputs, inputs._version, kept
        return kept

    def _rule(
        self, module: nn.Module, key: str, inputs: Tensor, gradient: Tensor, samples: Tensor | None
    ) -> Contribution:
        """Return the contribution of one use of a module's parameter.

        Args:
            module: a linear layer, an embedding or PEFT's DoRA layer.
            key: attribute of the parameter in the module.
            inputs: input of the layer; for DoRA the factor that :func:`dora_sum` returns.
            gradient: gradient of the layer's output.
            samples: sample of each row. None means that the rows are in the order of the samples.
        """
        if isinstance(module, nn.Embedding):
            return Lookup(self._ids(inputs), self._flat(gradient), module.num_embeddings, module.padding_idx)
        if is_dora(module):
            return self._whole(gradient * inputs, samples)
        return self._outer(inputs, gradient, samples) if key == "weight" else self._whole(gradient, samples)

    def _outer(
        self, inputs: Tensor, gradient: Tensor, samples: Tensor | None, first: int = 0, rows: int | None = None
    ) -> Outer:
        """Return the contribution of a matrix product. Arguments as in :meth:`_rule` and :class:`Outer`."""
        if samples is None:
            return Outer(self._flat(inputs), self._flat(gradient), first, rows)
        inputs, gradient = inputs.flatten(0, -2), gradient.flatten(0, -2)
        return Outer(inputs, gradient, first, rows, Rows.of(samples, self._batch))

    def _whole(self, values: Tensor, samples: Tensor | None) -> Whole:
        """Return the contribution of a vector parameter: ``values`` summed over the tokens of each sample."""
        if samples is None:
            return Whole(summed_over_tokens(values, self._batch, self._of_sample))
        return Whole(Rows.of(samples, self._batch).apart(at_least_float32(values).flatten(0, -2)).sum(1))

    def _flat(self, values: Tensor) -> Tensor:
        """Return values of the rows of model inputs, sample by sample, (B, T, n)."""
        return flat_rows(values, self._batch, self._of_sample)

    def _ids(self, ids: Tensor) -> Tensor:
        """Return token ids of the rows of model inputs, sample by sample, (B, T)."""
        return self._flat(ids.unsqueeze(-1)).squeeze(-1)

    def _watch(self, module: nn.Module, own: dict[str, str]) -> Callable[[], None]:
        """Catch the matrix products and normalisations inside a module of an unknown kind.

        Returns:
            A function that restores the module.
        """
        original = module.forward
        had = "forward" in module.__dict__
        config = module.__dict__.get("config") if is_experts(module) else None
        implementation = getattr(config, "_experts_implementation", None)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():  # the first run of a recomputed layer, or a part without gradients
                return original(*args, **kwargs)
            seen: set[str] = set()
            call = _Call(module, own, seen, args, kwargs)
            with (
                watched("linear", partial(self._after_product, call)),
                watched("embedding", partial(self._after_lookup, module, own, seen)),
                watched("conv2d", partial(self._after_convolution, call)),
                watched("conv3d", partial(self._after_convolution, call)),
            ):
                output = original(*args, **kwargs)
            self._after_norm(module, own, seen, args, output)
            return output

        module.forward = forward
        if config is not None:
            config._experts_implementation = "eager"  # one F.linear per expert; other implementations use no F.linear

        def undo() -> None:
            if had:
                module.forward = original
            else:
                del module.forward
            if config is not None:
                config._experts_implementation = implementation

        return undo

    def _after_product(
        self,
        call: _Call,
        output: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        """Catch a product with a parameter of the module, or with one expert's matrix in a stack of experts."""
        seen = call.seen
        for key, name in call.own.items():
            parameter = call.module._parameters[key]
            assert parameter is not None
            if bias is parameter:
                seen.add(name)
                self._expect(name, 1)
                samples = self._samples_of(call.module, output, name)
                output.register_hook(partial(self._bias_arrived, name, samples))
                if not inputs.requires_grad:
                    self._roots.append(output)
                continue
            first = _first_row(parameter, weight)
            if first is None:
                continue
            seen.add(name)
            self._expect(name, 1)
            samples = self._samples_of(call.module, output, name)
            if is_experts(call.module):
                samples = self._routed(call.args, call.kwargs, first // max(1, weight.shape[0]))
                seen.update(call.own.values())  # a stack of experts counts as seen, whichever experts have rows
            if not inputs.requires_grad:
                self._roots.append(output)
            kept, rows = self._as_used(inputs, output), parameter.numel() // parameter.shape[-1]
            output.register_hook(partial(self._product_arrived, name, kept, first, rows, samples))

    def _after_lookup(
        self,
        module: nn.Module,
        own: dict[str, str],
        seen: set[str],
        output: Tensor,
        ids: Tensor,
        weight: Tensor,
        *options: Any,
        **named: Any,
    ) -> None:
        """Catch an embedding lookup inside a module."""
        for key, name in own.items():
            if module._parameters[key] is not weight:
                continue
            seen.add(name)
            self._expect(name, 1)
            self._roots.append(output)
            self._samples_of(module, output, name, is_lookup=True)
            padding_idx = options[0] if options else named.get("padding_idx")

            def arrived(gradient: Tensor, name: str = name, padding_idx: int | None = padding_idx) -> None:
                if self._in_order(gradient, None, name):
                    flat = self._flat(self._unscaled(gradient))
                    self._arrived(name, Lookup(self._ids(ids), flat, weight.shape[0], padding_idx))

            output.register_hook(arrived)

    def _after_convolution(
        self,
        call: _Call,
        output: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *options: Any,
    ) -> None:
        """Catch a convolution that cuts an image into patches: a matrix product over the patches."""
        if not is_patching(weight, *options):
            return
        rows = output.flatten(2).transpose(1, 2)  # of the same shape as the rows' gradient
        for key, name in call.own.items():
            parameter = call.module._parameters[key]
            if parameter is not weight and parameter is not bias:
                continue
            call.seen.add(name)
            self._expect(name, 1)
            if not inputs.requires_grad:
                self._roots.append(output)
            samples = self._samples_of(call.module, rows, name)
            arrived = (
                partial(self._bias_arrived, name, samples)
                if parameter is bias
                else partial(self._product_arrived, name, patches(inputs.detach(), weight.shape[2:]), 0, None, samples)
            )

            def as_rows(gradient: Tensor, arrived: Callable[[Tensor], None] = arrived) -> None:
                arrived(gradient.flatten(2).transpose(1, 2))

            output.register_hook(as_rows)

    def _samples_of(self, module: nn.Module, output: Tensor, path: str, *, is_lookup: bool = False) -> Tensor | None:
        """Return the sample of each row of a module's output; None if the rows are in the order of the samples.

        If the samples of the rows of images are not known, note the path, so that :meth:`run` raises
        :class:`RoutedRows`. They are not known of a lookup, because one row may serve all images.
        """
        if self._batch == 1 or module not in self._media:
            return self._rows
        rows = output.shape[:-1].numel()
        found = None if is_lookup or self._media_rows is None else self._media_rows.samples(rows)
        if found is None:
            self._mixed = path
        return found

    def _routed(self, args: tuple[Any, ...], kwargs: dict[str, Any], expert: int) -> Tensor:
        """Return the sample of every row that expert ``expert`` processes, in the row order of Transformers' code."""
        # Transformers passes the experts of each token as `top_k_index`, (tokens, k), by name or as second argument.
        index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        _, tokens = torch.where((index == expert).T)
        return tokens // (index.shape[0] // (self._of_sample * self._batch)) % self._batch

    def _product_arrived(
        self, name: str, inputs: Tensor, first: int, rows: int | None, samples: Tensor | None, gradient: Tensor
    ) -> None:
        if self._in_order(gradient, samples, name):
            self._arrived(name, self._outer(inputs, self._unscaled(gradient), samples, first, rows))

    def _bias_arrived(self, name: str, samples: Tensor | None, gradient: Tensor) -> None:
        if self._in_order(gradient, samples, name):
            self._arrived(name, self._whole(self._unscaled(gradient), samples))

    def _after_norm(
        self, module: nn.Module, own: dict[str, str], seen: set[str], args: tuple[Any, ...], output: Any
    ) -> None:
        """Catch a normalisation layer. Parameters that no rule covers then raise an error or are left out."""
        rest = {key: name for key, name in own.items() if name not in seen}
        if not rest:
            return
        path = next(iter(rest.values()))
        if path not in self._norms:
            found = None
            if isinstance(output, Tensor) and args and set(rest) <= {"weight", "bias"}:
                found = norm_recipe(module, args[0].detach(), output.detach())
            # NaN and infinity agree with no recipe, but the cause is the training, not the kind of the layer.
            if found is None and isinstance(output, Tensor) and not torch.isfinite(output).all():
                raise DivergenceError(f"the output of the layer of {path} is not finite")
            if found is None:
                self._refuse(f"a parameter of {type(module).__name__}", rest.values())
                return
            self._norms[path] = found
        kept, recipe = args[0].detach(), self._norms[path]
        if not args[0].requires_grad:
            self._roots.append(output)
        for name in rest.values():
            self._expect(name, 1)
        samples = self._samples_of(module, output, path)

        def arrived(gradient: Tensor) -> None:
            if self._in_order(gradient, samples, path):
                gradient = self._unscaled(gradient)
                for key, name in rest.items():
                    of_weight = gradient * normalized(kept, recipe) if key == "weight" else gradient
                    self._arrived(name, self._whole(of_weight, samples))

        output.register_hook(arrived)

    def _refuse(self, what: str, rest: Collection[str]) -> None:
        """Raise an error for parameters without a gradient rule, or leave them out, depending on ``unsupported``."""
        if self.unsupported == "error":
            raise ComponentError(
                f"there is no per-sample gradient rule for {', '.join(sorted(rest))} ({what}). Supported "
                "are linear layers, embeddings, normalisation layers, LoRA and DoRA, routers and stacked experts. Set "
                "unsupported_parameters: ignore to leave such parameters out of the features, or freeze them."
            )
        self.left_out.update(rest)

    def _check_all_seen(self, outputs: list[Tensor]) -> None:
        """Refuse trainable parameters whose use no hook has seen: their gradients would silently count as zero.

        Only batches up to the first one that passes are checked.
        """
        if self._complete or self._is_fsdp2:
            return
        used = set().union(*map(used_leaves, outputs))
        for module in self.model.modules():
            own = self._own(module).items()
            missed = {
                name
                for key, name in own
                if id(module._parameters[key]) in used and name not in self._uses and name not in self.left_out
            }
            if missed:
                self._refuse(f"a parameter of {type(module).__name__}", missed)

    def _check_all_seen_fsdp2(self) -> None:
        """Do the check of :meth:`_check_all_seen` under FSDP2, where the leaves of the graph are not the parameters.

        The graph then does not show which parameters the batch uses. So an unused parameter is refused, too.
        """
        if self._complete or not self._is_fsdp2:
            return
        missed = set(self.names.values()) - self._uses.keys() - self.left_out
        if missed:
            self._refuse("no hook saw them in the forward pass of these samples", missed)

    def _in_order(self, gradient: Tensor, samples: Tensor | None, path: str) -> bool:
        """Return whether the sample of each row of a gradient is known: by the order of the rows, or by ``samples``.

        Otherwise note the path of the layer, so that :meth:`run` raises :class:`RoutedRows`.
        """
        rows = self._of_sample * self._batch
        if samples is not None or self._batch == 1 or (gradient.dim() > 2 and gradient.shape[0] == rows):
            return True
        # Rows (B * T, d) may be tokens in order. Rows of experts may have that number, too, but are in routing order.
        flattened = gradient.dim() == 2 and gradient.shape[0] % rows == 0
        if flattened and ".experts." not in path:
            return True
        self._mixed = path
        return False

    def _unscaled(self, gradient: Tensor) -> Tensor:
        """Return a gradient divided by the factor of the loss."""
        return gradient if self._scale == 1.0 else gradient.float() / self._scale

    def _expect(self, name: str, uses: int) -> None:
        """Count uses of a parameter, whose gradients will arrive in the backward pass."""
        self._uses[name] = self._uses.get(name, 0) + uses

    def _arrived(self, name: str, part: Contribution) -> None:
        """Store the contribution of one use, and pass the parameter on after its last use."""
        self._parts.setdefault(name, []).append(part)
        self._uses[name] -= 1
        # A parameter of a chunked head is complete only after the last chunk; `_head` passes it on.
        if not self._uses[name] and not self._awaited.get(name) and self._rows is None:
            self._hand_on(name)

    def _hand_on(self, name: str) -> None:
        """Give all contributions of a parameter to ``emit``. Autocast is off, because it would round the sums."""
        self._done.add(name)
        with torch.autocast(self._device, enabled=False):
            self.emit(name, self._parts.pop(name, []))


@contextmanager
def watched(name: str, after: Callable[..., None]) -> Iterator[None]:
    """Call ``after(output, *args, **kwargs)`` after each ``torch.nn.functional.<name>`` while the context is open."""
    original = getattr(F, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        after(output, *args, **kwargs)
        return output

    setattr(F, name, function)
    try:
        yield
    finally:
        setattr(F, name, original)


def used_leaves(output: Tensor) -> set[int]:
    """Return the ``id`` of every leaf in the autograd graph of ``output``."""
    leaves, seen, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        todo += [before for before, _ in node.next_functions]
    return leaves


def _first_row(parameter: Tensor, weight: Tensor) -> int | None:
    """Return the index of the first row of ``parameter`` that ``weight`` covers; None if ``weight`` is no part of it.

    A stack of expert matrices counts as one matrix of all their rows. A single expert is a view into the stack's
    memory.
    """
    if weight is parameter:
        return 0
    if parameter.dim() != 3 or weight.shape != parameter.shape[1:] or weight.dtype != parameter.dtype:
        return None
    offset = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
    if offset < 0 or offset >= parameter.numel() or offset % weight.numel():
        return None
    return offset // parameter.shape[-1]
