import numpy as np
import pytest
from evaluation_fakes import VOCAB

from racm3_jax.evaluation.copying import compute_copy_sums, count_copied
from racm3_jax.types import TokenizedDocument, TokenizedSegment


def document(text, codes):
    image = VOCAB.image_tokens(np.array([codes]))[0]
    return TokenizedDocument(
        "d",
        (
            TokenizedSegment("text", np.array(text, np.int32)),
            TokenizedSegment("image", image),
        ),
    )


def test_the_diagram_of_the_module():
    mains = [document([7, 1, 3, 9], [1, 2, 3, 4]), document([5, 5], [1, 1, 1, 1])]
    found = [[document([7, 7, 3, 9, 2], [1, 2, 3, 4])], []]
    counts = count_copied(mains, found)
    assert counts.text_tokens.tolist() == [4, 2]
    assert counts.text_right.tolist() == [3, 0]
    assert counts.image_tokens.tolist() == [4, 4]
    assert counts.image_right.tolist() == [4, 0]
    assert counts.images.tolist() == [1, 1]
    sums = compute_copy_sums(counts._asdict(), VOCAB)
    miss = np.log(127) - np.log(0.5)
    np.testing.assert_allclose(
        sums.text_nats, [3 * np.log(2) + miss, 2 * miss], rtol=1e-12
    )
    np.testing.assert_allclose(sums.image_nats[0], 4 * np.log(2))


def test_all_or_nothing_copied():
    same = [document([7], [1, 2, 3, 4])]
    sums = compute_copy_sums(count_copied(same, [same])._asdict(), VOCAB)
    assert sums.text_nats[0] == sums.image_nats[0] == 0
    none = compute_copy_sums(count_copied(same, [[]])._asdict(), VOCAB)
    assert none.text_nats[0] == pytest.approx(np.log(127))
