"""Perplexity and bits per image, k-shot accuracy, recall of the retriever.

racm3 evaluate --suite=likelihood --workdir=out/likelihood
racm3 evaluate --suite=likelihood --workdir=out/coco_likelihood --config.twin= \
    --config.models=WORKDIR --config.memory_path=MEMORY --config.class_key= \
    --config.source="coco:DATA/coco;split=val2014"
"""

from ml_collections import ConfigDict

from configs.eval import flagworld


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" for the shipped models, or the folder of others (its `model`, `twin`)."""
    shared = flagworld.get_config(arg)
    config = ConfigDict()
    config.suite = "likelihood"
    # "" for `twin` leaves the model without retrieval out.
    for name in ("models", "model", "twin", "world", "memory", "strategy"):
        config[name] = shared[name]
    # What is scored: "kind:path" as `racm3 memory build` takes it; "" is flagworld's
    # held-out test. Of these the first by sha256 of the id, or 0 for all.
    config.source = ""
    config.num_items = 0
    # A memory that is there; "" builds flagworld's in the work directory.
    config.memory_path = ""
    # Metadata that is equal where documents tell the same: the classes of k-shot, and
    # the documents that the retriever should find. "" leaves k-shot out, and the
    # document to find is the one of the same id.
    config.class_key = "nation"
    # What k-shot shows and asks; "" is flagworld's memory of held-out nations, or the
    # scored documents where a memory is named.
    config.kshot_source = ""
    config.settings = dict(
        variants=("retrieval", "no_retrieval", "random", "copy", "twin"),
        num_retrieved=2,
        query="text",
        # Flagworld's CLIP puts different pictures of one flag 0.95 alike.
        max_similarity=0.995,
        recall_ks=(1, 5, 10),
        shots=(0, 1, 2),
        num_ways=2,
        num_episodes=400,
        seed=0,
        chunk_size=64,
        num_rows=8,
        num_resamples=1000,
        num_sheet_rows=8,
    )
    return config
