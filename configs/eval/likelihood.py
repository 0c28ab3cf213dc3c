"""Perplexity and bits per image, k-shot accuracy, recall of the retriever.

racm3 evaluate --suite=likelihood --workdir=out/likelihood
racm3 evaluate --suite=likelihood --workdir=out/coco_likelihood --config.twin= \
    --config.models=WORKDIR --config.memory_path=MEMORY \
    --config.source="coco:DATA/coco;split=val2014"
"""

from ml_collections import ConfigDict

from configs.eval import flagworld


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" for the shipped models, or a folder with `model` and `twin`."""
    shared = flagworld.get_config(arg)
    config = ConfigDict()
    config.suite = "likelihood"
    # "" for `twin` skips the baseline without retrieval.
    for name in ("models", "model", "twin", "world", "memory", "strategy"):
        config[name] = shared[name]
    # Evaluation documents: "kind:path" as for `racm3 memory build`; "" is flagworld's
    # held-out test. The number of items, first by sha256 of the id; 0 means all.
    config.source = ""
    config.num_items = 0
    # An existing memory; "" builds flagworld's in the work directory.
    config.memory_path = ""
    # Metadata key of a document's class: the classes of k-shot, and the correct results
    # of the retriever. "" takes the world's; with a source it skips k-shot, and the
    # correct result is the document with the same id.
    config.class_key = ""
    # Source of the k-shot examples; "" is flagworld's memory of held-out nations, or
    # the evaluation documents if a memory is given.
    config.kshot_source = ""
    config.settings = dict(
        variants=("retrieval", "no_retrieval", "random", "copy", "twin"),
        num_retrieved=2,
        query="text",
        # Different images of one flag have a similarity of 0.95 in flagworld's CLIP.
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
