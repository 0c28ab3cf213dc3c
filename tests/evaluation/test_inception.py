import importlib
import pathlib
import sys

import numpy as np
import pytest

from racm3_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from racm3_jax.evaluation.inception import InceptionFeatures, convert_weights
from racm3_jax.evaluation.resizing import resize_batch

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "evaluation"
WIDTH = 16


@pytest.fixture
def golden_import(monkeypatch):
    monkeypatch.syspath_prepend(str(GOLDEN))
    yield importlib.import_module
    for name in ("inception_weights", "torch_inception"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("variant", ["fid", "torchvision"])
def test_features_equal_the_torch_network(variant, golden_import):
    weights = golden_import("inception_weights")
    params = convert_weights(weights.random_weights(WIDTH))
    extract = InceptionFeatures(
        params, variant, "legacy", batch_size=2, image_size=weights.SIZE, width=WIDTH
    )
    found = extract(weights.random_images(2))
    with np.load(GOLDEN / "inception.npz") as file:
        wanted = file[variant]
        other = file["torchvision" if variant == "fid" else "fid"]
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(found - other).max() > 0.01 * np.abs(wanted).max()


def test_incomplete_weights_are_refused(golden_import):
    weights = golden_import("inception_weights").random_weights(WIDTH)
    with pytest.raises(ValueError, match="94 convolutions"):
        convert_weights({"fc.weight": np.zeros((2, 2))})
    del weights["Mixed_7c.branch1x1.bn.running_var"]
    with pytest.raises(ValueError, match=r"Mixed_7c.branch1x1.bn.running_var"):
        convert_weights(weights)


def test_another_variant_is_refused():
    with pytest.raises(ValueError, match="'fid', 'torchvision'"):
        InceptionFeatures({}, "tensorflow")  # pyright: ignore


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_full_network_live(golden_import):
    reference = golden_import("torch_inception")
    weights = golden_import("inception_weights")
    images = weights.random_images(2)
    wanted = reference.reference_features(images, "fid", 1, 299)
    params = convert_weights(weights.random_weights(1))
    found = InceptionFeatures(params, "fid", "legacy", batch_size=2)(images)
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_fid_live(golden_import):
    reference = golden_import("torch_inception")
    weights = golden_import("inception_weights")
    linalg = pytest.importorskip("scipy.linalg")
    params = convert_weights(weights.random_weights(WIDTH))
    extract = InceptionFeatures(
        params, "fid", "legacy", batch_size=8, image_size=weights.SIZE, width=WIDTH
    )
    sets = [weights.random_images(40, 1), weights.random_images(40, 2, shift=40)]
    ours = frechet_distance(*(FeatureStatistics.of(extract(s)) for s in sets))
    real, generated = (
        reference.reference_features(s, "fid", WIDTH, weights.SIZE).astype(np.float64)
        for s in sets
    )
    first, second = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    offset = np.eye(len(first)) * 1e-9
    root = linalg.sqrtm((first + offset) @ (second + offset)).real
    gap = real.mean(0) - generated.mean(0)
    wanted = gap @ gap + np.trace(first + second - 2 * root)
    assert ours == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_packages_themselves(golden_import, monkeypatch):
    """pytorch-fid's and torchvision's own networks, where they are installed.

    They need a torchvision that is incompatible with `transformers`; where its compiled
    part does not load, only the declarations of its operators are skipped.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("pytorch_fid")
    monkeypatch.setattr(
        torch.library, "register_fake", lambda *_, **__: lambda function: function
    )
    torchvision = pytest.importorskip("torchvision")
    package = importlib.import_module("pytorch_fid.inception")
    distance = importlib.import_module("pytorch_fid.fid_score")
    torch.set_num_threads(1)
    weights = golden_import("inception_weights")
    arrays = weights.random_weights(1)
    plain = torchvision.models.inception_v3(
        num_classes=1008, aux_logits=False, init_weights=False, weights=None
    )
    state = plain.state_dict()
    state |= {name: torch.from_numpy(array) for name, array in arrays.items()}
    plain.load_state_dict(state)
    plain.fc = torch.nn.Identity()
    monkeypatch.setattr(package, "load_state_dict_from_url", lambda *_, **__: state)
    reference = package.InceptionV3([3]).eval()

    sets = [weights.random_images(5, 1), weights.random_images(5, 2, shift=40)]
    pixels = [
        torch.from_numpy(resize_batch(some, 299, "legacy")).permute(0, 3, 1, 2) / 255
        for some in sets
    ]
    params = convert_weights(arrays)
    extract = InceptionFeatures(params, "fid", "legacy", batch_size=5)
    found = [extract(some) for some in sets]
    with torch.no_grad():
        wanted = [reference(x)[0][..., 0, 0].numpy() for x in pixels]
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        theirs = plain.eval()((pixels[0] - mean) / deviation).numpy()
    for ours, features in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, features, atol=1e-4 * np.abs(features).max())
    ours = InceptionFeatures(params, "torchvision", "legacy", batch_size=5)(sets[0])
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    ours = frechet_distance(*(FeatureStatistics.of(x) for x in found))
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in wanted]
    fid = distance.calculate_frechet_distance(*moments[0], *moments[1])
    assert ours == pytest.approx(fid, rel=1e-3)
