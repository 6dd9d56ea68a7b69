"""Texts, tasks and pretrained models that attentions are measured with."""
