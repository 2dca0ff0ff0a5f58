"""Spans of packed documents and padding: `row_spans` from masks, positions and offsets."""

import torch

from hasten.ops.attention import row_spans


def spans_of(mask: list[int] | None, positions: list[int] | None, starts: list[int] | None = None) -> list[list[int]]:
    tokens = len(mask or positions or []) or (starts or [0])[-1]
    given = [None if x is None else torch.tensor([x]) for x in (mask, positions)]
    spans = row_spans(
        (1, tokens, torch.device("cpu")), *given, None if starts is None else torch.tensor(starts, dtype=torch.int32)
    )
    assert spans is not None and spans.dtype == torch.int32 and spans.shape == (1, tokens, 3)
    return spans[0].T.tolist()


def test_spans() -> None:
    """first, last, clear of each token."""
    assert row_spans((1, 3, torch.device("cpu"))) is None
    assert spans_of(None, [0, 1, 2, 3]) == [[0, 0, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]]
    assert spans_of(None, [0, 1, 0, 0, 1, 2]) == [[0, 0, 2, 3, 3, 3], [1, 1, 2, 5, 5, 5], [0, 0, 2, 3, 3, 3]]
    assert spans_of(None, [5, 6, 9, 10])[:2] == [
        [0, 0, 2, 2],
        [1, 1, 3, 3],
    ]  # transformers: a position that is not the last one plus one
    assert spans_of(None, None, [0, 2, 3, 6]) == spans_of(None, [0, 1, 0, 0, 1, 2])
    assert spans_of([0, 0, 1, 1], None) == [[2, 2, 2, 2], [-1, -1, 3, 3], [2, 2, 2, 2]]
    assert spans_of([1, 1, 0, 0], None) == [[0, 0, 0, 0], [3, 3, -1, -1], [0, 0, 3, 4]]
    for positions in ([0, 0, 0, 1, 2], [1, 1, 0, 1, 2]):  # both ways in which generate counts padding
        assert spans_of([0, 0, 1, 1, 1], positions) == [[2, 2, 2, 2, 2], [-1, -1, 4, 4, 4], [2, 2, 2, 2, 2]]
    for positions in ([0, 1, 1, 2, 3], [0, 1, 2, 3, 4]):  # padding between tokens starts no document
        assert spans_of([1, 1, 0, 1, 1], positions) == [[0, 0, 0, 0, 0], [4, 4, -1, 4, 4], [0, 0, 3, 3, 3]]
    assert spans_of([1, 1, 1, 1, 0], [0, 1, 0, 1, 0]) == [[0, 0, 2, 2, 2], [1, 1, 4, 4, -1], [0, 0, 2, 2, 5]]
    assert spans_of([0, 0, 0], None) == [[0, 0, 0], [-1, -1, -1], [1, 2, 3]]
