"""Cross-lingual alignment: how differently a layer routes the same sentence in two languages.

``q`` is the mean router distribution over the tokens of a sentence; the divergence of two sentences that say
the same is normalised by its own maximum, ``D = JSD(q_a, q_b) / (log N - (H(q_a) + H(q_b)) / 2)``, and
averaged over sentences. D is 0 iff both are equal and 1 only if they average to the uniform distribution; for
two uniform ones it is 0/0, defined as 0. "Multilingual Routing in Mixture-of-Experts" (arXiv 2510.04694);
expected is a U over depth: languages share the middle layers. Only translations may be compared. The null is
one sentence against itself: its odd tokens against its even ones.

Shape suffixes: R rows, P sentences (pairs), N experts, S draws.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array
from gangline.traces.statistics.spread import entropy, interval, jensen_shannon, resampled


@dataclass(frozen=True)
class Alignment:
    """Two languages in one layer.

    Attributes:
        divergence: D, averaged over sentences. low, high: 95%, bootstrap over sentences.
        within: the same between the halves of a sentence of one language, mean of both languages.
        sentences: pairs compared.
    """

    divergence: float
    low: float
    high: float
    within: float
    sentences: int


def normalised_divergence(p_N: Array, q_N: Array) -> Array:
    """Return D of distributions along the last axis."""
    room = np.log(p_N.shape[-1]) - (entropy(p_N) + entropy(q_N)) / 2
    return np.asarray(np.where(room > 1e-12, jensen_shannon(p_N, q_N) / np.maximum(room, 1e-12), 0.0))


def alignment(
    score_RN: Array, sentence_R: Array, second_R: Array, rng: Generator, draws: int = 1000
) -> Alignment:
    """Compare two languages in one layer.

    Args:
        score_RN: router distribution of each token (rows sum to 1), or the experts it used over their number.
        sentence_R: which sentence it belongs to, numbered from 0; every sentence has at least two tokens in
            both languages.
        second_R: False in the first language, True in the second.
        rng: for the interval.
        draws: of the bootstrap.
    """
    sentences = int(sentence_R.max()) + 1
    whole = [_means(score_RN[rows], sentence_R[rows], sentences) for rows in (~second_R, second_R)]
    value_P = normalised_divergence(*whole)
    within = [_halves(score_RN[rows], sentence_R[rows], sentences) for rows in (~second_R, second_R)]
    low, high = interval(resampled(sentences, draws, rng) @ value_P / sentences)
    return Alignment(float(value_P.mean()), low, high, float(np.mean(within)), sentences)


def _means(score_RN: Array, sentence_R: Array, sentences: int) -> Array:
    sums_PN = np.zeros((sentences, score_RN.shape[1]))
    np.add.at(sums_PN, sentence_R, score_RN)
    return np.asarray(sums_PN / np.maximum(sums_PN.sum(axis=1, keepdims=True), 1e-20))


def _halves(score_RN: Array, sentence_R: Array, sentences: int) -> float:
    """D between every other token of each sentence and the rest of it."""
    order = np.argsort(sentence_R, kind="stable")
    begins = np.searchsorted(sentence_R[order], np.arange(sentences))
    place_R = np.empty(len(order), dtype=np.int64)
    place_R[order] = np.arange(len(order)) - begins[sentence_R[order]]
    odd = place_R % 2 == 1
    parts = [_means(score_RN[rows], sentence_R[rows], sentences) for rows in (odd, ~odd)]
    return float(normalised_divergence(*parts).mean())
