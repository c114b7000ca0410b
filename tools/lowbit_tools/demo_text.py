"""Demo text: English prose that every Python carries, for trying things out where nothing can be downloaded.

The text is that of the language reference (`pydoc_data.topics`). It differs a little between Python versions, so
numbers measured on it are comparable only within one: say the version with the number. For published numbers, bring
a text.
"""

from __future__ import annotations

import re
import textwrap
from pydoc_data import topics

_MARKUP = re.compile(r"::=|^[*=\-~^+|#\"]{3,}$|^\s*>>>", re.MULTILINE)
_BULLET = re.compile(r"^(?:\* |\d+\. )")


def demo_text() -> tuple[str, str]:
    """Two texts without a common paragraph: for calibration (about 3/4), for evaluation (about 1/4); the same every
    time.

    Whole topics go to one side or the other. Grammar, code, tables and headings are left out, lines are joined.
    """
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    for _name, text in sorted(topics.topics.items()):
        # Some topics repeat others (compound statements and each of them), hence the paragraphs already seen.
        paragraphs = [paragraph for paragraph in dict.fromkeys(_prose(text)) if paragraph not in seen]
        seen.update(paragraphs)
        side = int(sizes[1] * 3 < sizes[0])
        parts[side].extend(paragraphs)
        sizes[side] += sum(map(len, paragraphs))
    calibration, evaluation = ("\n\n".join(part) + "\n" for part in parts)
    return calibration, evaluation


def _prose(text: str) -> list[str]:
    """The paragraphs of a topic that are whole sentences, each on one line."""
    result = []
    for block in re.split(r"\n\s*\n", text):
        lines = textwrap.dedent(block).strip("\n").splitlines()
        if not lines or _MARKUP.search(block):
            continue
        bullet = _BULLET.match(lines[0])
        if not bullet and any(line.startswith(" ") for line in lines):
            continue  # signatures with their text, definition lists, code
        paragraph = " ".join(" ".join(lines).split())
        if bullet:
            paragraph = _BULLET.sub("", paragraph)
        paragraph = re.sub(r"(?<=\w)- (?=\w)", "-", paragraph)
        if len(paragraph.split()) >= 10 and paragraph[-1] in ".!?)" and re.match(r"[A-Z\"“*(]", paragraph):
            result.append(paragraph)
    return result
