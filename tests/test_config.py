import os
import re
import time
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from base.errors import UserError
from config import load_config


@pytest.fixture
def folders(tmp_path):
    for name in ("cables", "more", "test", "bg_1", "bg_2"):
        (tmp_path / name).mkdir()
    return tmp_path


def load(folder, text):
    path = folder / "c.yaml"
    path.write_text(text)
    return load_config(path)


EVERY_KEY = """
dataset:
  train:                                   # a list of datasets
    - data_dir: cables
      bg_paths:
        - bg_1
        - # left empty
        - bg_2
      w_aug: true
      aug_details: [crop_foreground]
      percentage: 0.1
    - # nothing here
    - data_dir: more
  test:
    data_dir: test
    bg_paths: null
    w_aug: false
"""


def test_every_key_is_read_and_empty_items_are_ignored(folders):
    dataset = load(folders, EVERY_KEY).dataset
    first, second = dataset.train
    assert first.data_dir == folders / "cables"
    assert first.bg_paths == (folders / "bg_1", folders / "bg_2")
    assert first.w_aug and first.composites and first.percentage == 0.1
    assert (second.bg_paths, second.w_aug, second.percentage) == ((), False, 1.0)
    assert not second.composites
    assert dataset.test.data_dir == folders / "test" and not dataset.test.composites


def test_config_is_frozen(folders):
    config = load(folders, EVERY_KEY)
    with pytest.raises(ValueError, match="frozen"):
        config.dataset.train[0].percentage = 0.5


def test_relative_paths_start_at_the_current_directory_then_at_the_yaml(folders, monkeypatch):
    text = "dataset: {train: [{data_dir: cables}]}"
    elsewhere = folders / "elsewhere"
    (elsewhere / "cables").mkdir(parents=True)
    monkeypatch.chdir(folders / "test")
    assert load(folders, text).dataset.train[0].data_dir == folders / "cables"
    monkeypatch.chdir(elsewhere)
    assert load(folders, text).dataset.train[0].data_dir == elsewhere / "cables"


def test_a_folder_without_permission_is_named(folders, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder).name != "cables")
    with pytest.raises(UserError, match=r"train\[0\].data_dir: the folder may not be read; change its perm"):
        load(folders, "dataset: {train: [{data_dir: cables}, {data_dir: more}]}")


def test_home_and_variables_in_paths_are_expanded_unless_the_folder_exists(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders))
    monkeypatch.setenv("USERPROFILE", str(folders))
    monkeypatch.setenv("DATA", "cables")
    for path in ("~/cables", "$HOME/cables", "${HOME}/$DATA", "$DATA"):
        text = f"dataset: {{train: [{{data_dir: '{path}', bg_paths: ['~/bg_1']}}]}}"
        (dataset,) = load(folders, text).dataset.train
        assert dataset.data_dir == folders / "cables" and dataset.bg_paths == (folders / "bg_1",)
    (folders / "$DATA").mkdir()
    (dataset,) = load(folders, "dataset: {train: [{data_dir: $DATA}]}").dataset.train
    assert dataset.data_dir == folders / "$DATA"


def test_backgrounds_without_aug_details_composite(folders):
    config = load(folders, "dataset: {train: [{data_dir: cables, bg_paths: [bg_1]}]}")
    assert config.dataset.train[0].composites


@pytest.mark.parametrize("bg_paths", ["", "bg_paths: null, ", "bg_paths: [], "])
def test_crop_foreground_without_backgrounds_warns_and_uses_photos(folders, bg_paths):
    text = f"dataset: {{train: [{{data_dir: cables, {bg_paths}aug_details: [crop_foreground]}}]}}"
    with pytest.warns(UserWarning, match="photos are used as they are"):
        assert not load(folders, text).dataset.train[0].composites


