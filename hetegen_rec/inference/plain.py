"""One pass a row."""

from collections.abc import Mapping

from hetegen_rec.inference.strategy import Network, Rows, Scored, every_row


class Plain:
    """Scores a row as training validates it."""

    def __init__(self, network: Network) -> None:
        self._network = network

    @property
    def settings(self) -> Mapping[str, float]:
        """Nothing."""
        return {}

    def score(self, rows: Rows) -> Scored:
        """The click probability of the looked-up rows."""
        logits = self._network.score(rows.tokens, rows.present)
        return Scored(logits.sigmoid(), every_row(rows, 1.0))
