"""What a data decision is written against: the four families of components and what they are given.

A component is a small class with a parameter model, one method that decides and, where it has state,
``state_dict`` and ``load_state_dict``. The framework keeps the promises around it: decisions between optimizer
steps, the same on any number of processes, exact resume, and a record of every one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dataflex.component_source import label_of
from dataflex.data.sampling import IndexArray, PassSampler
from dataflex.domain_names import by_domain, with_text_keys
from dataflex.errors import ComponentError, ConfigError, unknown
from dataflex.files import distinct
from dataflex.schedule import RunOutline
from dataflex.selection import ScoreArray, ranks_among, ranks_of_best, sample_softmax, top_k

if TYPE_CHECKING:
    from torch import Tensor

    from dataflex.capped import CappedScoring
    from dataflex.config import RunConfig
    from dataflex.data.pool import Pool
    from dataflex.probe.store import FeatureStore

State = dict[str, Any]
"""A component's state: numbers, text and numpy arrays, nested in dicts, lists and tuples."""


@dataclass(frozen=True)
class PathMark:
    """Marks text of a parameter as the path of a file or folder; the run record then holds it absolute."""

    is_written: bool
    """Whether the run may write it; else text that names nothing on this machine, as a hub's model, stays as it is."""


InputPath = Annotated[str, PathMark(is_written=False)]
"""Field type of a file or folder that is read, from the working directory; also of a name on a hub."""

OutputPath = Annotated[str, PathMark(is_written=True)]
"""Field type of a folder that may be written, from the working directory."""


def path_fields(params: type[BaseModel]) -> dict[str, PathMark]:
    """Return which fields of a parameter model hold paths, also in lists or beside other types."""
    found = {}
    for name, info in params.model_fields.items():
        marks = [mark for mark in info.metadata if isinstance(mark, PathMark)] or list(_path_marks(info.annotation))
        if marks:
            found[name] = marks[0]
    return found


def _path_marks(annotation: Any) -> Iterator[PathMark]:
    for part in get_args(annotation):
        if isinstance(part, PathMark):
            yield part
        else:
            yield from _path_marks(part)


