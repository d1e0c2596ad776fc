"""Fixed stages: given domains are trained on one after another for given shares of the run, each stage shuffled.

A stage draws the samples of its domains in passes, each in a new random order. With T samples in the run, a stage with
a share has T times its share. A stage without a share has one pass, and the last stage has the rest of the run. If no
stage has a share, the first stage follows the last one again.
Source: common practice (staged fine-tuning; general data first, the best last).
Cost: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dataflex import (
    ComponentParams,
    IndexArray,
    KeyedPermutation,
    Order,
    Pool,
    RoundContext,
    RunOutline,
    by_domain,
    exactly,
    key_of,
    register,
    unknown,
)


class Stage(BaseModel):
    """One stage: its domains and its length."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    domains: list[str] = Field(min_length=1, description="Names of the domains.")
    share: float | None = Field(
        None, gt=0, le=1, description="Share of the run's samples. Default: one pass over the domains."
    )

    @field_validator("domains", mode="before", json_schema_input_type=str | list[str | int | float | bool])
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        return [str(name).strip() for name in names] if isinstance(names, list) else names


class StagesParams(ComponentParams):
    """Parameters of stages."""

    stages: list[Stage] = Field(
        min_length=2, description="Domains and shares, in the order of training: {domains: [...], share: ...}."
    )
    left_out: list[str] = Field(
        default_factory=list, description="Domains that are not trained on. A domain in no stage must be named here."
    )

    @field_validator("left_out", mode="before", json_schema_input_type=list[str | int | float | bool])
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [str(name).strip() for name in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        """Check that the given shares leave the right rest for the stages without a share."""
        shares = [stage.share for stage in self.stages]
        total = float(sum(exactly(share) for share in shares if share is not None))
        if None not in shares:
            if abs(total - 1) > 1e-6:
                raise ValueError(
                    f"the shares add up to {total:g} instead of 1; change a share, or remove that of the last stage, "
                    "which then gets the rest of the run"
                )
        elif shares[-1] is not None:
            raise ValueError(
                "the last stage lasts until the run ends, so it can have a share only if all stages have one; remove "
                "it, or give every stage a share"
            )
        elif total >= 1:
            raise ValueError(f"the shares add up to {total:g}, and nothing is left for the stages without one")
        return self


@register("order", "stages")
class StagesOrder(Order[StagesParams]):
    """Trains on named domains one after another, each stage shuffled."""

    draws: ClassVar[bool] = True

    @property
    def comes_again(self) -> bool:
        """Whether the first stage follows the last one."""
        return all(stage.share is None for stage in self.params.stages)

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Return a parameter and its problem, or None.

        The parameter may name an unknown domain, or a domain twice. A domain may also be in no stage.
        """
        used: set[str] = set()
        for key, given in self._named():
            meant = _meant(given, names)
            for name in meant:
                if name not in names:
                    return key, unknown("domain", name, names)
            if len(set(meant)) < len(meant):
                return key, f"names a domain twice: {', '.join(given)}."
            if key == "left_out" and used & set(meant):
                return (
                    key,
                    f"{', '.join(sorted(used & set(meant)))}: also in a stage; remove it from the stage or from "
                    "left_out.",
                )
            used |= set(meant)
        missing = [name for name in names if name not in used]
        if missing:
            return "stages", (
                f"in no stage: {', '.join(missing)}. Add each to a stage, or to left_out if none of its samples is to "
                "be trained on."
            )
        return None

    def pool_problems(self, pool: Pool) -> Iterator[tuple[str, str]]:
        """Yield the problem that :meth:`check_domains` finds with the pool's domains."""
        problem = self.check_domains(pool.domains)
        if problem is not None:
            yield problem

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return the stages that the run never reaches."""
        total = run.total_steps * run.global_batch_size
        ends = self._ends(self._sizes(run), total) or []
        late = [number for number, before in enumerate(ends[:-1], start=1) if before >= total]
        if not late:
            return None
        stages = ", ".join(f"{number + 1} ({', '.join(self.params.stages[number].domains)})" for number in late)
        return (
            f"stage {stages} never begins: the stages before use all {total:,} samples of the run; train longer, or "
            "give the stages shares"
        )

    def _sizes(self, run: RunOutline) -> list[int] | None:
        """Return the number of samples of the domains of each stage. None means unknown."""
        sizes = run.sizes
        if sizes is None:
            return None
        names = tuple(sizes)
        return [sum(sizes.get(name, 0) for name in _meant(stage.domains, names)) for stage in self.params.stages]

    def outline(self, run: RunOutline, is_mixed: bool) -> list[str]:
        """Return the steps of each stage, and its passes over its domains, one line for each stage."""
        total = run.total_steps * run.global_batch_size
        sizes = self._sizes(run)
        ends = self._ends(sizes, total)
        found, begin = [], 0
        for number, stage in enumerate(self.params.stages):
            head = f"stage {number + 1} ({', '.join(stage.domains)}): "
            end = None if ends is None else min(ends[number], total)
            if end is None:
                found.append(f"{head}a pass over its domains, which are not counted yet")
                continue
            steps = (end - begin) / run.global_batch_size
            if begin >= end:
                text = "nothing: the run ends before it"
            else:
                text = f"{steps:,.6g} steps, from {begin / run.global_batch_size:,.6g} on"
                text += "" if sizes is None else f", {(end - begin) / sizes[number]:.2g} passes over its domains"
            found.append(head + text)
            begin = end
        return [*found, "after the last stage the first comes again"] if self.comes_again and begin < total else found

    def draw(self, ctx: RoundContext) -> IndexArray:
        """Return the samples of the round in training order, shape (ctx.size,)."""
        members = [self._members(stage, ctx.pool) for stage in self.params.stages]
        batch = ctx.size // ctx.steps
        ends = self._ends([samples.size for samples in members], ctx.total_steps * batch)
        assert ends is not None
        key = int.from_bytes(ctx.rng.bytes(16), "little")
        place, parts = ctx.start_step * batch, []
        stop = place + ctx.size
        while place < stop:
            cycle, within = divmod(place, ends[-1]) if self.comes_again else (0, place)
            number = int(np.searchsorted(ends[:-1], within, side="right"))
            samples, begin = members[number], 0 if number == 0 else ends[number - 1]
            turn, offset = divmod(within - begin, samples.size)
            left = samples.size - offset
            if number < len(ends) - 1:
                left = min(left, ends[number] - within)
            take = min(left, stop - place)
            # Keyed by stage and pass, not by round, so that a pass continues across rounds.
            order = KeyedPermutation(samples.size, key_of(key, "stage", number, cycle, turn))
            parts.append(samples[order(np.arange(offset, offset + take, dtype=np.int64))])
            place += take
        return np.concatenate(parts)

    def _named(self) -> Iterator[tuple[str, list[str]]]:
        for number, stage in enumerate(self.params.stages):
            yield f"stages.{number}.domains", stage.domains
        yield "left_out", self.params.left_out

    def _members(self, stage: Stage, pool: Pool) -> IndexArray:
        """Return the samples of a stage's domains, in the order of the pool."""
        numbers = sorted(pool.domains.index(name) for name in _meant(stage.domains, pool.domains))
        return np.concatenate([np.arange(pool.offsets[k], pool.offsets[k + 1], dtype=np.int64) for k in numbers])

    def _ends(self, sizes: list[int] | None, total: int) -> list[int] | None:
        """Return after how many samples of the run each stage ends. None means that sizes are needed but unknown.

        The last stage ends with the run, or if the stages repeat, after one pass over its domains.

        Args:
            sizes: samples of each stage's domains. None means unknown.
            total: samples of the run.
        """
        if sizes is None and any(stage.share is None for stage in self.params.stages[:-1]):
            return None
        ends, shared, whole = [], exactly(0), 0
        for number, stage in enumerate(self.params.stages):
            if stage.share is not None:
                shared += exactly(stage.share)
            elif sizes is not None and (self.comes_again or number < len(self.params.stages) - 1):
                whole += sizes[number]
            ends.append(round(shared * total) + whole)
        if not self.comes_again:
            ends[-1] = max(total, ends[-1])
        return ends


def _meant(given: list[str], names: tuple[str, ...]) -> list[str]:
    """Return the names as the domains spell them. A name that belongs to no domain is returned unchanged."""
    return [next(iter(by_domain({name: None}, names))) for name in given]
