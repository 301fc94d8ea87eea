"""The step `reward`: learns what can be learned, says what cannot, goes on where it was interrupted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from safetensors.numpy import load

from components.reward import fit as fitting
from components.reward.data import sessions_of
from components.reward.fit import build_model, fit, score
from components.reward.gate import judge
from components.reward.job import PAGE, REPORT, ROC, WEIGHTS, fit_reward_model, rate_tables, step
from infra import storage
from infra.errors import TrainingError
from infra.records import Phase
from infra.steps import Run
from tests.unit.components.reward.small import catalogue, configuration, learnable, timelines, write_sessions

LEARN = (
    "reward.epochs=6",
    "reward.batch=32",
    "reward.learning_rate=0.01",
    "reward.patience=12",
    "reward.dropout=0.1",
    "reward.weight_decay=0.1",
)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """One fit on a log that can be learned."""
    folder = tmp_path_factory.mktemp("reward")
    config = configuration(*LEARN)
    report = fit_reward_model(config, write_sessions(folder / "sessions", learnable()), str(folder / "out"))
    return config, folder, report


def test_it_learns_which_items_are_liked(judged):
    _, _, report = judged
    like = report["objectives"]["like"]
    assert like["auc"] > 0.75
    assert like["baseline_auc"] > 0.75
    assert like["events"] == 60 * 4
    assert report["sessions"] == {"train": 360, "valid": 120, "test": 120}


def test_weights_report_curves_and_page_are_written(judged):
    _, folder, report = judged
    out = str(folder / "out")
    assert storage.read_json(storage.join(out, REPORT)) == report
    assert sorted(storage.list_files(out)) == sorted([WEIGHTS, REPORT, ROC, PAGE])
    curve = storage.read_json(storage.join(out, ROC))["like"]["reward model"]
    assert curve["fpr"] == sorted(curve["fpr"])
    assert (curve["fpr"][0], curve["tpr"][-1]) == (0, 1)
    assert all(map(math.isfinite, curve["threshold"]))
    page = storage.read_bytes(storage.join(out, PAGE)).decode()
    assert page.count("<svg") == 3
    assert "src=" not in page


def test_rates_of_items_are_kept_with_the_weights_as_the_test_phase_met_them(judged):
    config, folder, _ = judged
    data = sessions_of(learnable(), config, ["like", "watch"])
    saved = load(storage.read_bytes(str(folder / "out" / WEIGHTS)))
    test = data.events_of(data.of_phase(Phase.TEST))
    np.testing.assert_allclose(saved["rates_IO"][data.items_E[test]], data.rates_EO[test], rtol=1e-6)
    np.testing.assert_array_equal(saved["mean_O"], rate_tables(data, 12)["mean_O"])


def test_scores_stand_in_the_order_of_the_events(judged):
    config, _, _ = judged
    data = sessions_of(learnable(), config, ["like", "watch"])
    model = build_model(catalogue(12), config, 2)
    sessions = data.of_phase(Phase.TEST)[::-7]
    found = score(model, data, sessions, config)
    np.testing.assert_array_equal(found.item_labels_EO, data.labels_EO[data.events_of(sessions)])
    alone = score(model, data, sessions[3:4], config)
    np.testing.assert_allclose(found.session_logits_SO[3], alone.session_logits_SO[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.item_logits_EO[6:8], alone.item_logits_EO, rtol=1e-5, atol=1e-6)


def test_an_interrupted_fit_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    config = configuration("reward.epochs=4", "reward.batch=64", "reward.dropout=0.2", "reward.patience=9")
    data = sessions_of(learnable(users=30), config, ["like"])
    undisturbed = build_model(catalogue(12), config, 1)
    expected = fit(undisturbed, data, config, str(tmp_path / "one"))
    whole = fitting.run_epoch

    def stop_in_the_third(*arguments, epoch, **more):
        if epoch == 2:
            raise KeyboardInterrupt
        return whole(*arguments, epoch=epoch, **more)

    monkeypatch.setattr(fitting, "run_epoch", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        fit(build_model(catalogue(12), config, 1), data, config, str(tmp_path / "two"))
    monkeypatch.undo()
    resumed = build_model(catalogue(12), config, 1)
    assert fit(resumed, data, config, str(tmp_path / "two")) == expected
    for name, tensor in undisturbed.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), resumed.state_dict()[name].numpy(), err_msg=name)


def test_fitting_stops_where_validation_no_longer_gains_and_keeps_the_best_weights(tmp_path, monkeypatch):
    config = configuration("reward.epochs=9", "reward.patience=2")
    data = sessions_of(learnable(users=8), config, ["like"])
    losses = iter([0.5, 0.4, 0.6, 0.7, 0.1])
    model = build_model(catalogue(12), config, 1)
    seen = []

    def validated(model, *rest):
        seen.append(model.item.weight.detach().clone())
        return next(losses)

    monkeypatch.setattr(fitting, "validation_loss", validated)
    progress = fit(model, data, config, str(tmp_path))
    assert (progress.epoch, progress.best_epoch, progress.best_loss) == (4, 2, 0.4)
    np.testing.assert_array_equal(model.item.weight.detach().numpy(), seen[1].numpy())


def test_a_log_without_signals_is_skipped_and_says_so(tmp_path):
    config = configuration("data.columns.signals={}")
    report = fit_reward_model(config, "never read", str(tmp_path))
    assert report == {"no_signals": True, "objectives": {}, "left_out": {}}
    assert "names no signals" in storage.read_bytes(str(tmp_path / PAGE)).decode()
    assert judge(report, config.reward.gate).passed


def test_signals_of_one_class_are_left_out_with_the_reason_and_the_others_fitted(tmp_path):
    table = learnable(users=12).to_pylist()
    for line in table:
        line["signals"] = [value for at in range(0, len(line["signals"]), 2) for value in (line["signals"][at], 0.0)]
    sessions = write_sessions(tmp_path / "sessions", learnable().from_pylist(table, schema=learnable().schema))
    report = fit_reward_model(configuration(), sessions, str(tmp_path / "out"))
    assert list(report["objectives"]) == ["like"]
    assert report["left_out"] == {"watch": "none of 144 events of the training phase earned it"}


@pytest.mark.parametrize(("like", "what"), [(1.0, "all 1 events"), (None, "no event")])
def test_where_nothing_can_be_fitted_the_gate_refuses(tmp_path, like, what):
    sessions = write_sessions(tmp_path / "sessions", timelines([(1, 0, 0, like, None), (2, 1, 2, 1.0, 1.0)]))
    config = configuration()
    report = fit_reward_model(config, sessions, str(tmp_path / "out"))
    assert what in report["left_out"]["like"]
    assert not judge(report, config.reward.gate).passed


def test_a_test_phase_of_one_class_has_no_auc_and_fails_the_gate(tmp_path):
    events = [(1, 0, 0, 1.0, 1.0), (2, 1, 0, 0.0, 0.0), (3, 2, 1, 1.0, 0.0), (2, 3, 2, 1.0, 1.0)]
    config = configuration()
    report = fit_reward_model(config, write_sessions(tmp_path / "sessions", timelines(events, events)), str(tmp_path / "out"))
    assert report["objectives"]["like"]["auc"] is None
    assert not judge(report, config.reward.gate).passed


def test_without_a_test_phase_there_is_no_auc(tmp_path):
    events = [(1, 0, 0, 1.0, 1.0), (2, 1, 0, 0.0, 0.0)]
    report = fit_reward_model(configuration(), write_sessions(tmp_path / "sessions", timelines(events, events)), str(tmp_path / "out"))
    assert (report["objectives"]["like"]["auc"], report["objectives"]["like"]["events"]) == (None, 0)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    config = configuration("reward.learning_rate=1e30")
    with pytest.raises(TrainingError, match="not finite"):
        fit(build_model(catalogue(12), config, 1), sessions_of(learnable(users=8), config, ["like"]), config, str(tmp_path))


def test_the_step_is_skipped_once_finished_and_a_changed_gate_does_not_redo_it(tmp_path):
    sessions = write_sessions(tmp_path / "sessions", learnable(users=8))
    settings = (f"workspace={tmp_path / 'workspace'}", "reward.epochs=1")
    first = step(Run(configuration(*settings)), sessions)
    again = step(Run(configuration(*settings, "reward.gate.min_auc=0.9")), sessions)
    other = step(Run(configuration(*settings, "reward.hidden_size=8")), sessions)
    assert (first.skipped, again.skipped, other.skipped) == (False, True, False)
    assert storage.open_committed(first.uri).digest
