"""The test during training: its logits and its panels."""

import numpy as np
import pytest
from conftest import tiny_config

import evaluation
import finetune
import runtime
from embeddings import encode_test_set
from imaging.files import read_image
from imaging.prompts import NO_PROMPT
from inference import predict_logits


@pytest.fixture
def experiment(tiny_weights, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return finetune.prepare(tiny_config(config_file(), tiny_weights))


def encode_tests(experiment):
    return encode_test_set(experiment.test_set, experiment.net, num_workers=0, stop=runtime.StopRequest())


@pytest.mark.parametrize("encoder_trains", [False, True])
def test_logits_are_those_of_prediction(experiment, data, encoder_trains):
    experiment.net.sam.image_encoder.requires_grad_(encoder_trains)
    tests = encode_tests(experiment)
    assert all((test.embedding is None) == encoder_trains for test in tests)
    photos = [read_image(path) for path in sorted((data / "test/imgs").iterdir())]
    expected = list(predict_logits(experiment.net, photos, [NO_PROMPT] * len(photos)))
    for batch_size in (1, 2, 3):
        pairs = list(evaluation.evaluate(experiment.net, tests, batch_size))
        assert [test for test, _ in pairs] == tests
        for (_, ours), official in zip(pairs, expected, strict=True):
            np.testing.assert_allclose(ours, official, atol=1e-4)


def test_a_panel_shows_image_ground_truth_and_prediction(experiment):
    test = encode_tests(experiment)[0]
    prediction = np.zeros_like(test.ground_truth.mask)
    prediction[:10, :10] = True
    height, width = prediction.shape
    shown = evaluation.test_panel(test, prediction)
    assert shown.shape == (height, 3 * width, 3)
    image, truth, predicted = np.split(shown, 3, axis=1)
    assert (image == test.thumbnail).all()
    assert ((truth != image).any(axis=2) == test.ground_truth.mask).all()
    assert ((predicted != image).any(axis=2) == prediction).all()
