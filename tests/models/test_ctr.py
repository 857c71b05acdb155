"""Click heads: pooling over present items, the first-order term, the label element."""

import pytest
import torch
from small_log import DIM, HISTORY, SCHEMA, TOKENS, Log, column

from hetegen_rec.config.run import CTRConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.models.ctr import FieldPooling, LabelHead, MLPHead

NUM_ROWS = 16


def inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(NUM_ROWS, len(TOKENS), DIM, generator=generator)
    hidden = torch.randn(NUM_ROWS, len(TOKENS) + 1, DIM, generator=generator)
    return tokens, hidden, Log(NUM_ROWS).batch().ids >= 0


def mlp_head():
    torch.manual_seed(0)
    return MLPHead(SCHEMA, DIM, CTRConfig(hidden=(8,)))


def test_a_sequence_is_the_mean_of_its_present_items_and_other_fields_are_their_token():
    tokens, _, present = inputs()
    pooled = FieldPooling(SCHEMA)(tokens, present)
    names = list(SCHEMA.field_names)
    assert torch.equal(pooled[:, names.index("item")], tokens[:, column("item")])
    lengths = set()
    for row in range(NUM_ROWS):
        items = tokens[row, HISTORY][present[row, HISTORY]]
        lengths.add(len(items))
        expected = items.mean(0) if len(items) else torch.zeros(DIM)
        torch.testing.assert_close(pooled[row, names.index("history")], expected)
    assert lengths == {0, 1, 2, 3}


@torch.no_grad()
def test_what_stands_in_padding_does_not_change_a_score():
    tokens, hidden, present = inputs()
    head = mlp_head()
    before = head(tokens, hidden, present)
    tokens[~present] = 100.0
    hidden[:, :-1][~present] = -100.0
    torch.testing.assert_close(head(tokens, hidden, present), before)


def test_a_sequence_of_one_item_is_pooled_like_longer_ones():
    schema = Schema.model_validate(
        {
            "label": "click",
            "fields": [
                {"name": "item", "kind": "id"},
                {"name": "last", "kind": "sequence", "table": "item", "max_length": 1},
            ],
        }
    )
    tokens = torch.ones(2, 2, DIM)
    pooled = FieldPooling(schema)(tokens, torch.tensor([[True, True], [True, False]]))
    assert pooled[:, 1].tolist() == [[1.0] * DIM, [0.0] * DIM]


@torch.no_grad()
def test_the_first_order_term_is_linear_in_the_looked_up_rows():
    head = mlp_head()
    for parameter in head.mlp.parameters():
        parameter.zero_()
    first, hidden, present = inputs()
    second = inputs(seed=2)[0]

    def score(tokens):
        return head(tokens, hidden, present) - head.first_order.bias

    torch.testing.assert_close(score(first + 2 * second), score(first) + 2 * score(second))
    assert score(first).abs().min() > 0


@pytest.mark.parametrize("part", ["rows", "hidden", "label"])
def test_the_mlp_head_sees_rows_hidden_vectors_and_the_label_element(part):
    tokens, hidden, _ = inputs()
    present = torch.ones(tokens.shape[:2], dtype=torch.bool)
    head = mlp_head()
    torch.nn.init.zeros_(head.first_order.weight)
    tokens.requires_grad_()
    hidden.requires_grad_()
    head(tokens, hidden, present).sum().backward()
    gradient = {"rows": tokens.grad, "hidden": hidden.grad[:, :-1], "label": hidden.grad[:, -1:]}[part]
    assert (gradient.abs().amax((0, 2)) > 0).all()


def test_the_label_head_is_the_log_odds_of_its_softmax():
    _, hidden, _ = inputs()
    head = LabelHead(DIM)
    p = head.classes(hidden[:, -1]).softmax(-1)[:, 1]
    torch.testing.assert_close(head(hidden).sigmoid(), p)
