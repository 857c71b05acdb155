"""Typed, strict configuration: the feature schema and everything else that defines a run."""

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.loading import load_config, save_config
from hetegen_rec.config.run import RunConfig
from hetegen_rec.config.schema import Field, FieldKind, Schema, Token, VocabularyKind

__all__ = [
    "ConfigError",
    "Field",
    "FieldKind",
    "RunConfig",
    "Schema",
    "Token",
    "VocabularyKind",
    "load_config",
    "save_config",
]
