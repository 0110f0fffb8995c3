"""How good a set of pictures is: distances with their error bars, and the features that they are measured in."""
from .distances import (Copies, FeatureStats, Measure, collect_stats, density_coverage, frechet_distance,
                        frechet_limit, kernel_distance, measure_frechet, measure_share, merge_stats,
                        nearest_copies, precision_recall)
from .features import Features, InceptionV3, load_features, shipped_features

__all__ = ["Copies", "FeatureStats", "Measure", "collect_stats", "density_coverage", "frechet_distance",
           "frechet_limit", "kernel_distance", "measure_frechet", "measure_share", "merge_stats",
           "nearest_copies", "precision_recall", "Features", "InceptionV3", "load_features", "shipped_features"]
