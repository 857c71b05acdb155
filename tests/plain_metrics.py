"""What `hetegen_rec.evaluation.gather` is held against: the same metrics of rows that lie in one array."""

from hetegen_rec.evaluation import metrics
from hetegen_rec.evaluation.counts import ScoreCounts, is_click


def log_loss(probabilities, labels):
    """Mean cross-entropy in nats; None without rows."""
    counts = ScoreCounts.of_rows(probabilities, labels)
    return metrics.ratio(counts.log_loss_sum(), counts.num_rows)


def normalized_entropy(probabilities, labels):
    """Log loss relative to that of always predicting the click rate of these rows (He et al. 2014).

    Below 1 is better than the constant; None with one class.
    """
    loss = log_loss(probabilities, labels)
    return metrics.normalize_entropy(loss, int(is_click(labels).sum()), len(labels))


def gauc(scores, labels, user_keys):
    """AUC within each user who has both classes, averaged with weight by the user's rows."""
    return metrics.average_user_auc([metrics.user_auc_sums(scores, labels, user_keys)])


def calibration(probabilities, labels):
    """Mean probability over click rate: above 1 predicts too many clicks. None without a click."""
    counts = ScoreCounts.of_rows(probabilities, labels)
    return metrics.ratio(counts.score_sum(), counts.num_positives)


def calibration_bins(probabilities, labels, num_bins):
    """Mean probability against click rate in bins of about equally many rows; empty bins left out."""
    counts = ScoreCounts.of_rows(probabilities, labels)
    return metrics.bins_of_sums(counts.bin_sums(num_bins, 0, counts.num_rows))


def roc_curve(scores, labels, max_points=metrics.MAX_ROC_POINTS):
    """The ROC curve, thinned evenly along its length to `max_points`; None with one class."""
    counts = ScoreCounts.of_rows(scores, labels)
    totals = counts.num_positives, counts.num_negatives
    if not all(totals):
        return None
    _, clicks, others = counts.roc_points(metrics.roc_cells(max_points), (0, 0), totals)
    return metrics.roc_of_points(clicks, others, totals)


def fit_temperature(probabilities, labels):
    """The temperature that minimises the log loss of these rows (Guo et al. 2017).

    Above 1 means overconfident probabilities. Lies within 0.01 and 100; None with one class.
    """
    counts = ScoreCounts.of_rows(probabilities, labels)
    if not counts.num_positives or not counts.num_negatives:
        return None
    return metrics.solve_temperature(lambda inverse: metrics.temperature_slope(counts, inverse))
