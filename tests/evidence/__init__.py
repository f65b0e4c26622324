"""What forecasts said and what was measured afterwards, on two models: `make evidence`. What it finds stands in
results.json, and the page nbs/forecast_evidence.ipynb is made from that."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
