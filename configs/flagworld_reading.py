"""A generator that reads its documents: the curriculum of the shipped RA-CM3.

    racm3 train --config=configs/flagworld_reading.py:alike --workdir=out/alike
    racm3 train --config=configs/flagworld_reading.py:names --workdir=out/names \
        --config.init_from=out/alike/model
    racm3 train --config=configs/flagworld_reading.py:first --workdir=out/first \
        --config.init_from=out/names/model
    ...
    python experiments/reading_gate.py out/names --follow --every=500

Each stage starts from the one before:

    alike    16 codes   flags of one size and position, captions are names
    names    16 codes   the same, names weigh more
    first    16 codes   flags at any position, half of the captions are sentences
    larger   36 codes   as in `names`
    full     64 codes   as in `first`
    second   64 codes   flags of two sizes, one document or two
    waves    64 codes   waving flags; 0, 1, 2 or 4 documents, labels
    third    64 codes   CM3 masks on all documents, too
    fourth   64 codes   the same, five documents of every nation: up to four right ones
    fifth    64 codes   half of the retrieved documents whole, as prompts read them
    twin     64 codes   the baseline: main documents of `third` from the start, no others

Large batches, one right and one wrong document in any order, a new name for every
nation in every example, and what is asked for last in all documents: captions come before
images where an image is asked for, images before captions where a caption is. Reading
emerges suddenly, and only after many examples; those of a quarter of the size cost a
third. Each stage changes little: from `first` straight to full images with flags of two
sizes, waving, a model follows the document whose flag has the wanted size, not the name.

Weights after `fifth` are shipped; those after `names`, `first`, `full`, `second` and
`third` are kept in experiments/weights. After `names`, 15 minutes of a core that did
other work beside it, the right document's flag is preferred in 99% of held-out nations
if it is first, in 96% if it is last, its name in 98% and 99%; after `first`, 6 minutes
later, in 98%, 97%, 99% and 99%; after `full`, another half an hour, in 99%, 97%, 96% and
95%; after `second`, 80 minutes, of all 320 nations in 94%, 92%, 99% and 98%. Its steps
were run in three parts, with a falling rate in the last one alone. After `third`,
another hour, in 74%, 76%, 98% and 93%: waving flags are less certain. Before `fourth`
came 1,000 steps of the same with three documents of a nation. experiments/LOG.md has
what the weights generate.
"""

from ml_collections import ConfigDict

from configs import flagworld

