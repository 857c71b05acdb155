"""A run directory as training leaves it, with made-up numbers."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from hetegen_rec.config.run import EvaluationConfig
from hetegen_rec.evaluation.gather import evaluate_predictions
from hetegen_rec.evaluation.predictions import Predictions
from hetegen_rec.evaluation.results import write_evaluation

# Field -> chance level in nats, share of it that remains in the end.
FIELDS = {
    "user_id": (6.8, 0.62),
    "item_id": (6.9, 0.55),
    "history": (6.9, 0.48),
    "genres": (4.1, 0.31),
    "occupation": (3.0, 0.18),
    "age_bucket": (3.4, 0.22),
    "hour_of_day": (3.2, 0.97),
    "item_year": (4.0, 0.12),
}
QUALITY = {"pretrain": 1.5, "finetune": 0.9, "joint": 1.0, "scratch": 1.2}


def write_run(run_dir, stages=("pretrain", "finetune", "scratch"), rows=1200, num_fields=None, steps=400):
    for stage in stages:
        write_stage(run_dir / stage, stage, rows, num_fields, steps)


def write_stage(directory, stage, rows, num_fields, steps):
    directory.mkdir(parents=True)
    events = list(train_events(stage, num_fields, steps)) + list(evaluation_events(stage, steps))
    text = "".join(json.dumps(event) + "\n" for event in sorted(events, key=lambda event: event["step"]))
    (directory / "log.jsonl").write_text(text)
    (directory / "config.yaml").write_text(yaml.safe_dump(config(), sort_keys=False))
    splits = write_predictions(directory, stage, rows) if stage != "pretrain" else {}
    evaluation = {"run": "movielens", "stage": stage, "checkpoint": "step-400", "step": 400, "splits": splits}
    if stage in ("pretrain", "joint"):
        evaluation["reconstruction"] = {"valid": reconstruction(fields_of(num_fields))}
    write_evaluation(directory, evaluation)


def fields_of(num_fields):
    if num_fields is None:
        return FIELDS
    return {f"categorical_feature_{i}": (3.0 + i % 5, 0.1 + 0.85 * i / num_fields) for i in range(num_fields)}


def train_events(stage, num_fields, steps):
    rng = np.random.default_rng(len(stage))
    generative = stage in ("pretrain", "joint")
    for step in range(0, steps + 1, max(steps // 40, 1)):
        progress = step / steps
        loss = 0.69 - 0.12 * (1 - math.exp(-5 * progress)) + 0.012 * rng.normal()
        event = {
            "event": "train",
            "step": step,
            "epoch": 3 * progress,
            "rows": 1024 * step,
            "seconds": 0.2 * step,
            "samples_per_second": 5000 + 300 * rng.normal(),
            "loss": loss,
            "terms": {("label" if stage == "pretrain" else "click"): loss},
            "learning_rate": {"tables": 0.05, "dense": 1e-3},
        }
        if generative:
            event["fields"] = field_events(fields_of(num_fields), progress, rng)
            event["terms"]["generative"] = float(np.mean([f["relative"] for f in event["fields"].values()]))
        yield event


def field_events(fields, progress, rng):
    relative = {}
    for name, (_, rest) in fields.items():
        speed = 3 + 4 * (1 - rest)
        relative[name] = rest + (1 - rest) * math.exp(-speed * progress) + 0.012 * rng.normal()
    mean = np.mean(list(relative.values()))
    return {
        name: {
            "loss": r * fields[name][0],
            "relative": r,
            "difficulty": math.log(max(r, 0.05)) * (1 - math.exp(-12 * progress)),
            "weight": r / mean,
            "gradient_share": fields[name][0] / sum(chance for chance, _ in fields.values()),
            "label_cosine": 0.5 - r,
        }
        for name, r in relative.items()
    }


def evaluation_events(stage, steps):
    if stage == "pretrain":
        return
    for index, auc in enumerate([0.70, 0.745, 0.752, 0.757, 0.755, 0.751]):
        value = auc + 0.02 * (1.2 - QUALITY[stage])
        epoch = 0.5 * (index + 1)
        yield {
            "event": "evaluation",
            "step": int(steps * epoch / 3),
            "epoch": epoch,
            "split": "valid",
            "auc": value,
            "log_loss": 1.32 - value,
        }


def reconstruction(fields):
    return {name: reconstructed(chance, rest) for name, (chance, rest) in fields.items()}


def reconstructed(chance, rest):
    levels = [{"from": t / 4, "to": (t + 1) / 4, "targets": 100 * t + 50} for t in range(4)]
    return {
        "targets": 800,
        "among": "candidates" if chance > 6 else "vocabulary",
        "cross_entropy": rest * chance,
        "chance": chance,
        "baseline": 0.95 * chance,
        "relative": rest,
        "top_1": 1 - rest,
        "top_10": 1 - rest**2,
        "levels": [{**level, "cross_entropy": rest * chance * (0.8 + level["from"] / 3)} for level in levels],
    }


def write_predictions(directory, stage, rows):
    splits, temperature = {}, None
    for seed, split in enumerate(("valid", "test")):
        predictions, columns = score(stage, rows, seed)
        splits[split] = evaluate_predictions(predictions, None, EvaluationConfig(), 12, temperature)
        temperature = splits[split]["temperature"]
        target = directory / "predictions" / split
        target.mkdir(parents=True)
        pq.write_table(pa.table(columns), target / "part-0.parquet")
    return splits


def score(stage, rows, seed):
    rng = np.random.default_rng(seed)
    truth, users, item_rows = rng.normal(size=rows), rng.integers(1, 300, rows), rng.integers(0, 60, rows)
    labels = (rng.random(rows) < 1 / (1 + np.exp(1.2 - 1.4 * truth))).astype(np.int64)
    user_rows = np.where(users % 5 == 0, 0, users % 14)
    noise = QUALITY[stage] * (1 + 0.8 * (user_rows < 6) * (stage == "scratch"))
    logits = 1.5 * truth - 1.1 + noise * np.random.default_rng(9).normal(size=rows)
    probabilities = 1 / (1 + np.exp(-logits))
    predictions = Predictions()
    context = {"user_key": users, "user_rows": user_rows, "item_rows": item_rows}
    predictions.add(probabilities, labels, np.arange(rows), context)
    columns = {"row_id": np.arange(rows), "probability": probabilities, "label": labels, "user_key": users}
    return predictions, columns


def config():
    kinds = {"history": "sequence", "genres": "multi_valued", "age_bucket": "numeric"}
    fields = [
        {
            "name": name,
            "kind": kinds.get(name, "id" if name.endswith("_id") else "categorical"),
            "vocabulary": None if name == "history" else ("buckets" if name == "age_bucket" else "vocab"),
            "min_count": 1,
            "num_buckets": 32,
            "table": "item_id" if name == "history" else None,
            "max_length": 20,
            "reconstruct": True,
        }
        for name in FIELDS
    ]
    return {
        "name": "movielens-100k",
        "seed": 0,
        "features": {"label": "label", "user": "user_id", "item": "item_id", "fields": fields},
        "model": {
            "dim": 32,
            "denoiser": {"num_layers": 2, "attention": {"guidance": "residual"}},
            "balance": {"form": "difficulty"},
            "ctr": {"head": "mlp"},
        },
        "train": {"batch_size": 1024, "table_optimizer": "rowwise_adagrad"},
    }