class ComponentParams(BaseModel):
    """Base of every component's parameters: typed, with defaults, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def differing(self, made_with: dict[str, Any], names: set[str]) -> list[str]:
        """Return which of ``names`` are not in ``made_with``, or have another value there than here."""
        now = self.model_dump(include=names)
        return [name for name in sorted(now) if name not in made_with or made_with[name] != now[name]]


@dataclass(frozen=True)
class GradientSettings:
    """What is made of the gradient of a sample's loss.

    Attributes:
        preconditioner: ``none`` (SGD), ``adam`` (the running optimizer's own direction, bias-corrected) or
            ``adam_less`` (LESS's code: epsilon 1e-8 inside the root, no correction).
        sketch: the random linear map to ``dim`` numbers; ``identity`` keeps all of them.
        dim: length of a feature, k.
        seed: of the map; features are comparable only under one seed.
        reduction: gradient of the token-mean or of the token-summed loss.
        normalize: scale every feature to length 1.
        unsupported: what to do with trainable parameters whose kind has no per-sample rule.
        store: folder to keep features in; none: they are used and dropped.
    """

    preconditioner: Literal["none", "adam", "adam_less"] = "none"
    sketch: Literal["count", "rademacher", "kronecker", "identity"] = "count"
    dim: int = 8192
    seed: int = 0
    reduction: Literal["mean", "sum"] = "mean"
    normalize: bool = True
    unsupported: Literal["error", "ignore"] = "error"
    store: str | None = None


class Probe(Protocol):
    """Model-dependent measurements, on all ranks together: every rank makes the same calls in the same order.

    Indices are of the run's pool, or of ``pool`` where one is given (a validation set, generated samples).
    """

    def losses(self, indices: IndexArray, pool: Pool | None = None) -> ScoreArray:
        """Return the token-mean loss of each sample, shape (n,), float32; NaN where no token is trained on."""
        ...

    def error_norms(self, indices: IndexArray) -> ScoreArray:
        """Return each sample's token mean of ||softmax - one-hot||_2, shape (n,), float32; NaN as for losses."""
        ...

    def embeddings(self, indices: IndexArray) -> ScoreArray:
        """Return mean-pooled hidden states of the last layer scaled to length 1, shape (n, hidden), float32."""
        ...

    def expert_loads(self, indices: IndexArray) -> ScoreArray:
        """Return how each sample's tokens are routed in a mixture of experts, shape (n, layers * experts), float32.

        For every layer the share of the sample's routed places (tokens x experts per token) that went to each expert:
        non-negative, sum 1 in each layer.
        """
        ...

    def gradient_norms(self, indices: IndexArray, settings: GradientSettings) -> ScoreArray:
        """Return the exact length of each sample's direction, before any sketch, shape (n,), float32."""
        ...

    def gradients(self, indices: IndexArray, settings: GradientSettings, pool: Pool | None = None) -> ScoreArray:
        """Return the features of a few samples, shape (n, k), float32; zero where no token is trained on."""
        ...

    def similarities(self, indices: IndexArray, settings: GradientSettings, targets: ScoreArray) -> ScoreArray:
        """Return the inner products of each sample's feature with ``targets`` (S, k), shape (n, S), float32.

        Features are made, used and dropped block by block, so their number does not matter. NaN where no token of the
        sample is trained on.
        """
        ...

    def extract(self, indices: IndexArray, settings: GradientSettings) -> FeatureStore:
        """Return the features of samples kept in ``settings.store``, making those that are not there yet."""
        ...

    def products(
        self, groups: list[IndexArray], settings: GradientSettings, targets: IndexArray, target_pool: Pool
    ) -> list[ScoreArray]:
        """Return the exact inner products of directions within each group, without a sketch.

        Each group is one forward and backward of its samples and the samples ``targets`` of ``target_pool``. Returns
        per group (b, b + m): of its samples with its samples, then with the targets; NaN for a sample or target without
        a token that is trained on.
        """
        ...

    def generate(self, prompts: list[list[int]], settings: GenerationSettings, seed: int) -> list[list[list[int]]]:
        """Return ``settings.samples`` responses (token ids, prompt left out) of the model to each prompt."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        ...

    def checkpoint(self, folder: str) -> AbstractContextManager[None]:
        """Measure with the weights (and moments) of a stored checkpoint for a while."""
        ...

    def learning_rates(self, folders: list[str]) -> list[float]:
        """Return the mean learning rate of each stored checkpoint's stretch of its run, scaled to sum 1."""
        ...


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are sampled from the model in training."""

    samples: int = 4
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    backend: Literal["hf", "vllm"] = "hf"


@dataclass(frozen=True)
class StepStatistics:
    """What the optimizer step just made showed, over the whole global batch (all micro-batches, all ranks)."""

    step: int
    """Optimizer steps done, this one included."""
    losses: NDArray[np.float64]
    """Token-mean training loss of each domain, unweighted, shape (K,); NaN where the batch had none of it."""
    tokens: NDArray[np.int64]
    """Tokens that count in the loss, of each domain, shape (K,)."""
    samples: NDArray[np.int64]
    """Samples of each domain, shape (K,)."""
    proportions: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """The domain shares of the plan the step was trained on, shape (K,); empty where nothing is planned."""
    excess: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Token mean of max(loss - reference loss, 0) of each domain, shape (K,), NaN as for losses; 0 where nothing was
    compared with a reference."""


@dataclass(frozen=True)
class StepContext:
    """What the loss weights of one optimizer step may depend on; the same on every rank."""

    pool: Pool
    probe: Probe
    step: int
    """Optimizer steps done before this one."""
    total_steps: int
    """Optimizer steps the run is expected to take."""
    learning_rate: float
    indices: IndexArray
    """Samples of the step's global batch (all micro-batches, all ranks), shape (B,)."""
    tokens: NDArray[np.int64]
    """Tokens of the step that count in the loss, of each domain, shape (K,)."""
    losses: NDArray[np.float64]
    """Token-mean loss of each domain over them, unweighted, shape (K,); NaN where the step has none of it. Empty for
    mixers that weigh by ``probe``."""
    excess: NDArray[np.float64]
    """Token mean of max(loss - reference loss, 0) of each domain, shape (K,); NaN as for losses. Empty for mixers that
    do not weigh by ``excess``."""
    targets: Pool | None = None
    """The validation samples, where the mixer asked for them."""


NOT_DECIDED = "not_decided"
"""In :attr:`RoundContext.memo`: why the mixer decided nothing."""


@dataclass(frozen=True)
class RoundContext:
    """What a decision may depend on."""

    pool: Pool
    probe: Probe
    rng: np.random.Generator
    """Keyed by (seed, component, round): the same numbers on every rank and after a resume."""
    round: int
    """Number of the round being planned, from 0."""
    update: int
    """Number of the decision, from 0; warm-up rounds have none (0 there)."""
    num_updates: int
    """Decisions in the whole run."""
    start_step: int
    """Optimizer steps done so far."""
    steps: int
    """Optimizer steps the plan is for."""
    size: int
    """Samples the plan is for: ``steps`` times the global batch size."""
    total_steps: int
    """Optimizer steps of the whole run."""
    targets: Pool | None = None
    """The validation samples, one domain for each sub-task, where the component asked for them."""
    memo: dict[str, Any] = field(default_factory=dict)
    """What a component keeps for the other groups of the same round."""
    learning_rate: float = 0.0
    """The optimizer's, at the first step of the round."""
    capped: CappedScoring | None = None
    """What scores and chooses in the selector's place where ``max_overhead`` is set."""

    def not_decided(self, why: str) -> None:
        """Put on record that the shares of this round do not follow from what the mixer is for, and why.

        As in a first decision that has nothing to go by yet. The round's line then does not name it as having acted. A
        selector says so of each group in :attr:`Selection.undecided`.
        """
        self.memo[NOT_DECIDED] = why


@dataclass
class Group:
    """A contiguous range of the pool out of which ``budget`` samples are wanted: the whole pool, or one domain."""

    name: str
    start: int
    stop: int
    budget: int
    sampler: PassSampler
    """Where this group's passes stand; shared by all rounds of the run."""

    @property
    def size(self) -> int:
        """Number of samples in the group."""
        return self.stop - self.start

    @property
    def candidates(self) -> IndexArray:
        """Pool indices of the group, ascending, shape (size,)."""
        return np.arange(self.start, self.stop, dtype=np.int64)

    def draw(self, count: int) -> IndexArray:
        """Return the next ``count`` pool indices of the group's running pass."""
        drawn = self.sampler.draw(count)
        drawn += self.start
        return drawn

    def draw_passes(self) -> Selection:
        """Return the next ``budget`` samples of the group's running pass, in random order already."""
        begin = self.sampler.drawn
        numbers = np.arange(begin, begin + self.budget, dtype=np.int64) // self.size
        return Selection(self.draw(self.budget), shuffled=True, passes=numbers)


@dataclass(frozen=True)
class Selection:
    """The samples a selector chose.

    Attributes:
        indices: pool indices, shape (budget,).
        scores: their scores in the same order, or None where the selector has none.
        unscored: candidates left out because they have no score (no token to train on).
        shuffled: whether the indices are in random order already.
        ranks: the rank of each among the candidates of its group, in the same order, int64: 1 is the best, ties broken
            as the rule that chose breaks them; 0 for a sample taken without a choice. None where nothing is ranked.
        ranked: candidates the ranks are among.
        passes: which pass over its group each is of, in the same order, int64; a sample of a later pass is not trained
            before those of an earlier one, unless an order moves it. None where there are no passes.
        undecided: why these samples do not follow from what the selector is for; None where they do.
    """

    indices: IndexArray
    scores: ScoreArray | None = None
    unscored: int = 0
    shuffled: bool = False
    ranks: IndexArray | None = None
    ranked: int = 0
    passes: IndexArray | None = None
    undecided: str | None = None


class Component:
    """Base of all components. ``register`` sets :attr:`family` and :attr:`name`."""

    family: ClassVar[str]
    name: ClassVar[str]
    Params: ClassVar[type[ComponentParams]] = ComponentParams
    needs_validation: ClassVar[bool] = False
    """Whether ``ctx.targets`` is wanted; then its parameters have ``validation`` and ``subtask_column``."""

    def __init__(self, params: ComponentParams) -> None:
        self.params: Any = params

    def problems(self, run: RunConfig) -> Iterator[tuple[str, str]]:
        """Yield a parameter and what is wrong with it in this run. Called before anything is loaded."""
        yield from ()

    def wanted_rounds(self, domains: int) -> int:
        """Return into how many rounds a pass and the run are divided at least where ``update_steps`` is not given.

        1: a round is one pass over the pool.
        """
        return 1

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return why the component cannot do in this run what it is for, and what to set; None where it can.

        Asked before the model is loaded; the text goes on from "select less: " and the like, without a full stop.
        """
        return None

    def expected_forwards(self, run: RunOutline) -> float:
        """Return what the component measures in the whole run, in forward passes of one sample.

        A forward and backward counts as three, and so does a sample that is trained on.
        """
        return 0.0

    def on_step(self, statistics: StepStatistics) -> None:
        """Hear what the optimizer step just made showed; called after every step on every rank."""

    def state_dict(self) -> State:
        """Return what the component needs to go on exactly.

        None, True and False, numbers, text, numpy arrays and scalars, in dicts, lists and tuples; all come back of the
        same types, and anything else is refused before training begins.
        """
        return {}

    def load_state_dict(self, state: State) -> None:
        """Take back what :meth:`state_dict` returned."""


def state_of(component: Component) -> State:
    """Return a component's state.

    Raises:
        ComponentError: if it holds something that a checkpoint cannot, naming where.
    """
    state = component.state_dict()
    label = label_of(component, ("state_dict",))
    if not isinstance(state, dict):
        raise ComponentError(f"{label} returned a {type(state).__name__} as its state; needed is a dict.")
    for path, value in _parts(state):
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            continue
        if value is not None and not isinstance(value, str | bool | int | float | np.generic):
            kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
            raise ComponentError(
                f"{label} returned {kind} as {path!r} of its state; use JSON values and numeric numpy arrays."
            )
    return state


def _parts(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value in nested dicts and lists with its path; a key that is no text as a value."""
    if isinstance(state, dict):
        for key, value in state.items():
            if isinstance(key, str):
                yield from _parts(value, f"{path}.{key}".lstrip("."))
            else:
                yield f"{path}.{key}".lstrip("."), (key,)
    elif isinstance(state, list | tuple):
        for number, value in enumerate(state):
            yield from _parts(value, f"{path}[{number}]")
    else:
        yield path, state


class SelectorParams(ComponentParams):
    """Parameters of selectors that turn one score per sample into a selection."""

    rule: Literal["top_k", "sample"] = Field(
        "top_k",
        description="top_k: the best scores; sample: draw without replacement, p ~ exp(z / temperature).",
    )
    temperature: float = Field(
        1.0, gt=0, description="For rule 'sample': of the standardised scores z; larger is flatter."
    )
    max_overhead: float | None = Field(
        None, gt=0, description="Cap on decision time over training time; none: every candidate is scored every time."
    )


class Selector(Component):
    """Chooses which samples of the pool are in the next plan.

    Write :meth:`score` (higher is better) and leave the choice to the ``rule`` parameter, or override :meth:`choose`.
    """

    Params: ClassVar[type[ComponentParams]] = SelectorParams
    may_exceed_pool: ClassVar[bool] = False
    """Whether a round longer than the pool makes sense (whole passes, then a choice for the rest)."""
    scores_samples: ClassVar[bool] = True
    """Whether its selections carry scores."""
    probes: ClassVar[Literal["nothing", "losses", "gradients"]] = "nothing"
    """What scoring one sample takes, for the estimate of a run's cost."""
    leaves_out_unscored: ClassVar[bool] = False
    """Whether :meth:`score` may return NaN for samples without a trained token; they are never chosen."""
    chooses: ClassVar[bool] = True
    """Whether it leaves samples out of a round that is shorter than a pass for good reason; ``full`` does not."""

    def wanted_rounds(self, domains: int) -> int:
        """Return 4: a round is then at most a quarter of the pool, and a run has several decisions."""
        return 4 if self.chooses else 1

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that a capped run has one decision, before anything is known of the time of a step."""
        capped = isinstance(self.params, SelectorParams) and self.params.max_overhead is not None
        if not capped or run.schedule.warmup_steps or run.decisions != 1:
            return None
        return (
            "max_overhead is a share of the time of training steps, of which nothing is known before the first one, so "
            "the only decision scores the 32 samples that are always scored; set dataflex.warmup_steps, or lower "
            "dataflex.update_steps"
        )

    def expected_forwards(self, run: RunOutline) -> float:
        """Return the samples scored in the whole run, validation samples included, each as often as it takes."""
        if self.probes == "nothing" or run.pool_size is None:
            return 0.0
        each = 3 if self.probes == "gradients" else 1
        samples = self.scored_samples(run.pool_size) + run.validation
        return float(each * samples * self.expected_passes(run.decisions))

    def expected_passes(self, decisions: int) -> int:
        """Return how often :meth:`scored_samples` are scored in a run, for the estimate of its cost."""
        return decisions

    def scored_samples(self, pool_size: int) -> int:
        """Return how many samples of the pool one decision scores, for the estimate of a run's cost."""
        return pool_size

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return one number per candidate, shape (n,); higher is chosen first."""
        raise NotImplementedError(f"selector {self.name!r} defines neither score() nor choose()")

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return ``count`` distinct candidates, ``count`` at most their number."""
        if ctx.capped is not None:
            return ctx.capped.choose(self, ctx, candidates, count)
        scores = check_scores(self, self.score(ctx, candidates), candidates, self.leaves_out_unscored)
        scored = np.flatnonzero(~np.isnan(scores))
        if scored.size < count:
            raise ComponentError(
                f"{count} samples are wanted but only {scored.size} of {candidates.size} have a score (the others have "
                "no token to train on). Shorten update_steps or check the data."
            )
        values = scores[scored]
        if self.params.rule == "top_k":
            chosen = top_k(values, count)
            ranks = ranks_of_best(values[chosen])
        else:
            spread = float(values.std()) or 1.0
            chosen = sample_softmax(values.astype(np.float64) / (spread * self.params.temperature), count, ctx.rng)
            ranks = ranks_among(values, chosen)
        return Selection(
            candidates[scored[chosen]],
            values[chosen],
            candidates.size - scored.size,
            ranks=ranks,
            ranked=scored.size,
        )

    def select(self, ctx: RoundContext, group: Group) -> Selection:
        """Return ``group.budget`` samples: whole passes while the budget exceeds the group, then a choice."""
        passes, rest = divmod(group.budget, group.size)
        candidates = group.candidates
        whole = Selection(np.tile(candidates, passes), passes=np.repeat(np.arange(passes), group.size))
        if not rest:
            return replace(whole, undecided="every sample is taken")
        chosen = self.choose(ctx, candidates, rest)
        check_form(label_of(self, ("choose",)), chosen)
        self._check_distinct(chosen, group)
        if not passes:
            return chosen
        return join([whole, replace(chosen, passes=np.full(rest, passes))])

    def _check_distinct(self, chosen: Selection, group: Group) -> None:
        inside = chosen.indices[(chosen.indices >= group.start) & (chosen.indices < group.stop)]
        seen = np.zeros(group.size, dtype=bool)
        seen[inside - group.start] = True
        if np.count_nonzero(seen) < inside.size:
            raise ComponentError(f"{label_of(self, ('choose',))} chose a sample of {group.name!r} more than once.")


def check_form(label: str, selection: Selection) -> None:
    """Check that somebody's selection is one, of arrays.

    Raises:
        ComponentError: naming what chose and what it returned.
    """
    if not isinstance(selection, Selection):
        raise ComponentError(f"{label} returned a {type(selection).__name__}; needed is a dataflex.Selection.")
    parts = {"indices": selection.indices, "scores": selection.scores, "ranks": selection.ranks}
    for name, part in parts.items():
        if not isinstance(part, np.ndarray) and (part is not None or name == "indices"):
            raise ComponentError(
                f"{label} returned a Selection whose {name} are a {type(part).__name__}; needed is a numpy array."
            )


def join(parts: list[Selection]) -> Selection:
    """Return selections one after another; of a part without scores, ranks or passes a sample has NaN or 0 there."""
    if len(parts) == 1:
        return parts[0]
    scores = ranks = passes = None
    if any(part.scores is not None for part in parts):
        scores = np.concatenate(
            [np.full(part.indices.size, np.nan, np.float32) if part.scores is None else part.scores for part in parts]
        )
    if any(part.ranks is not None for part in parts):
        ranks = np.concatenate(
            [np.zeros(part.indices.size, np.int64) if part.ranks is None else part.ranks for part in parts]
        )
    if any(part.passes is not None for part in parts):
        passes = np.concatenate(
            [np.zeros(part.indices.size, np.int64) if part.passes is None else part.passes for part in parts]
        )
    return Selection(
        np.concatenate([part.indices for part in parts]),
        scores,
        sum(part.unscored for part in parts),
        ranks=ranks,
        ranked=sum(part.ranked for part in parts),
        passes=passes,
    )


def check_scores(
    component: Component, scores: ScoreArray, candidates: IndexArray, nan_allowed: bool = False
) -> ScoreArray:
    """Return ``scores`` as float32 after checking one finite number (or NaN, where allowed) per candidate.

    Raises:
        ComponentError: naming the component and the first offending samples.
    """
    label = label_of(component, ("score",))
    try:
        values = np.asarray(scores, dtype=np.float32)
    except (TypeError, ValueError) as error:
        kind = type(scores).__name__
        raise ComponentError(f"{label} returned a {kind} that is no array of numbers: {error}") from error
    if values.shape != candidates.shape:
        raise ComponentError(
            f"{label} returned scores of shape {values.shape} for {candidates.size} candidates; "
            "one number per candidate is needed."
        )
    bad = np.flatnonzero(np.isinf(values) if nan_allowed else ~np.isfinite(values))
    if bad.size:
        raise ComponentError(
            f"{label} returned {bad.size} scores that are NaN or infinite (pool indices "
            f"{', '.join(map(str, candidates[bad[:5]]))}{', ...' if bad.size > 5 else ''}). "
            "Return a finite number for every candidate."
        )
    return values


def _form_of_shares(value: Any) -> Any:
    numbers = value.values() if isinstance(value, dict) else value
    if isinstance(value, str) or (
        isinstance(value, dict | list)
        and all(isinstance(share, int | float) and not isinstance(share, bool) for share in numbers)
    ):
        return with_text_keys(value) if isinstance(value, dict) else value
    raise ValueError("must be a list of numbers, a mapping of domain names to numbers, or a JSON file that holds one")


Shares = Annotated[list[float] | dict[str, float] | InputPath, BeforeValidator(_form_of_shares)]
"""Domain shares as a user gives them: numbers in domain order, a mapping by name, or a JSON file that holds one."""


class DomainParams(ComponentParams):
    """Parameters all mixers have."""

    max_epochs_per_domain: float | None = Field(
        None, gt=0, description="No domain is gone through more often; its further share goes to the others."
    )


class MixerParams(DomainParams):
    """Parameters of mixers that decide: what is trained on before the first decision."""

    initial_proportions: Shares | None = Field(
        None, description="Shares of the domains in warm-up rounds: list, mapping or JSON file; none: by size."
    )


class Mixer(Component):
    """Chooses the domain proportions of the next plan; may also weigh the domains in the loss of every step.

    A mixer that weighs the loss sets :attr:`weighs_loss_by`, and has :attr:`loss_weights` and :meth:`update_weights`;
    the loss of a step is then sum_i loss_weights_i * (token-mean loss of domain i in the step's global batch), without
    a term for a domain the step has nothing of. In warm-up rounds the loss is the plain one.
    """

    Params: ClassVar[type[ComponentParams]] = MixerParams
    weighs_loss_by: ClassVar[Literal["nothing", "losses", "excess", "probe"]] = "nothing"
    """What :meth:`update_weights` looks at, beside the token counts: the step's losses, also its excess losses over a
    reference (``excess``), or only what it measures itself (``probe``)."""
    learns_from_losses: ClassVar[bool] = False
    """Whether :meth:`on_step` needs losses, which LLaMA-Factory's special losses do not give."""
    measures_samples: ClassVar[bool] = False
    """Whether it measures several samples together on the model, which some collators do not allow."""
    constant_shares: ClassVar[bool] = False
    """Whether :meth:`mix` returns the same shares in every round."""
    begins_with_initial: ClassVar[bool] = False
    """Whether :meth:`mix` starts from the initial proportions, also without a warm-up."""

    def wanted_rounds(self, domains: int) -> int:
        """Return 10, so that shares that change can do so several times, or 1 where they do not."""
        return 1 if self.constant_shares else 10

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that one domain leaves nothing to mix, what :meth:`cannot_learn` says, or what has no effect."""
        if run.domains == 1:
            return (
                "there is one domain, whose share is always 1; name several data sets in dataset, or divide one with "
                "dataflex.domain_column"
            )
        return self.cannot_learn(run) or self._unused(run)

    def _unused(self, run: RunOutline) -> str | None:
        """Return that the proportions of warm-up rounds are given where there are none."""
        given = isinstance(self.params, MixerParams) and self.params.initial_proportions is not None
        if not given or self.begins_with_initial or run.schedule.warmup_steps:
            return None
        return "initial_proportions are those of warm-up rounds, and there are none; set dataflex.warmup_steps"

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return why the shares (or loss weights) cannot become what the mixer is for in this run; None where they can.

        As :meth:`cannot_act`, for a run of several domains.
        """
        return None

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the proportions of warm-up rounds, shape (K,): the given ones, or the share of samples in the pool."""
        if self.params.initial_proportions is not None:
            return shares_of(self.params.initial_proportions, ctx.pool.domains, "initial_proportions")
        return ctx.pool.domain_sizes.astype(np.float64)

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Return a parameter and what is wrong with it for these domains, or None. Called before a model is loaded."""
        problem = shares_problem(self.params.initial_proportions, names)
        return None if problem is None else ("initial_proportions", problem)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return non-negative proportions with a positive sum, shape (K,); the framework normalises them."""
        raise NotImplementedError(f"mixer {self.name!r} does not define mix()")

    @property
    def loss_weights(self) -> NDArray[np.float64]:
        """The weights of the domains in the loss, shape (K,), non-negative with a positive sum."""
        raise NotImplementedError(f"mixer {self.name!r} does not define loss_weights")

    def update_weights(self, ctx: StepContext) -> None:
        """Decide :attr:`loss_weights` anew from one optimizer step, before it is made; called on every rank."""
        raise NotImplementedError(f"mixer {self.name!r} does not define update_weights()")

    def result(self, names: tuple[str, ...]) -> dict[str, Any] | None:
        """Return what a finished run found, for ``domain_weights.json`` in its record, or None.

        Its ``proportions``, by name, are what other runs read where the file is given as their proportions.
        """
        return None


def shares_of(given: Shares, names: tuple[str, ...], key: str = "proportions") -> NDArray[np.float64]:
    """Return given shares in the order of ``names``, shape (K,), as they are; ``key`` is the parameter they are of.

    Raises:
        ConfigError: if they do not fit the names, are negative or not finite, or are all zero.
    """
    shares = _read_shares(given) if isinstance(given, str) else given
    problem = shares_problem(shares, names)
    if problem is not None:
        raise ConfigError(f"dataflex.mix.{key}: {problem}")
    if isinstance(shares, dict):
        named = by_domain(shares, names)
        shares = [named[name] for name in names]
    return np.asarray(shares, dtype=np.float64)


def shares_problem(given: Shares | None, names: tuple[str, ...]) -> str | None:
    """Return what is wrong with given shares of the domains ``names``, or None."""
    if given is None:
        return None
    if isinstance(given, str):
        try:
            given = _read_shares(given)
        except ConfigError as error:
            return str(error)
    if isinstance(given, dict):
        given = by_domain(given, names)
        strange = [unknown("domain", name, names) for name in given if name not in names]
        if strange:
            return strange[0]
        missing = [name for name in names if name not in given]
        if missing:
            return f"has no share of {', '.join(missing)}; every domain needs one, 0 leaves it out."
    elif len(given) != len(names):
        return f"has {len(given)} numbers for {len(names)} domains ({', '.join(names)})."
    values = list(given.values()) if isinstance(given, dict) else given
    if any(not np.isfinite(share) or share < 0 for share in values):
        return f"must be finite and not negative, got {given}."
    if sum(values) <= 0:
        return f"must have a positive sum, got {given}."
    return None


def _read_shares(path: str) -> dict[str, float]:
    """Return the shares by name in a JSON file: its ``proportions``, or the file itself.

    Raises:
        ConfigError: if there is no such file, or it holds no mapping of names to numbers.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=distinct)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path!r} cannot be read: {error}") from error
    shares = found.get("proportions", found) if isinstance(found, dict) else found
    if not isinstance(shares, dict) or not all(
        isinstance(share, int | float) and not isinstance(share, bool) for share in shares.values()
    ):
        raise ConfigError(f"{path!r} holds no mapping of domain names to numbers.")
    return {name: float(share) for name, share in shares.items()}


