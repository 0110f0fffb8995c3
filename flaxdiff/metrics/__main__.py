"""`python -m flaxdiff.metrics DATASET --out FOLDER`: make a classifier whose features can be measured by."""
from .features import features_main

if __name__ == "__main__":
    features_main()
