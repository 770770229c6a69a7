"""A scorer for win rates that no arm trains on: how close a response is to the ground truth, in characters."""

from __future__ import annotations


def chrf(prompt: str, response: str, reference: str) -> float:
    """Return chrF (M. Popovic, WMT 2015) of the response against the ground truth: the F-score, with recall weighted three times,
    of character n-grams of up to six characters; from 0 to 1.
    """
    from nltk.translate.chrf_score import sentence_chrf

    return float(sentence_chrf(reference, response)) if response.strip() else 0.0
