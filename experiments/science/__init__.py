"""The paper's claims, measured on flagworld; `experiments/run_all.py` runs them."""
