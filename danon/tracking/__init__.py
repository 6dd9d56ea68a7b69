"""MLflow: where runs, models and figures are recorded."""
