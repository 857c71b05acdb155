"""The sentences of the report: what the numbers say, no more (forms: docs/method.md section 5.4)."""

from collections.abc import Mapping

from hetegen_rec.evaluation.results import BASE_STAGE, STAGE_TITLES, Comparison, strategy_note
from hetegen_rec.evaluation.run_record import RunRecord, StageRecord

STAGE_SENTENCES = {
    "pretrain": "After pre-training alone, the network",
    "finetune": "Fine-tuned after generative pre-training, the network",
    "joint": "Trained jointly on reconstruction and clicks, the network",
    "scratch": "Trained from scratch, the network",
}

ONE_SEED = (
    "One run with one seed: the interval resamples the users (or rows) of the split, so it covers their "
    "choice and not the choice of seed."
)
ROC = (
    "The further a curve bends to the upper left, the better clicks are ranked above non-clicks; the dashed "
    "diagonal is chance."
)
CALIBRATION = (
    "Bins of equally many rows. On the dashed line probabilities mean what they say; below it the stage "
    "promises more clicks than come."
)
RELATIVE_LOSS = (
    "Cross-entropy of the masked cells over that of guessing. A line that leaves 1 early is a field that its "
    "neighbours explain; one that stays is noise or still to be learnt."
)
BY_NOISE_LEVEL = (
    " The columns on the right are cross-entropies by noise level t, the share of the row that is masked: in "
    "the first of them the rest of the row is there to help, in the last hardly anything is."
)
VALID_AUC = "Each dot is one evaluation; the ring marks the best, whose weights a click stage ends with."
CLICK_LOSS = (
    "Thin lines: training; dots: log loss on valid. Dots that turn upward while the thin line falls show "
    "overfitting. In pre-training the label is reconstructed from a partly masked row."
)
GENERATIVE_LOSS = (
    "The balanced reconstruction loss. A line that still falls at the end says that more epochs of it would "
    "teach the network more about the rows; a flat one that they would not."
)

_COURSES = {
    "literal": "follows twice its cross-entropy",
    "uncertainty": "follows twice its cross-entropy",
    "informative": "follows its cross-entropy relative to a guess by frequency",
    "gradnorm": "settles where the field's weighted gradient is as large as the form wants it",
}
"""What log-difficulties do under forms of balancing that do not use the loss relative to chance."""
_WEIGHTS_FROM_ELSEWHERE = ("uniform", "progress", "aligned", "dwa")
_FREE_WEIGHTS = ("literal", "uncertainty")
"""Forms whose weights do not add up to the number of fields."""


def best_stage(record: RunRecord, split: str) -> str | None:
    """Which stage with an AUC on a split the headline is about: of ours the one that valid prefers."""
    defined = [name for name in record.stages if _auc(record, name, split) is not None]
    ours = [name for name in defined if name in ("finetune", "joint")]
    return max(ours or defined, key=lambda name: _auc(record, name, "valid") or 0.0, default=None)


def _auc(record: RunRecord, stage: str, split: str) -> float | None:
    return (record.stages[stage].result(split) or {}).get("auc")


def verdict(record: RunRecord, split: str, comparisons: Mapping[str, Comparison]) -> str:
    """One or two sentences that say how the run came out."""
    stage = best_stage(record, split)
    if stage is None:
        trained = " and ".join(STAGE_TITLES[name].lower() for name in record.stages)
        return f"Stages so far: {trained}. No stage has an AUC yet, so there is nothing to compare."
    result = record.stages[stage].result(split) or {}
    opening = (
        f"{STAGE_SENTENCES[stage]}{strategy_note(result)} reaches an AUC of {result['auc']:.4f} on {split}"
    )
    if stage not in comparisons:
        other = "other stage" if stage == BASE_STAGE else "from-scratch baseline"
        return f"{opening}. No {other} was evaluated yet to hold it against."
    base = strategy_note(record.stages[BASE_STAGE].result(split) or {})
    return f"{opening}, {_against_scratch(comparisons[stage], base)}"


