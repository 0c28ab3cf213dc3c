"""A generator that reads its documents: the curriculum of the next shipped RA-CM3.

    racm3 train --config=configs/flagworld_reading.py:pilot --workdir=out/pilot
    racm3 train --config=configs/flagworld_reading.py:first --workdir=out/first
    racm3 train --config=configs/flagworld_reading.py --workdir=out/racm3 \
        --config.init_from=out/first/model

Large steps, one right and one wrong document in any order, a new name for every nation
of every example, captions in front of images. `pilot` and `first` train on images of a
quarter of the size, whose examples cost a third; what follows starts from their weights.
"""

from ml_collections import ConfigDict

from configs import flagworld

STAGES = ("", "first", "pilot")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "pilot" (0.9M parameters) or "first" (small images), or "" (everything)."""
    if arg not in STAGES:
        raise ValueError(
            f"configs/flagworld_reading.py:{arg}: use one of {', '.join(STAGES[1:])}"
        )
    config = flagworld.get_config()
    config.world.num_nations = 8000
    config.world.documents_per_nation = 3
    config.memory.index = "exact"
    config.memory.num_query_variants = 0
    config.episodes.probability = 0.0
    config.pairing = dict(
        probability=1.0,
        num_documents=(2,),
        wrong_probability=1.0,
        right_probability=1.0,
        class_key="nation",
        rename=True,
        name_weight=6.0,
    )
    config.masking.num_masks = "none"
    config.masking.rotation_probability = 0.5
    config.masking.text_weight = 1.0
    config.pipeline.examples_per_batch = 24
    config.pipeline.max_documents = 2
    config.pipeline.rows = 12
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "constant"
    config.train.checkpoint_every = 500
    if arg:
        config.world.image_size = 32
        config.world.flag_sizes = ((48, 32),)
        config.world.wave_amplitudes = (0.0,)
        config.tokenizer.image_size = 32
        config.pipeline.rows = 8
        config.pipeline.row_length = 304
    if arg == "pilot":
        config.model.d_model = 128
        config.model.head_dim = 32
        config.model.d_ff = 512
    config.train.num_steps = 8000
    return config
