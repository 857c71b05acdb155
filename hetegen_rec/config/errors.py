"""The one error type that a wrong configuration raises, and the strict base of all sections."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration is wrong. The message names the key, what was found, and the fix."""


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are never coerced silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def _refuse_all_but(self, reason: str, *read: str) -> None:
        """Raises ValueError if a key that nothing reads, which are all others, differs from its default."""
        self._refuse_unused(reason, *(key for key in type(self).model_fields if key not in read))

    def _refuse_unused(self, reason: str, *keys: str) -> None:
        """Raises ValueError if one of the keys differs from its default where nothing reads it."""
        for key in keys:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise ValueError(f"`{key}: {value}` has no effect {reason}; remove it")
