"""Optuna studies over attentions, models, precisions and schedules."""
