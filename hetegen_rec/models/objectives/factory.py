"""The objectives under one switch, `model.objective.name` (docs/method.md section 13)."""

from hetegen_rec.config.run import ModelConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.models.corruption import Corruption, Diffusion
from hetegen_rec.models.objectives.masked_features import NoiseContrast, ShareMasking
from hetegen_rec.models.objectives.next_item import ItemMasking
from hetegen_rec.models.objectives.replaced_features import Replacement, ReplacementDetector
from hetegen_rec.models.reconstruction import Heads, Reconstruction, split_fields


def make_objective(
    schema: Schema, statistics: Statistics, model: ModelConfig, oov_dropout: float = 0.0
) -> tuple[Heads, Corruption]:
    """What is predicted of a row under table dropout, and how the row is corrupted before."""
    objective = model.objective
    if objective.name == "replaced_features":
        full, sampled = split_fields(schema, statistics, model)
        names = [*full, *sampled]
        detector = ReplacementDetector(schema, names, model.dim, objective.share)
        return detector, Replacement(schema, names, objective.share)
    if objective.name == "masked_features":
        contrast = NoiseContrast(schema, statistics, model)
        return contrast, ShareMasking(schema, model.dim, objective.share)
    heads = Reconstruction(schema, statistics, model, oov_dropout)
    if objective.name == "next_item":
        names = [*heads.fields, *(objective.masked or ())]
        return heads, ItemMasking(schema, model.dim, names)
    return heads, Diffusion(schema, model.noise, model.dim, swappable=heads.full_fields)