# Flags with the same codes as small flags of full images.
_SMALL = {
    "world.image_size": 32,
    "tokenizer.image_size": 32,
    "pipeline.rows": 8,
    "pipeline.row_length": 304,
}
_STILL = {"world.wave_amplitudes": (0.0,)}
_ONE_SIZE = _STILL | {"world.flag_sizes": ((48, 32),), "world.name_share": 0.5}
_ONE_PLACE = _STILL | {
    "world.flag_sizes": ((48, 48),),
    "world.name_share": 1.0,
    "optimizer.learning_rate": 2e-3,
}
# 0, 1, 2 or 4 documents, and questions about labels that are new in every example.
_MANY = {
    "pairing.num_documents": (0, 1, 2, 4),
    "pairing.wrong_probability": 0.8,
    "pairing.box_weight": 3.0,
    "pipeline.max_documents": 4,
    "episodes.probability": 0.1,
    "episodes.label_weight": 6.0,
}
_PAPER = _MANY | {
    # At least one span, as in the paper, and a whole caption in a third of the main
    # documents.
    "masking.num_masks": "poisson_clamp1",
    "masking.mean": 1.0,
    "masking.mask_retrieved": True,
    "masking.rotation_probability": 0.35,
    "optimizer.schedule": "cosine",
    "train.num_steps": 2600,
}
# Enough documents of a nation for four right ones.
_FIVE = {"world.documents_per_nation": 5}
_LARGER = {
    "world.image_size": 48,
    "tokenizer.image_size": 48,
    "pipeline.rows": 8,
    "pipeline.row_length": 512,
}
# What differs from a training on full images with one right and one wrong document.
_STAGES = {
    "alike": _SMALL
    | _ONE_PLACE
    | {"pairing.name_weight": 1.0, "train.num_steps": 2300},
    "names": _SMALL | _ONE_PLACE | {"train.num_steps": 1700},
    "first": _SMALL | _ONE_SIZE | {"train.num_steps": 2100},
    "larger": _LARGER | _ONE_PLACE | {"train.num_steps": 600},
    "full": _ONE_SIZE | {"optimizer.learning_rate": 1.5e-3, "train.num_steps": 1100},
    # A single document is the right one, so that its flag is drawn at another size in
    # half of these examples, whatever the other document shows.
    "second": _STILL
    | {
        "world.name_share": 0.4,
        "pairing.num_documents": (1, 2),
        "pipeline.rows": 10,
        "optimizer.learning_rate": 1.5e-3,
        "optimizer.schedule": "cosine",
        "train.num_steps": 5200,
    },
    "waves": _MANY | {"optimizer.learning_rate": 7e-4, "train.num_steps": 780},
    "third": _PAPER,
    "fourth": _PAPER
    | _FIVE
    | {
        "optimizer.learning_rate": 1.5e-3,
        "optimizer.warmup_steps": 100,
        "train.num_steps": 3400,
    },
    # After whole documents, which are what prompts read, `fourth` answers with spans of
    # captions.
    "fifth": _PAPER
    | _FIVE
    | {
        "masking.retrieved_probability": 0.5,
        "optimizer.learning_rate": 7e-4,
        "optimizer.warmup_steps": 50,
        "train.num_steps": 1000,
    },
    "twin": _PAPER | {"pipeline.rows": 4, "train.num_steps": 8000},
}


def get_config(arg: str = "third") -> ConfigDict:
    """`arg`: a stage of the curriculum, or "twin"."""
    arg = arg or "third"
    if arg not in _STAGES:
        raise ValueError(f"unknown argument {arg!r}: use one of {', '.join(_STAGES)}")
    config = flagworld.get_config("twin" if arg == "twin" else "")
    config.world.num_nations = 8000
    config.world.documents_per_nation = 3
    config.world.name_share = 0.0
    config.world.flag_sizes = ((24, 16), (48, 32))
    config.world.wave_amplitudes = (0.0, 1.0)
    # The memory of another training of the same world, or "" to build one.
    config.memory_path = ""
    config.tokenizer.image_size = 0
    # Documents are chosen by class, without the retriever.
    config.memory.index = "exact"
    config.memory.num_query_variants = 0
    config.episodes.probability = 0.0
    config.episodes.label_weight = 1.0
    config.pairing = dict(
        probability=1.0,
        num_documents=(2,),
        wrong_probability=1.0,
        right_probability=1.0,
        same_probability=0.0,
        class_key="nation",
        rename=True,
        name_weight=5.0,
        box_weight=1.0,
    )
    config.masking.num_masks = "none"
    config.masking.mask_retrieved = False
    config.masking.retrieved_probability = 1.0
    config.masking.rotation_probability = 0.5
    config.masking.text_weight = 1.0
    config.pipeline.examples_per_batch = 24
    config.pipeline.max_documents = 2
    config.pipeline.max_position_gap = 0
    # Names are learned as flags are: by what precedes them in every document.
    config.pipeline.segment_order = "as_main"
    config.pipeline.rows = 12
    config.model.qk_norm = False
    # A wider one (256) copied, but did not choose, after 48,000 examples.
    config.model.d_model = 128
    config.model.head_dim = 32
    config.model.d_ff = 512
    config.model.compute_dtype = "auto"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    config.train.checkpoint_every = 500
    config.train.num_steps = 8000
    config.update_from_flattened_dict(_STAGES[arg])
    return config
