"""The other tasks on flagworld: infilling, editing, demonstrations, k-shot, guidance.

racm3 evaluate --suite=flagworld_tasks --workdir=out/evaluation_tasks
"""

from ml_collections import ConfigDict

from configs.eval import flagworld


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" for the shipped models, or a folder with `model` and `twin`."""
    config = flagworld.get_config(arg)
    config.suite = "flagworld_tasks"
    del config.num_scene_examples  # only `flagworld` evaluates scenes
    config.settings = ConfigDict(
        dict(
            num_items=0,
            num_retrieved=2,
            temperature=0.7,
            top_p=1.0,
            max_spans=1,
            region_prompts=("masked", "in_place"),
            guidance=(2.0,),
            document_guidance=(1.5, 2.0),
            num_samples=4,
            shots=(0, 1, 2, 4, 8),
            classify_by=("image", "label"),
            shots_per_pass=1,
            seed=0,
        )
    )
    return config
