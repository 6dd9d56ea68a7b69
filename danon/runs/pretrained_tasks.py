"""What a pretrained model is asked, by the name of the task."""

from __future__ import annotations

__all__ = ["PRETRAINED"]

PRETRAINED = {
    "text": "perplexity of the second half of a text",
    "passkey": "numbers hidden in a text, asked for at its end",
    "adapted": "perplexity of that text after a short training on others",
    "lookup": "keys read anywhere before, by a small model that has learned to look them up",
}
