"The static site and the README, both made from the committed notebooks: `python tools/docs.py`."