class Order(Component):
    """Arranges the samples of a plan."""

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that rounds of one step leave nothing to arrange: a step's gradient does not depend on the order."""
        if min(run.schedule.update_steps, run.decided_steps) > 1:
            return None
        return (
            "every round is one optimizer step, and the order of samples inside a step changes nothing; raise "
            "dataflex.update_steps"
        )

    keeps_passes: ClassVar[bool] = False
    """Whether the samples of a domain come in passes whatever :meth:`arrange` returns: of one domain, those of an
    earlier pass then take the places before those of a later one."""

    def arrange(self, ctx: RoundContext, selection: Selection) -> IndexArray:
        """Return the positions of ``selection.indices`` in training order: a permutation of ``range(n)``."""
        raise NotImplementedError(f"order {self.name!r} does not define arrange()")


class WeighterParams(ComponentParams):
    """Parameters all weighters have."""

    normalization: Literal["token", "sample"] = Field(
        "token",
        description="token: the Trainer's own token mean, weighted; sample: weighted mean of per-sample means.",
    )


class Weighter(Component):
    """Scales the loss of each sample inside a step."""

    Params: ClassVar[type[ComponentParams]] = WeighterParams
    elementwise: ClassVar[bool] = False
    """Whether a sample's weight depends on nothing but its own loss; then no batch has to be gathered first."""

    def expected_forwards(self, run: RunOutline) -> float:
        """Return the samples of all steps where several micro-batches make one, as their weights need all losses."""
        if self.elementwise or run.accumulation == 1:
            return 0.0
        return float(run.decided_steps * run.global_batch_size)

    def weigh(self, losses: Tensor, step: int) -> Tensor:
        """Return one weight per sample, shape (n,), non-negative; 1 everywhere is plain training.

        Args:
            losses: token-mean losses of the step's whole global batch (all micro-batches, all ranks), shape (n,),
                float32, detached. Any part of it where the weighter is elementwise.
            step: optimizer steps done so far.
        """
        raise NotImplementedError(f"weighter {self.name!r} does not define weigh()")


@dataclass
class Components:
    """The components of one run, at most one of each family."""

    select: Selector | None = None
    mix: Mixer | None = None
    order: Order | None = None
    weight: Weighter | None = None

    def items(self) -> list[tuple[str, Component]]:
        """Return the present components with their configuration keys, in the order they act."""
        pairs = [("select", self.select), ("mix", self.mix), ("order", self.order), ("weight", self.weight)]
        return [(key, component) for key, component in pairs if component is not None]

    @property
    def plans_data(self) -> bool:
        """Whether the data path is ours: anything but ``weight`` alone."""
        return any((self.select, self.mix, self.order))
