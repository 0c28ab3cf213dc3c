"""Numbers with intervals, pictures and reports about trained models."""