def _against_scratch(comparison: Comparison, note: str) -> str:
    difference = comparison.auc_difference
    side = "above" if difference >= 0 else "below"
    text = f"{abs(difference):.4f} {side} the same network trained from scratch{note}"
    if comparison.relative_improvement is not None:
        text += f" (relative improvement {100 * comparison.relative_improvement:+.2f} %)"
    interval = comparison.interval
    if interval is None:
        return f"{text}. Without the evaluated predictions of both stages there is no confidence interval."
    bounds = f"95 % interval of the difference: {interval.low:+.4f} to {interval.high:+.4f}"
    if interval.excludes_zero:
        return f"{text}. {bounds}, so chance in the choice of users does not explain it."
    return f"{text}. {bounds}: it includes zero, so this run shows no clear difference."


def fields(stage: StageRecord) -> str:
    """What the plots of a generative stage are about."""
    form, guidance = _form(stage), _guidance(stage)
    if form in _WEIGHTS_FROM_ELSEWHERE:
        use = "The field's weight in the generative loss does not come from it."
    elif guidance == "none" or form == "uncertainty":
        use = "From it comes the field's weight in the generative loss."
    else:
        use = "From it come the field's weight in the generative loss and its gain in attention."
    known = f" Balancing here: {form}; attention guided at: {guidance}." if form and guidance else ""
    course = _COURSES.get(form, "follows its reconstruction loss relative to chance")
    return f"Every field has one learnable log-difficulty that {course}. {use}{known}"


def _form(stage: StageRecord) -> str:
    """The form of balancing; empty if the stage left no configuration."""
    model = stage.config.get("model") or {}
    return str((model.get("balance") or {}).get("form") or "")


def _guidance(stage: StageRecord) -> str:
    """Where difficulty guides attention; empty if the stage left no configuration."""
    denoiser = (stage.config.get("model") or {}).get("denoiser") or {}
    return str((denoiser.get("attention") or {}).get("guidance") or "")


def difficulty_caption(stage: StageRecord) -> str:
    """What to see in the plot of difficulties."""
    names = stage.field_names
    hardest, easiest = names[0], names[-1]
    last = {name: stage.field_series(name, "difficulty").last for name in (hardest, easiest)}
    num_grey = len(names) - 10
    grey = f"{num_grey} fields" if num_grey > 1 else "field"
    rest = f" Grey: the {grey} in between." if num_grey > 0 else ""
    course = (
        "; a field rises while its reconstruction is worse than guessing and falls as it beats that"
        if _form(stage) not in _COURSES
        else ""
    )
    return (
        f"All fields start at 0{course}. Hardest at the end: {hardest} ({last[hardest]:.2f}), easiest: "
        f"{easiest} ({last[easiest]:.2f}).{rest}"
    )


def weight_caption(stage: StageRecord) -> str:
    """What to see in the plot of weights."""
    final = {name: stage.field_series(name, "weight") for name in stage.field_names}
    shares = {name: one.last for name, one in final.items() if one}
    if not shares:
        return "Weights of the fields in the generative loss."
    heaviest = max(shares, key=lambda name: shares[name])
    share = shares[heaviest] / sum(shares.values())
    one = "the weight at the start" if _form(stage) in _FREE_WEIGHTS else "an even split"
    return (
        f"How much of the generative loss each field gets; 1 is {one}. "
        f"{heaviest} ends with the most: {shares[heaviest]:.2f}, which is {100 * share:.0f} % of the budget."
    )


def gradient_caption(stage: StageRecord) -> str:
    """What to see in the bars of gradient shares."""
    shares = stage.mean_gradient_shares
    if not shares:
        return "Shares of the gradient norm."
    largest = max(shares, key=lambda name: shares[name])
    return (
        "Norm of the gradient of each field's relative loss on the last weight that all fields share, before "
        f"weighting, as a share of their sum; mean over training. Dashed: an even share. {largest} has the "
        f"most: {100 * shares[largest]:.0f} %."
    )


def final_loss_caption(stage: StageRecord) -> str:
    """What to see in the bars of final losses."""
    final = [stage.field_series(name, "relative") for name in stage.field_names]
    learnt = sum(1 for one in final if one and one.last < 0.9)
    return (
        f"{learnt} of {len(final)} fields are reconstructed clearly better than chance (r below 0.9). A bar "
        "near the dashed line is a field that the rest of the row says little about."
    )


def slices_caption(split: str) -> str:
    """What to see in the slices."""
    return (
        f"Where on {split} a stage earns its AUC: users and items with few training rows against the "
        "well-known ones. Mind the number of clicks: a slice with few of them moves by chance."
    )