def test_all_faults_are_reported_at_once_with_key_path_and_value(folders):
    document = {
        "dataset": {
            "train": [
                {"data_dir": "cables", "percentage": 0},
                None,
                {"data_dir": "nowhere", "w_aug": "yes", "bg_path": ["bg_1"]},
                {"bg_paths": "bg_1", "percentage": "half"},
            ],
            "test": [{"data_dir": "test"}],
        },
        "lr": 1e-3,
    }
    with pytest.raises(UserError) as error:
        load(folders, yaml.safe_dump(document))
    message = str(error.value)
    assert "c.yaml: 9 error(s)" in message
    for part in (
        "dataset.train[0].percentage: Input should be greater than 0 (got 0)",
        "dataset.train[2].data_dir: no such folder (tried",
        "dataset.train[2].w_aug: Input should be a valid boolean (got 'yes')",
        "dataset.train[2].bg_path: unknown key",
        "dataset.train[3].data_dir: required key is missing",
        "dataset.train[3].bg_paths: expected a list (got 'bg_1')",
        "dataset.train[3].percentage: expected a number such as 0.5, which means half of the pairs",
        "(got 'half')",
        "dataset.test: expected a mapping, not a list: there is one test dataset",
        "lr: unknown key",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset:\n  train: [\n", "line 3"),
        ("dataset: {train: []}", "dataset.train: needs at least one dataset"),
        ("dataset: {train: null}", "dataset.train: needs at least one dataset"),
        ("dataset: {}", "dataset.train: required key is missing"),
        ("dataset: {train: {data_dir: cables}}", "expected a list: begin its items with a dash (got {"),
        ("", "expected a mapping"),
        ("- a", "expected a mapping"),
        ("dataset: {train: [{data_dir: cables, w_aug: true, w_aug: false}]}", "the key 'w_aug' occurs twice"),
        ("dataset: {train: [{data_dir: cables, percentage: .nan}]}", "finite number"),
        (
            "dataset: {train: [{data_dir: cables, percentage: 1.0e+9}]}",
            "less than or equal to 10000",
        ),
        ("dataset: {train: [{data_dir: cables, percentage: true}]}", "dataset.train[0].percentage"),
        ("dataset: {train: [{data_dir: cables, bg_paths: [bg_1, 7]}]}", "dataset.train[0].bg_paths[1]"),
        ("dataset: {train: [{data_dir: cables, aug_details: [blur]}]}", "'crop_foreground'"),
        (
            "dataset: {train: [{data_dir: cables, bg_paths: [bg_1], aug_details: []}]}",
            "aug_details lacks crop_foreground",
        ),
        ("dataset: {train: [{data_dir: cables, percentage: '1,5'}]}", "expected a number such as 0.5"),
        ("dataset: {train: [{data_dir: cables, percentage: -5%}]}", "greater than 0 (got "),
        ("dataset: {train: [{data_dir: cables, mask_values: 1}]}", "mask_values: expected a list (got 1)"),
        (
            "dataset: {train: [{data_dir: cables, mask_values: []}]}",
            "mask_values: expected at least one value",
        ),
        ("dataset: {train: [{data_dir: cables, mask_values: [70000]}]}", "palette indices from 0 to 65535"),
        (
            "dataset: {train: [{data_dir: cables, mask_values: [true]}]}",
            "expected `nonzero`, or a list of gray",
        ),
        (
            "dataset: {train: [{data_dir: cables, mask_values: [[255, 0]]}]}",
            "or of colors, e.g. [[255, 0, 0]]",
        ),
        ("dataset: {train: [{data_dir: cables, mask_values: [[256, 0, 0]]}]}", "or of colors"),
        ("dataset: {train: [{data_dir: cables, allow_large_foreground: 1}]}", "allow_large_foreground"),
        ("dataset: {train: [{data_dir: cables}], test: [{data_dir: test}]}", "below `test:` without a dash"),
        ("dataset: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("dataset: 2001-99-99", "not valid YAML"),
        ("dataset: &a [*a]", "not valid YAML"),
        ("dataset: {train: &a [*a]}", "not valid YAML"),
        ("dataset: \0", "not valid YAML"),
        ("[" * 1_000_001, "is larger than 1000000 bytes"),
        (f"dataset: {{train: [{{data_dir: {'x' * 300}}}]}}", "dataset.train[0].data_dir: no such folder"),
        ("dataset: {train: [{data_dir: 2024-05-01}]}", "write a name such as '2024-05-01' with quotes"),
        ("dataset: {train: [{data_dir: cables, bg_paths: [2024]}]}", "write a name such as"),
        (r'dataset: {train: [{data_dir: "C:\Users\me"}]}', 'write / instead, as in "C:/photos"'),
        (r'dataset: {train: [{data_dir: "C:\Photos"}]}', 'write / instead, as in "C:/photos"'),
        (r'dataset: {train: [{data_dir: "C:\new"}]}', 'write / instead, as in "C:/photos"'),
    ],
)
def test_fault_is_named(folders, text, message):
    with pytest.raises(UserError) as error:
        load(folders, text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"), [("5e-1", 0.5), ("50%", 0.5), ("'50 %'", 0.5), ("2", 2.0), ("'0.1'", 0.1)]
)
def test_numbers_that_yaml_reads_as_strings_are_numbers(folders, text, expected):
    config = load(folders, f"dataset: {{train: [{{data_dir: cables, percentage: {text}}}]}}")
    assert config.dataset.train[0].percentage == expected


@pytest.mark.parametrize("part", ["imgs", "masks"])
def test_a_part_of_a_dataset_in_its_place_is_named_with_what_to_write(folders, part):
    for name in ("imgs", "masks"):
        (folders / "cables" / name).mkdir()
    with pytest.raises(UserError) as error:
        load(folders, f"dataset: {{train: [{{data_dir: cables/{part}}}]}}")
    expected = "dataset.train[0].data_dir: expected the folder that holds imgs/ and masks/: write "
    assert f"{expected}{folders / 'cables'} " in str(error.value)
    (folders / "cables" / part / "imgs").mkdir()  # a dataset whose own name is that
    load(folders, f"dataset: {{train: [{{data_dir: cables/{part}}}]}}")


def test_a_percentage_that_is_meant_in_percent_gives_a_warning(folders):
    text = "dataset: {train: [{data_dir: cables, percentage: 50}]}"
    with pytest.warns(
        UserWarning, match=r"percentage 50 means 50 passes per epoch; for 50 percent, write 0\.5"
    ):
        assert load(folders, text).dataset.train[0].percentage == 50


@pytest.mark.parametrize(
    ("text", "expected"),
    [("nonzero", "nonzero"), ("null", None), ("[1, 300]", (1, 300)), ("[[255, 0, 0], 7]", ((255, 0, 0), 7))],
)
def test_mask_values_are_values_or_colors(folders, text, expected):
    config = load(folders, f"dataset: {{train: [{{data_dir: cables, mask_values: {text}}}]}}")
    assert config.dataset.train[0].mask_values == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_is_named(folders, encoding):
    (folders / "c.yaml").write_bytes(EVERY_KEY.encode(encoding))
    with pytest.raises(UserError, match=r"c\.yaml: it is encoded in UTF-16; save it as UTF-8"):
        load_config(folders / "c.yaml")


def test_a_byte_order_mark_of_utf_8_is_read(folders):
    (folders / "c.yaml").write_bytes(EVERY_KEY.encode("utf-8-sig"))
    assert len(load_config(folders / "c.yaml").dataset.train) == 2


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 a JPEG", b"[" * 100_000])
def test_a_file_that_is_not_text_or_is_nested_too_deeply_is_named(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*c\.yaml"):
        load_config(tmp_path / "c.yaml")


ALIAS_BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n" for last, name in pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("dataset", "part"),
    [
        ("{train: [{data_dir: cables}]}", "c: unknown key"),
        ("*h", "dataset: expected a mapping"),
        ("{train: *h}", "dataset.train[0]: expected a mapping"),
        (
            "{train: [{data_dir: *h}]}",
            "dataset.train[0].data_dir: expected the path of a folder (got [[[...]",
        ),
        (
            "{train: [{data_dir: cables, percentage: *h}]}",
            "dataset.train[0].percentage: Input should be a valid",
        ),
    ],
)
def test_aliases_that_expand_to_millions_of_values_get_a_short_message_at_once(folders, dataset, part):
    started = time.process_time()
    with pytest.raises(UserError) as error:
        load(folders, f"{ALIAS_BOMB}dataset: {dataset}")
    assert time.process_time() - started < 1
    assert part in str(error.value) and len(str(error.value)) < 3000


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("cables")
KEYS = "dataset train test data_dir bg_paths w_aug aug_details percentage mask_values allow_large_foreground"
keys = st.sampled_from(KEYS.split())
documents = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(keys | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=25,
)
datasets = st.dictionaries(keys, leaves | st.lists(leaves, max_size=2)) | documents
configs = documents | st.fixed_dictionaries(
    {"dataset": st.fixed_dictionaries({"train": st.lists(datasets, max_size=3)}, optional={"test": datasets})}
)


@settings(deadline=None, max_examples=300)
@given(document=configs)
@example(document={"dataset": {"train": [{"data_dir": "cables", "w_aug": True, "percentage": 0.5}]}})
@example(document={"dataset": {"train": [{"data_dir": "cables", "w_aug": 7}]}})
def test_whatever_the_yaml_holds_it_fits_or_the_message_names_the_file(tmp_path_factory, document):
    folder = tmp_path_factory.getbasetemp()
    (folder / "cables").mkdir(exist_ok=True)
    path = folder / "random.yaml"
    path.write_text(yaml.safe_dump(document))
    config, message = None, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of aug_details without bg_paths
            config = load_config(path)
    except UserError as error:
        message = str(error)
    if config is None:
        assert str(path) in message
    else:
        assert config.dataset.train
        assert all(dataset.data_dir.is_dir() and dataset.percentage > 0 for dataset in config.dataset.train)


@settings(deadline=None, max_examples=300)
@given(text=st.text() | st.binary())
def test_whatever_the_file_holds_it_fits_or_the_message_names_the_file(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "garbage.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_config(path)


def test_a_misspelled_key_gets_a_suggestion(config_file, data):
    path = config_file(bg_path=["backgrounds"])
    with pytest.raises(UserError, match=r"bg_path: unknown key; did you mean bg_paths\?"):
        load_config(path)


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"--config {tmp_path}: is a folder; expected a YAML file")):
        load_config(tmp_path)
