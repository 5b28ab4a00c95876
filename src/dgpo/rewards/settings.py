"""One reward of a recipe: its weight, its options, and what is done when it fails."""

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
    """What a line of ``rewards`` may say besides a weight."""

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
    """How many more times a call that failed is made."""
    pause: float = Field(default=1.0, ge=0)
    """Seconds before the first further call; each next one waits twice as long."""
    on_error: Literal["stop", "skip_group"] = "stop"
    """What to do when all calls failed: end the run, or leave the group out of the update and
    count it."""

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
    """A weight as it is.

    Raises:
        ValueError: the weight is 0.
    """
    if value == 0:
        raise ValueError("a weight of 0 rewards nothing: leave the line out, or list it in eval")
    return value


def settings_of(name: str, given: Any) -> RewardSettings:
    """A weight, a mapping or settings as settings.

    Raises:
        UserError: it is none of them, or a setting is wrong.
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
    return "<settings>" if isinstance(value, (Mapping, RewardSettings)) else "<weight>"


AnyReward = Annotated[
    Annotated[RewardSettings, Tag("<settings>")]
    | Annotated[float, AfterValidator(weight), Tag("<weight>")],
    Discriminator(_kind),
]
"""A weight, or settings."""


def weight_of(reward: RewardSettings | float) -> float:
    """The weight that a line of ``rewards`` gives."""
    return reward.weight if isinstance(reward, RewardSettings) else reward


def used(reward: RewardSettings | float) -> str:
    """The registered name behind a name of the user's own; empty if there is none."""
    return (reward.use or "") if isinstance(reward, RewardSettings) else ""
