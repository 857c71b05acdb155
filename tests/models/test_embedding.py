"""From looked-up rows to [B, T, D] in schema order."""

import pytest
import torch
from small_log import (
    DIM,
    HISTORY,
    NUM_VALUES,
    SCHEMA,
    TOKENS,
    Log,
    column,
    make_model,
    model_config,
    tables_of,
)
from torchrec import KeyedTensor

from hetegen_rec.config.schema import Schema
from hetegen_rec.models.embedding import TableShape, TokenAssembly, build_tables, table_shapes

LOG = Log(32)
NARROW = 4


def schema_with_dims():
    described = SCHEMA.model_dump(mode="json")
    for field in described["fields"]:
        if field["name"] in ("item", "genres"):
            field["dim"] = NARROW
    return Schema.model_validate(described)


def reference_rows(model, batch):
    """[B][T] the looked-up vector of every token, pooled by hand."""
    tables = tables_of(model)
    bags = LOG.table["genres"].to_pylist()
    rows = []
    for b in range(batch.num_rows):
        row = []
        for t, token in enumerate(SCHEMA.tokens):
            weight = tables[SCHEMA.field(token.field).table_name]
            index = int(batch.ids[b, t])
            if token.field == "genres":
                row.append(torch.stack([weight[i] for i in bags[b]]).mean(0))
            else:
                row.append(weight[index] if index >= 0 else torch.zeros(weight.shape[1]))
        rows.append(row)
    return rows


@torch.no_grad()
def test_tokens_stand_in_schema_order_though_tables_interleave():
    model, batch = make_model(LOG, "pretrain"), LOG.batch()
    assembly = model.network.assembly
    assert assembly.in_schema_order  # tables of one width are one block
    tokens, norms = assembly(model.ebc(batch.kjt))
    expected = torch.stack([torch.stack(row) for row in reference_rows(model, batch)])
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(norms, expected.square().sum(-1))


@torch.no_grad()
def test_the_order_in_which_a_plan_returns_keys_does_not_matter():
    model, batch = make_model(LOG, "pretrain"), LOG.batch()
    looked_up = model.ebc(batch.kjt)
    keys = list(reversed(looked_up.keys()))
    values = torch.cat([looked_up[key] for key in keys], dim=1)
    shuffled = KeyedTensor(keys, [DIM] * len(keys), values)
    for one, other in zip(model.network.assembly(looked_up), model.network.assembly(shuffled), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_tables_of_another_width_are_projected_and_their_norms_are_of_the_rows():
    schema = schema_with_dims()
    model, batch = make_model(LOG, "pretrain", schema=schema), LOG.batch()
    assert not model.network.assembly.in_schema_order
    tokens, norms = model.network.assembly(model.ebc(batch.kjt))
    assert tokens.shape == (32, len(TOKENS), DIM)
    rows = reference_rows(model, batch)
    for key in TOKENS:
        place = column(key)
        looked_up = torch.stack([row[place] for row in rows])
        projected = key.startswith(("item", "history", "genres"))
        assert looked_up.shape[1] == (NARROW if projected else DIM)
        torch.testing.assert_close(norms[:, place], looked_up.square().sum(-1))
        if not projected:
            torch.testing.assert_close(tokens[:, place], looked_up)
    history, item = tokens[:, HISTORY.start], tokens[:, column("item")]
    same = LOG.batch().ids
    rows_of_both = [
        (a, b) for a in range(32) for b in range(32) if same[a, HISTORY.start] == same[b, column("item")]
    ]
    assert rows_of_both
    for a, b in rows_of_both:
        torch.testing.assert_close(history[a], item[b])


def test_tables_hold_reserved_rows_and_are_on_meta():
    shapes = table_shapes(SCHEMA, LOG.statistics, DIM)
    assert {shape.name: shape.num_rows for shape in shapes} == {
        name: size + 2 for name, size in NUM_VALUES.items()
    }
    tables = build_tables(SCHEMA, shapes)
    assert all(parameter.is_meta for parameter in tables.parameters())
    by_name = {config.name: config.feature_names for config in tables.embedding_bag_configs()}
    assert by_name["item"] == [*TOKENS[HISTORY], "item"]


def test_the_model_width_is_the_default_of_every_table():
    model = make_model(LOG, "pretrain", model_config(dim=16))
    assert {weight.shape[1] for weight in tables_of(model).values()} == {16}
    assert len(list(model.network.assembly.projections.parameters())) == 0


@pytest.mark.parametrize("name", ["type", "items", "values", "training"])
def test_a_field_named_like_a_part_of_torch_modules_is_refused_before_anything_is_built(name):
    with pytest.raises(ValueError, match=f"`name: {name}_`, and keep `column: {name}`"):
        Schema.model_validate({"label": "click", "fields": [{"name": name, "kind": "categorical"}]})
    renamed = {"name": f"{name}_", "column": name, "kind": "categorical"}
    schema = Schema.model_validate({"label": "click", "fields": [renamed]})
    build_tables(schema, [TableShape(f"{name}_", 3, DIM)])
    assert TokenAssembly(schema, [TableShape(f"{name}_", 3, NARROW)], DIM).projections
