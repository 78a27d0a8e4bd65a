"""What all recipe sections share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

Share = float


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are errors, never ignored, and so are numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def refuse_idle(self, because: str, *keys: str) -> None:
        """Refuse keys that nothing reads as things are; one that has its default may be there.

        Raises:
            ValueError: a key has another value than its default.
        """
        for key in keys:
            value, default = getattr(self, key), type(self).model_fields[key].get_default(call_default_factory=True)
            if value != default:
                raise ValueError(
                    f"{key} is {value!r} and has no effect: {because}; leave it out, its default is {default!r}"
                )
