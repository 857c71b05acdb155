"""What `hetegen` can do, in a line each. Imports nothing, so that asking for help needs nothing."""

RUN_VERBS = {
    "plan": "estimate memory, traffic and time of training on a cluster that need not be there",
    "prepare": "count and encode raw data into shards of integer ids",
    "pretrain": "generative pre-training by discrete diffusion",
    "finetune": "click training from the pre-trained model",
    "joint": "clicks and reconstruction in one stage",
    "scratch": "the baseline: click training of the same network from nothing",
    "incremental": "train over the periods of a log, each tested on the next",
    "evaluate": "AUC, LogLoss, GAUC, calibration and slices of a trained stage",
    "predict": "write the click probability of every row to Parquet",
    "export": "write a trained model as an artifact that scores without TorchRec",
    "report": "collect what a run directory holds into report.html",
    "demo": "pre-train, fine-tune, compare with from-scratch, report",
}
"""Verbs of a run, with `--config`; they need the whole stack."""

SCORING_VERBS = {
    "score": "write the click probability of every row of a file, by an artifact",
    "serve": "answer HTTP requests with click probabilities, by an artifact",
    "apply-delta": "bring an artifact to the state that a delta of it describes, at once",
}
"""Verbs of an artifact; they need torch, pyarrow and pydantic."""


def listed() -> str:
    """All verbs with their texts, a line each."""
    return "\n".join(f"  {name:12}{text}" for name, text in (RUN_VERBS | SCORING_VERBS).items())
