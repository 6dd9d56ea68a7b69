"""Tasks of the suite `pretrained` that read a text: its perplexity, as put in and after training.

They draw no examples; danon/evaluation/pretrained_evaluator.py measures them.
"""

from __future__ import annotations

from danon.runs.task_registry import TaskRecord, register

__all__: list[str] = []

for _name, _title in (
    ("text", "perplexity of the second half of a text"),
    ("adapted", "perplexity of that text after a short training on others"),
):
    register(TaskRecord("pretrained", _name, _title))
