"""One reward of a recipe: its weight, and what is done when it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
)

from dgpo.errors import UserError
from dgpo.secrets import masked, secrets_in


class RewardSettings(BaseModel):
    """A line of ``rewards`` that says more than a weight."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    weight: float = 1.0
    use: str | None = None
    """The reward's name where the key is a name of your own; null: the key."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a reward that is a class, such as url for http."""
    rank: bool = False
    """Train on the place within the group, 0 (worst) to 1 (best), instead of the number."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds for one call; null: no limit."""
    retries: int = Field(default=0, ge=0)
    """Further calls after one that failed."""
    pause: float = Field(default=1.0, ge=0)
    """Seconds before the first further call; each next one waits twice as long."""
    on_error: Literal["stop", "skip_group"] = "stop"
    """What then: end the run, or leave the group out of the update and count it."""

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        for place in secrets_in(value, "options"):
            raise ValueError(
                f"{place} would be written into the run's folder: put it into a file "
                "(token_file) or into an environment variable"
            )
        return value

    @field_validator("weight")
    @classmethod
    def _rewards_something(cls, value: float) -> float:
        return weight(value)


def weight(value: float) -> float:
    """The weight, if it is one.

    Raises:
        ValueError: it is 0.
    """
    if value == 0:
        raise ValueError("a weight of 0 rewards nothing: leave the line out, or list it in eval")
    return value


def settings_of(name: str, given: Any) -> RewardSettings:
    """A weight, a mapping or a term as a term.

    Raises:
        UserError: it is none.
    """
    if isinstance(given, RewardSettings):
        return given
    settings = given if isinstance(given, Mapping) else {"weight": given}
    try:
        return RewardSettings(**settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if key == "options":  # what is wrong there may be a secret
            raise UserError(f"rewards.{name}: {first['msg']}") from None
        raise UserError(
            f"rewards.{name}: {key} = {masked(first['input'])!r:.80}: {first['msg']}; a weight is "
            "a finite number other than 0, and further keys are "
            f"{', '.join(RewardSettings.model_fields)}"
        ) from error


def _kind(value: Any) -> str:
    return "<term>" if isinstance(value, (Mapping, RewardSettings)) else "<weight>"


AnyReward = Annotated[
    Annotated[RewardSettings, Tag("<term>")]
    | Annotated[float, AfterValidator(weight), Tag("<weight>")],
    Discriminator(_kind),
]
"""A weight, or a term."""


def weight_of(reward: RewardSettings | float) -> float:
    """The weight of either."""
    return reward.weight if isinstance(reward, RewardSettings) else reward


def used(reward: RewardSettings | float) -> str:
    """The registered name behind a name of the user's own, if there is one."""
    return (reward.use or "") if isinstance(reward, RewardSettings) else ""
