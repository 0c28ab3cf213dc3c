"""The flagworld suite: does the model use retrieved documents for images and captions?

racm3 evaluate --suite=flagworld --workdir=out/evaluation
"""

from ml_collections import ConfigDict

from configs import flagworld


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" for the shipped models, or a folder with `model` and `twin`."""
    config = ConfigDict()
    config.suite = "flagworld"
    config.models = arg or "shipped:flagworld"
    config.model = "model"
    config.twin = "twin"
    config.world = flagworld.world()
    config.memory = dict(
        index="scann", num_query_variants=0, query_drop=0.0, include_heldout=True
    )
    config.strategy = dict(max_similarity=0.95, num_candidates=24)
    config.settings = dict(
        num_retrieved=2,
        temperature=0.7,
        top_p=1.0,
        guidance=2.0,
        caption_temperature=0.0,
        caption_guidance=1.0,
        caption_candidates=16,
        num_reading=320,
        seed=0,
    )
    config.num_scene_examples = 4000
    config.num_sheet_rows = 8
    return config
