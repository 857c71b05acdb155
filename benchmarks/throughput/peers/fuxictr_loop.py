"""Training steps of FuxiCTR, a turn for every line that comes in. Runs in FuxiCTR's own environment.

    python fuxictr_loop.py SETTINGS.json

Says `ready` when it can begin; then answers each line of its input with one of JSON: the seconds of the steps
of a turn, and the processor's seconds a step. Models are put together from FuxiCTR's own layers, and trained
by its own `train_step`: Adam on whole tables, and clipping by the norm of all gradients, as its examples do.
"""

import json
import sys
import time
from collections import OrderedDict
from typing import Any

import pyarrow.parquet as pq
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import CrossNetV2, FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

Batch = dict[str, Tensor]


class DeepFM(BaseModel):
    """FuxiCTR's factorization machine and hidden layers on the same embeddings."""

    def __init__(self, features: FeatureMap, settings: dict[str, Any]) -> None:
        super().__init__(features, **_options(settings))
        self.embedding_layer = FeatureEmbedding(features, settings["dim"])
        self.fm = FactorizationMachine(features)
        self.mlp = _hidden_layers(features, settings, output_dim=1)
        _compile(self, settings)

    def forward(self, inputs: Batch) -> dict[str, Tensor]:
        """ids -> probability of a click."""
        ids = self.get_inputs(inputs)
        vectors = self.embedding_layer(ids)
        logit = self.fm(ids, vectors) + self.mlp(vectors.flatten(start_dim=1))
        return {"y_pred": self.output_activation(logit)}


class DCNV2(BaseModel):
    """FuxiCTR's cross network with full matrices beside hidden layers."""

    def __init__(self, features: FeatureMap, settings: dict[str, Any]) -> None:
        super().__init__(features, **_options(settings))
        self.embedding_layer = FeatureEmbedding(features, settings["dim"])
        width = features.sum_emb_out_dim()
        self.cross = CrossNetV2(width, settings["num_layers"])
        self.mlp = _hidden_layers(features, settings, output_dim=None)
        self.output = nn.Linear(width + settings["hidden"][-1], 1)
        _compile(self, settings)

    def forward(self, inputs: Batch) -> dict[str, Tensor]:
        """ids -> probability of a click."""
        row = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        logit = self.output(torch.cat([self.cross(row), self.mlp(row)], dim=-1))
        return {"y_pred": self.output_activation(logit)}


MODELS: dict[str, type[BaseModel]] = {"deepfm": DeepFM, "dcnv2": DCNV2}


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    return {"gpu": -1, "verbose": 0, "model_root": settings["directory"], "metrics": ["AUC"]}


def _hidden_layers(features: FeatureMap, settings: dict[str, Any], output_dim: int | None) -> nn.Module:
    layers: nn.Module = MLP_Block(
        input_dim=features.sum_emb_out_dim(),
        output_dim=output_dim,
        hidden_units=settings["hidden"],
        hidden_activations="ReLU",
        output_activation=None,
    )
    return layers


def _compile(model: BaseModel, settings: dict[str, Any]) -> None:
    model.compile("adam", "binary_crossentropy", settings["dense_lr"])
    model.reset_parameters()
    model.model_to_device()
    model._max_gradient_norm = settings["max_grad_norm"]  # `fit` sets it


def _features(settings: dict[str, Any]) -> FeatureMap:
    features = FeatureMap("benchmark", settings["directory"])
    spec = {"type": "categorical", "source": "", "vocab_size": settings["table_rows"], "padding_idx": 0}
    features.features = OrderedDict((name, dict(spec)) for name in settings["fields"])
    features.labels = [settings["label"]]
    features.default_emb_dim = settings["dim"]
    features.num_fields = features.get_num_fields()
    return features


def _batches(settings: dict[str, Any]) -> list[Batch]:
    """As many as a turn has, in memory; the file's rows again and again if they are fewer."""
    size = settings["batch_size"]
    table = pq.read_table(settings["rows"], columns=[*settings["fields"], settings["label"]])
    columns = {name: torch.from_numpy(table[name].to_numpy().copy()) for name in table.column_names}
    starts = range(0, table.num_rows - size + 1, size)
    whole = [{name: values[at : at + size] for name, values in columns.items()} for at in starts]
    return [whole[step % len(whole)] for step in range(settings["steps"])]


def main() -> None:
    """Makes the model and the batches, then takes turns until the input ends."""
    with open(sys.argv[1], encoding="utf-8") as file:
        settings = json.load(file)
    torch.manual_seed(0)
    torch.set_num_threads(settings["threads"])
    model = MODELS[settings["model"]](_features(settings), settings)
    batches = _batches(settings)
    model.train()
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds, cpu = [], time.process_time()
        for batch in batches:
            start = time.perf_counter()
            model.train_step(batch)
            seconds.append(time.perf_counter() - start)
        cpu = (time.process_time() - cpu) / len(batches)
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu}), flush=True)


if __name__ == "__main__":
    main()
