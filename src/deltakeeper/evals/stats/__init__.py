"""Statistics of paired experiments: proportions, flips, bootstrap over prompts, clusters and seeds, many tests."""

from deltakeeper.evals.stats.bootstrap import (
    RESAMPLES,
    Statistic,
    draw_counts,
    non_inferiority_bound,
    paired_bootstrap,
    resampled_means,
)
from deltakeeper.evals.stats.crossed import CrossedSample, Spread, crossed_estimate, detectable_effect, two_sided_p
from deltakeeper.evals.stats.estimates import LEVEL, Estimate, Floats, Interval, not_estimable, percentile_estimate
from deltakeeper.evals.stats.proportions import wilson, zero_hit_bound
from deltakeeper.evals.stats.significance import (
    benjamini_hochberg,
    mcnemar_exact,
    mcnemar_power,
    minimum_detectable_effect,
)

__all__ = [
    "LEVEL",
    "RESAMPLES",
    "CrossedSample",
    "Estimate",
    "Floats",
    "Interval",
    "Spread",
    "Statistic",
    "benjamini_hochberg",
    "crossed_estimate",
    "detectable_effect",
    "draw_counts",
    "mcnemar_exact",
    "mcnemar_power",
    "minimum_detectable_effect",
    "non_inferiority_bound",
    "not_estimable",
    "paired_bootstrap",
    "percentile_estimate",
    "resampled_means",
    "two_sided_p",
    "wilson",
    "zero_hit_bound",
]
