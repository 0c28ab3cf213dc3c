"""Documents that are not added to a memory."""

from __future__ import annotations

from racm3_jax.memory.filters import OptOut


def test_opted_out_documents_are_matched_by_any_name():
    opt_out = OptOut(["7", "https://site/*  # all of it"])
    assert opt_out.matches("7", "", {})
    # The id in the source, where the document's own id begins with a folder.
    assert opt_out.matches("cc3m/7", "", {"id": 7})
    assert opt_out.matches("a/00000001", "", {"key": "7"})
    assert opt_out.matches("x", "", {"URL": "https://site/1.jpg"})
    assert not opt_out.matches("cc3m/8", "https://other/1.jpg", {"id": 8, "n": 7})
