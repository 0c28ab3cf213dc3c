"""Retrieval: CLIP, the embedder, the retriever and its strategy."""
