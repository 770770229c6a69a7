"""Stop texts are found at the token that completes them, though only a tail is decoded."""

from __future__ import annotations

import random

from spin.alignment.generation.transformers.stop_texts import StopTextWatcher


def first_end(ids, texts, decode):
    """Where a response ends by the definition: the whole text is decoded after every token."""
    return next((n for n in range(1, len(ids) + 1) if any(text in decode(ids[:n]) for text in texts)), None)


def watched_end(ids, texts, decode):
    watcher = StopTextWatcher(texts, decode)
    return next((n for n in range(1, len(ids) + 1) if watcher.completed(ids[:n])), None)


def byte_decode(ids):
    """One byte for each token, 256 and above are special and have no text, a leading space is stripped."""
    text = bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")
    return text.removeprefix(" ")


def test_every_response_ends_where_the_whole_text_says():
    texts, ended = ("ab c", "ü\n", "caba"), set()
    for seed in range(300):
        rng = random.Random(seed)
        alphabet = [*"abc  \nü".encode(), 300]
        ids = [rng.choice(alphabet) for _ in range(rng.choice([5, 60, 400]))]
        expected = first_end(ids, texts, byte_decode)
        assert watched_end(ids, texts, byte_decode) == expected
        ended.add(expected)
    assert None in ended and len(ended) > 20


def test_a_stop_text_across_tokens_and_inside_a_long_one():
    pieces = ["He", "llo", " wor", "ld END of", "x" * 50 + "STOP" + "y" * 50]

    def decode(ids):
        return "".join(pieces[token] for token in ids)

    assert watched_end([0, 1, 2, 3, 4], ("o world",), decode) == 4
    assert watched_end([0] * 90 + [4, 0], ("STOP",), decode) == 91
    assert watched_end([0, 1, 2, 3], ("STOP",), decode) is None


def test_only_a_short_tail_is_decoded():
    lengths = []

    def decode(ids):
        lengths.append(len(ids))
        return "a" * len(ids)

    assert watched_end([7] * 2000, ("stop",), decode) is None
    assert max(lengths) < 100
