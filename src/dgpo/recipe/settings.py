"""What all settings are: immutable, without unknown keys, and clear about a wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dgpo.recipe.errors import key_tree, problems, raise_problems


class _Clear(type(BaseModel)):
    """``DGPO(bta=3)`` is answered as a recipe's file would be.

    Only a call by name comes through here; within a recipe pydantic validates its sections itself,
    and the recipe gathers what is wrong in all of them.
    """

    if not TYPE_CHECKING:  # type checkers shall see the fields

        def __call__(cls, *given: Any, **settings: Any) -> Any:
            try:
                return super().__call__(*given, **settings)
            except ValidationError as error:
                raise_problems(problems(error, key_tree(cls)), cls.__name__)
                raise


class Settings(BaseModel, metaclass=_Clear):
    """Frozen settings: an unknown key, an infinite number or a NaN is refused.

    Raises:
        UserError: all that is wrong, with the keys, the values and what would work.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
