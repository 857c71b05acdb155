"""The sentences of the page: how its numbers were made, and how to read them."""

from benchmarks.evidence.peers import sources
from benchmarks.evidence.summary import Summary

DIFFERENCES = (
    "Test AUC minus that of the baseline with the same seed. Dots are seeds, bars their mean; full colour: "
    "p < 0.05."
)
AGAINST_BASELINE = (
    "Differences of test AUC, paired by seed. p: Student's paired t-test over seeds; corrected: by Holm's "
    "method for the number of methods on the data set. Bootstrap: in how many seeds the 95 % interval of the "
    "difference, over resampled users (or rows, where there is no user), lies above or below zero: it covers "
    "the choice of test rows, the t-test that of the seed. RI: (AUC - 0.5) / (the baseline's - 0.5) - 1. The "
    "last columns are differences of AUC on slices of test."
)
STRATEGIES = (
    "The same trained models, seed by seed, scored by one plain pass and by a strategy; differences of test "
    "AUC, corrected for their number on the data set. Passes a row: how often the network sees a row, in the "
    "mean. Time: seconds to score, as a multiple of those of the plain pass."
)
CHOICE = (
    "Mean AUC on valid, and what follows from it without a look at test. Ranks are among the methods of a "
    "table that run on all of its data sets, over the seeds that all have; 1 is best."
)
GAUC = "AUC within a user, averaged over the users with both classes, weighted by their rows."
LOG_LOSS = (
    "Lower is better. Early stopping looks at AUC, which does not see overconfident probabilities; one "
    "temperature, fitted on valid, takes that difference out."
)
SLICES = "Mind the number of clicks: a slice with few of them moves by chance."
COST = (
    "Means over seeds, on one core. CPU time is that of the whole run: training, and all evaluations; memory "
    "is that of the whole process, libraries included."
)
PREMISE = (
    "Norm of the gradient of each field's relative loss on the last weights that all fields share, before "
    "weighting, as a share of their sum: mean over the generative stage and all seeds, with uniform weights. "
    "r is the loss over that of guessing, on average as well. Easier half: the fields with the lowest r. "
    "Rank correlation of r and share: below zero, if the gradient is that of easy fields."
)
HELD_OUT = (
    "Noised cells of valid, with the same noise for all, at the end of the generative stage; means over "
    "fields and seeds. r: cross-entropy over that of guessing; over a guess by frequency: over that of one "
    "that knows how often each value of the field is seen. Top 1 and top 10: share of the cells whose true "
    "value is among the first, of the vocabulary or, with a sampled head, of the batch."
)
FIELDS = (
    "r is the loss of a field's masked cells over that of guessing, w its weight in the generative loss, "
    "s its learnt difficulty; in the table at the end of the generative stage, in the plots over its "
    "steps, both of seed 0. Hardest fields of the first method first."
)
FAILED = "They are tried again when the command is given again."


def headline(summary: Summary) -> str:
    """What the main table shows."""
    base = summary.title(summary.grid.baseline)
    copied = sources(summary.grid)
    return (
        f"Mean ± standard deviation over {_seeds(summary)} seeds; the best in bold. ▲ or ▼: above or "
        f"below “{base}” with p < 0.05 in a paired t-test over seeds; twice, if that stays so after "
        "correction for the number of methods. Settings and checkpoints are chosen on valid; every method "
        "gets the same epochs and the same search."
        + (f" Copied figures, which no test of significance sees, are those of {copied}." if copied else "")
    )


def _seeds(summary: Summary) -> str:
    """How many, of the methods that have run."""
    numbers = sorted({summary.grid.seeds_of(method) for method in summary.methods})
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def contest(ours: str, baselines: str) -> str:
    """Who meets whom, and how to read it."""
    return (
        f"On every data set the method with the best mean AUC on valid among “{ours}” meets that among "
        f"“{baselines}”. Differences are paired by seed; p: Student's t-test, corrected by Holm's "
        "method for the number of data sets. RI: (AUC - 0.5) / (the baseline's - 0.5) - 1. Bold: a gain on a "
        "slice above a gain overall. Bootstrap: in how many seeds the 95 % interval of the difference over "
        "resampled users or rows lies above or below zero."
    )


def following(base: str) -> str:
    """How models that follow a log are trained and tested."""
    return (
        "Each log is cut into periods in time order, and a model is tested on the period after the newest "
        "one that it was trained on. Mean over the tested periods; ± is the standard deviation of that over "
        "seeds. All ways begin with the same first model, whose own test is left out. Differences are those "
        f"of AUC from “{base}”, paired by seed; p: Student's t-test, corrected by Holm's method for the "
        "number of ways. Rows and seconds are those of training one update, validation included, in the "
        "mean, on one core. The tested rows are not those of the other tables, so figures do not compare."
    )


def search(num_runs: int, seconds: float) -> str:
    """What the search was given."""
    return (
        f"AUC on valid of every setting, seed 0; the best, in bold, is taken for all seeds. {num_runs} runs "
        f"of {seconds / 3600:.1f} core hours in all, those in bold being seed 0 of the other tables."
    )
