"""Metrics as pure functions."""

from lightning_modules.metrics.functional.class_relevance import ClassSets, class_sets
from lightning_modules.metrics.functional.multi_instance import (
    DirectionScores,
    MultiInstanceScores,
    multi_instance_map,
    multi_instance_ndcg,
    multi_instance_scores,
    multi_instance_scores_from_classes,
    multi_instance_scores_from_embeddings,
)

__all__ = [
    "ClassSets",
    "DirectionScores",
    "MultiInstanceScores",
    "class_sets",
    "multi_instance_map",
    "multi_instance_ndcg",
    "multi_instance_scores",
    "multi_instance_scores_from_classes",
    "multi_instance_scores_from_embeddings",
]
