"""Optuna studies over the settings of attentions and the schedules they run in."""
