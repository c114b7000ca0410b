"""Parts: the rows of a report by what they are about, and a style for each scheme, the same all over its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowbit_tools.report_page_charts import legend
from lowbit_tools.report_page_tables import Row

KL_AXIS = "KL to the exact sum (nats a token), log scale"
KINDS = {"o_proj": "behind attention (o_proj)", "down_proj": "behind the feed-forward block (down_proj)"}


class Parts:
    """Made once for a page."""

    def __init__(self, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
        self.facts = facts
        self._rows = rows
        names = dict.fromkeys(row["scheme"] for row in rows if row.get("scheme") not in (None, "exact"))
        self.styles = {name: style for style, name in enumerate(names)}

    def of(self, part: str, **fields: object) -> list[Row]:
        """Rows of a part with these values."""
        return [
            row for row in self._rows if row["part"] == part and all(row[key] == value for key, value in fields.items())
        ]

    def shown(self, part: str) -> list[str]:
        """Schemes that a part has rows of, `exact` left out, which is 0 by definition."""
        found = {row["scheme"] for row in self.of(part)}
        return [name for name in self.styles if name in found]

    def legend(self, part: str) -> str:
        return legend([(name, self.styles[name]) for name in self.shown(part)])
