"""Layers of the configuration, and errors that name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from infra.config import PRESETS, Config, load_config, preset_settings
from infra.errors import ConfigError


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_each_layer_lies_over_the_one_before(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "training: {epochs: 30, workers: 3}\n")
    base = {"training": {"epochs": 20, "workers": 4, "weight_decay": 0.5}}
    config = load_config(file, preset="tiny", base=base, overrides=["training.epochs=40"])
    training = config.training
    assert training.epochs == 40  # --set
    assert training.workers == 3  # file
    assert training.weight_decay == 0.5  # base
    assert training.learning_rate == 0.005  # preset
    assert training.grad_clip == 1.0  # default


def test_the_preset_comes_from_the_caller_then_the_file_then_the_fallback(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "preset: tiny\n")
    plain = write(tmp_path / "d.yaml", "seed: 1\n")
    assert load_config(file, fallback_preset="small").semantic_ids.codes == 16
    assert load_config(file, preset="small").semantic_ids.codes == 256
    assert load_config(plain, fallback_preset="small").semantic_ids.codes == 256
    assert load_config(plain).semantic_ids.codes == 64


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_and_survives_json(preset: str) -> None:
    config = load_config(preset=preset)
    assert Config.from_json(config.to_json()) == config
    assert config.to_json() == Config.from_json(config.to_json()).to_json()


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'smal'") as caught:
        load_config(preset="smal")
    assert "small" in caught.value.mend


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("seeed", "seed"),
        ("training.epoch", "training.epochs"),
        ("data.columns.usr_id", "data.columns.user_id"),
        ("training.loss.alfa", "training.loss.alpha"),
        ("trainning.epochs", "training"),
        ("learning_rate", "training.learning_rate"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match="unknown setting") as caught:
        load_config(overrides=[f"{key}=1"])
    assert f"did you mean {nearest!r}?" in caught.value.what
    assert "rankgr config schema" in caught.value.mend


def test_an_unknown_key_of_a_file_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'data\.logz'; did you mean 'data\.logs'\?"):
        load_config(write(tmp_path / "c.yaml", "data: {logz: x}\n"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=0", "training.epochs: Input should be greater than or equal to 1"),
        ("training.epochs=many", "training.epochs: Input should be a valid integer"),
        ("data.timestamp_unit=minutes", "data.timestamp_unit"),
        ("data.level_rules={5: [is_like]}", "data.level_rules.5"),
        ("training.loss.ntp_level_weights={1: -1}", "training.loss.ntp_level_weights.1"),
        ("evaluation.truths={click: 9}", "evaluation.truths.click"),
        ("semantic_ids.levels=3", "give one per level"),
        ("decoding.beams=[0, 1]", "decoding.beams must be positive"),
        ("retriever.hidden_size=65", "hidden_size must be a multiple of heads"),
        ("data=5", "data: Input should be"),
    ],
)
def test_a_bad_value_names_its_setting(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    assert message in caught.value.what
    assert caught.value.exit_code == 2


def test_all_weights_0_leave_no_feature() -> None:
    weights = ["text_weight", "embedding_weight", "collaborative_weight"]
    with pytest.raises(ConfigError, match="no feature is left"):
        load_config(overrides=[f"semantic_ids.{name}=0" for name in weights])


@pytest.mark.parametrize("override", ["training.epochs", "=3", ""])
def test_an_override_that_is_no_assignment_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the override") as caught:
        load_config(overrides=[override])
    assert "--set key.subkey=value" in caught.value.mend


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="epochs is a value"):
        load_config(preset="tiny", overrides=["training.epochs.more=1"])


def test_an_override_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--set data\.logs is not valid YAML"):
        load_config(overrides=["data.logs={"])


def test_label_smoothing_beside_a_softmax_over_children_is_refused() -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        load_config(overrides=["retriever.codeword_softmax=children", "training.loss.label_smoothing=0.1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "cannot be read as YAML"), ("- 1\n- 2\n", "must hold a mapping"), ("just text", "must hold a mapping")],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert file in caught.value.where


def test_a_file_that_is_missing_or_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(str(tmp_path / "latin.yaml"))


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "c.yaml", "")) == load_config()


def test_level_weights_replace_those_of_the_preset_and_survive_json() -> None:
    weights = {1: 0.1, 2: 0.3, 3: 1.0, 4: 1.0}
    config = load_config(preset="small", overrides=["training.loss.ntp_level_weights={1: 0.1, 2: 0.3, 3: 1, 4: 1}"])
    assert config.training.loss.ntp_level_weights == weights
    assert Config.from_json(config.to_json()).training.loss.ntp_level_weights == weights
    one = load_config(preset="small", overrides=["training.loss.ntp_level_weights={3: 2}"])
    assert one.training.loss.ntp_level_weights == {3: 2.0}


def test_mappings_of_a_file_replace_those_of_the_preset_whatever_the_type_of_their_keys(tmp_path: Path) -> None:
    # A configuration that was saved as JSON has text for keys.
    file = write(tmp_path / "c.yaml", 'data: {level_rules: {"4": [is_like]}}\nevaluation: {truths: {like: 4}}\n')
    config = load_config(file, preset="kuairand")
    assert config.data.level_rules == {4: ["is_like"]}
    assert config.evaluation.truths == {"like": 4}
    assert config.data.columns.request_id == "session_id"


def test_a_saved_configuration_is_a_configuration_file(tmp_path: Path) -> None:
    config = load_config(preset="kuairand", overrides=[f"workspace={tmp_path}"])
    assert load_config(write(tmp_path / "c.yaml", config.to_json()), preset="small") == config


def test_settings_that_are_handed_in_stay_as_they_are() -> None:
    base = {"data": {"columns": {"text": ["title"], "brand": None}}}
    load_config(base=base, overrides=["data.columns.brand=b", "data.logs=x"])
    assert base == {"data": {"columns": {"text": ["title"], "brand": None}}}


def test_presets_hold_nothing_that_the_schema_does_not_know() -> None:
    for preset in PRESETS:
        assert yaml.safe_dump(preset_settings(preset))
        load_config(preset=preset)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().seed = 5  # type: ignore[misc]


def test_frozen_sids_want_an_earlier_table() -> None:
    with pytest.raises(ConfigError, match=r"semantic_ids\.earlier"):
        load_config(overrides=["semantic_ids.freeze=true"])


def test_a_json_file_keeps_its_numbers(tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "c.json", '{"training": {"learning_rate": 1e-05}}')).training.learning_rate == 1e-5
