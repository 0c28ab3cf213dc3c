"""The paper's claims, tested on flagworld; `experiments/run_all.py` runs them."""
