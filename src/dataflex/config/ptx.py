"""The settings of ptx: a preference run that also trains on plain text or on instructions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class PtxSettings(BaseModel):
    """The mapping ``dataflex.ptx``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dataset: list[str] = Field(description="Data sets of the text.", examples=[["wiki"]])
    coefficient: float = Field(gt=0, description="Factor of the text's token-mean loss.", examples=[0.1])
    stage: Literal["pt", "sft"] = Field(
        "pt",
        description="Whether the rows are texts, packed to cutoff_len tokens (pt), or prompts with responses (sft).",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Samples of the text in a micro-batch of one process. If null: per_device_train_batch_size.",
    )

    @field_validator("dataset", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list):
            return names
        found = [str(name).strip() for name in names if str(name).strip()]
        if not found:
            raise ValueError("must name a data set")
        return found
