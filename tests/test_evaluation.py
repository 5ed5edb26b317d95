"""The test during training: its logits and its panels."""

import numpy as np
import pytest
from conftest import tiny_config

import evaluation
import finetune
import inference
import runtime
from embeddings import encode_test_set
from imaging.files import read_image
from imaging.metrics import compute_stats
from imaging.prompts import NO_PROMPT
from imaging.visualize import FOUND_COLOR, MISSED_COLOR, WRONG_COLOR
from inference import predict_logits


@pytest.fixture
def experiment(tiny_weights, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return finetune.prepare(tiny_config(config_file(), tiny_weights))


def encode_tests(experiment, batch_size=2):
    return encode_test_set(
        experiment.test_set,
        experiment.net,
        batch_size=batch_size,
        num_workers=0,
        stop=runtime.StopRequest(),
    )


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


def test_a_panel_shows_the_image_and_what_was_found_in_it(experiment):
    test = encode_tests(experiment)[0]
    truth = test.ground_truth.mask
    prediction = np.zeros_like(truth)
    prediction[:, :10] = True
    height, width = prediction.shape
    shown = evaluation.test_panel(test, prediction)
    assert shown.shape == (height, 2 * width, 3)
    image, compared = np.split(shown, 2, axis=1)
    assert (image == test.thumbnail).all()
    is_gray = compared.max(axis=2) == compared.min(axis=2)
    assert (is_gray == ~(truth | prediction)).all()
    expected = (
        (truth & prediction, MISSED_COLOR, FOUND_COLOR),
        (prediction & ~truth, FOUND_COLOR, WRONG_COLOR),
    )
    for mask, other, color in expected:
        distances = [np.abs(compared[mask].astype(int) - c).sum(axis=1) for c in (other, color)]
        assert mask.any() and (distances[1] < distances[0]).all()


@pytest.mark.parametrize("n", [*range(1, 20), 200])
def test_the_worst_median_and_best_images_are_kept(n):
    places = evaluation.choose_places(n)
    assert list(places) == sorted(places) and set(places) <= set(range(n))
    assert places[0] == "worst" and n // 2 in places and len(places) >= min(n, 3)
    if n >= 3:
        assert places[n // 2] == "median" and places[n - 1] == "best"
    assert n < 12 or list(places.values()) == ["worst"] * 4 + ["median"] * 2 + ["best"] * 2


def test_the_test_set_is_encoded_in_batches_and_holds_no_more_than_it_needs(experiment, monkeypatch):
    batches, encode = [], inference.encode
    monkeypatch.setattr(
        inference,
        "encode",
        lambda sam, images, *rest, **o: batches.append(len(images)) or encode(sam, images, *rest, **o),
    )
    experiment.net.sam.image_encoder.requires_grad_(False)
    kept = [test.embedding for test in encode_tests(experiment)]
    assert batches == [2, 1]
    experiment.net.sam.image_encoder.requires_grad_(True)
    images = [test.image for test in encode_tests(experiment)]
    assert {tuple(image.shape) for image in images} == {(48, 64, 3)}  # of 64 x 64
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept + images)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_measure_what_one_after_the_other_does(experiment, num_threads):
    tests = encode_tests(experiment) * 4
    results = list(
        evaluation.measure(
            experiment.net, tests, batch_size=2, num_threads=num_threads, stop=runtime.StopRequest()
        )
    )
    assert len(results) == 12
    for result, (test, logits) in zip(results, evaluation.evaluate(experiment.net, tests, 2), strict=True):
        expected = compute_stats(logits, test.ground_truth)
        assert result.stats.scores == expected.scores
        assert (result.stats.counts == expected.counts).all()
        assert (result.shown == (logits > 0)).all()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_signal_is_obeyed_within_the_images_that_are_measured(experiment, monkeypatch, num_threads):
    stop, calls = runtime.StopRequest(), []

    def signal_in_fourth(logits, ground_truth):
        calls.append(1)
        if len(calls) == 4:
            stop.signal = 15
        return compute_stats(logits, ground_truth)

    monkeypatch.setattr(evaluation, "compute_stats", signal_in_fourth)
    tests = encode_tests(experiment) * 4
    with pytest.raises(runtime.Stopped):
        list(evaluation.measure(experiment.net, tests, batch_size=2, num_threads=num_threads, stop=stop))
    assert 4 <= len(calls) <= 3 + num_threads
