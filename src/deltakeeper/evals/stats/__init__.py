"""Statistics of paired experiments: proportions, flips, bootstrap over prompts, clusters and seeds, many tests."""

from deltakeeper.evals.stats.agreement import (
    SMALLEST_YOUDEN,
    ArmRates,
    JudgedArm,
    JudgeQuality,
    LabelledSet,
    cohens_kappa,
    corrected_estimate,
    kappa_estimate,
    quality,
    rogan_gladen,
)
from deltakeeper.evals.stats.bootstrap import (
    RESAMPLES,
    Statistic,
    bca_bootstrap,
    draw_counts,
    non_inferiority_bound,
    paired_bootstrap,
    resampled_means,
)
from deltakeeper.evals.stats.crossed import CrossedSample, Spread, crossed_estimate, detectable_effect, two_sided_p
from deltakeeper.evals.stats.estimates import LEVEL, Estimate, Floats, Interval, not_estimable, percentile_estimate
from deltakeeper.evals.stats.near_duplicates import near_duplicate_clusters
from deltakeeper.evals.stats.proportions import wilson, zero_hit_bound
from deltakeeper.evals.stats.significance import (
    benjamini_hochberg,
    mcnemar_exact,
    mcnemar_power,
    minimum_detectable_effect,
    paired_permutation,
)

__all__ = [
    "LEVEL",
    "RESAMPLES",
    "SMALLEST_YOUDEN",
    "ArmRates",
    "CrossedSample",
    "Estimate",
    "Floats",
    "Interval",
    "JudgeQuality",
    "JudgedArm",
    "LabelledSet",
    "Spread",
    "Statistic",
    "bca_bootstrap",
    "benjamini_hochberg",
    "cohens_kappa",
    "corrected_estimate",
    "crossed_estimate",
    "detectable_effect",
    "draw_counts",
    "kappa_estimate",
    "mcnemar_exact",
    "mcnemar_power",
    "minimum_detectable_effect",
    "near_duplicate_clusters",
    "non_inferiority_bound",
    "not_estimable",
    "paired_bootstrap",
    "paired_permutation",
    "percentile_estimate",
    "quality",
    "resampled_means",
    "rogan_gladen",
    "two_sided_p",
    "wilson",
    "zero_hit_bound",
]
