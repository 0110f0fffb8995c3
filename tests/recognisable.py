"""Are sampled digits recognisable, varied, and new?  python tests/recognisable.py samples.npy

Protocol. The 1,797 real digits (8×8, in [-1, 1]) are split in two fixed halves. A classifier (RBF support-vector
machine, C = 10, temperature-calibrated by 5-fold cross-validation) is trained on the first half alone.
1. Confidence: the share of samples with a class probability of at least 0.8 is at least 0.85 of the share among the
   real digits of the second half, which the classifier has not seen either.
2. Variety: all ten digits are present, and none makes up more than 25 % of the samples.
3. Novelty: the mean Euclidean distance from a sample to its nearest real digit (of all, as all were trained on) is at
   least 0.8 of the mean distance from a digit of the second half to its nearest in the first.
"""
import sys

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.svm import SVC


def halves():
    "The real digits as rows in [-1, 1], with labels, in two fixed halves."
    digits = load_digits()
    x, order = digits.data / 8 - 1, np.random.default_rng(0).permutation(len(digits.data))
    first, second = order[:len(x) // 2], order[len(x) // 2:]
    return (x[first], digits.target[first]), (x[second], digits.target[second])


def measure(samples):
    "The figures of the protocol, for samples (N, 8, 8, 1) in [-1, 1]."
    (x1, y1), (x2, y2) = halves()
    samples = np.asarray(samples, np.float64).reshape(len(samples), -1)
    if samples.shape[1] != 64: raise ValueError(f"samples must be 8×8 pixels of one channel, got {samples.shape[1]} numbers each")
    classifier = CalibratedClassifierCV(SVC(C=10), method="temperature", cv=5).fit(x1, y1)
    p, p2 = classifier.predict_proba(samples), classifier.predict_proba(x2)
    nearest = lambda a, b: float(pairwise_distances_argmin_min(a, b)[1].mean())
    counts = np.bincount(p.argmax(1), minlength=10)
    return {"accuracy on the second half": float((p2.argmax(1) == y2).mean()),
            "confident, real": float((p2.max(1) >= 0.8).mean()), "confident, sampled": float((p.max(1) >= 0.8).mean()),
            "counts of 0 to 9": counts.tolist(), "largest share": float(counts.max() / len(samples)),
            "distance, real": nearest(x2, x1), "distance, sampled": nearest(samples, np.concatenate([x1, x2]))}


def verdicts(m):
    "What the protocol asks, each as (sentence, held)."
    confidence, distance = m["confident, sampled"] / m["confident, real"], m["distance, sampled"] / m["distance, real"]
    return [(f"confidence is {confidence:.3f} of the real digits' (at least 0.85)", confidence >= 0.85),
            (f"{np.count_nonzero(m['counts of 0 to 9'])} of ten digits are present (all)", min(m["counts of 0 to 9"]) > 0),
            (f"the commonest makes up {m['largest share']:.1%} (at most 25 %)", m["largest share"] <= 0.25),
            (f"distance to the nearest real digit is {distance:.3f} of that between real ones (at least 0.8)", distance >= 0.8)]


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    figures = measure(np.load(sys.argv[1], allow_pickle=False))
    print(__doc__.split("\n\n", 1)[1])
    for name, value in figures.items(): print(f"{name:>28}: {value if isinstance(value, list) else round(value, 3)}")
    results = verdicts(figures)
    for sentence, held in results: print("passed:" if held else "FAILED:", sentence)
    sys.exit(not all(held for _, held in results))
