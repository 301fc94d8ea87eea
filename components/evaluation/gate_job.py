"""The step `gate`: the decision on a report, and the page that shows the run. Needs no torch, so that it starts fast."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from components.evaluation.gate import Decision, decide
from components.evaluation.report import render_html
from components.reward.gate import judge
from components.semantic_ids.report import SECTION
from infra import storage
from infra.logs import get_logger
from infra.steps import Run, StepResult, content_of, run_records, run_step
from infra.tracking import Registry

STEP = "gate"
CODE = (
    "components/evaluation",
    "components/reward/gate.py",
    "components/semantic_ids/report.py",
    "components/semantic_ids/report.html.j2",
    "infra/svg.py",
)
DECISION, PAGE = "decision.json", "report.html"


def step(run: Run, semantic_ids: str, training: str, evaluation: str, reward: str) -> StepResult:
    """The step `gate`: reports, champion and policy to a decision with reasons, and the page that shows it all."""
    champion = Registry(run.config.tracking, run.config.workspace).champion()
    judged = content_of(evaluation)
    # The champion is not held against itself when a finished run is walked through once more.
    other = None if champion is None or champion.evaluation == judged else champion
    report = storage.read_json(storage.join(evaluation, "report.json"))
    if other is not None and other.report and any(other.report.get(key) != report[key] for key in ("catalogue", "protocol")):
        get_logger(STEP).warning("not compared with the champion: it was judged on other data", champion=other.bundle_uri)
        other = None

    def work(out_uri: str) -> dict[str, Any]:
        verdict = judge(storage.read_json(storage.join(reward, "report.json")), run.config.reward.gate)
        decision = decide(report, other.report if other else None, run.config.gate, verdict)
        storage.write_json(storage.join(out_uri, DECISION), {"promoted": decision.promoted, "reasons": decision.reasons})
        page = render_run(run, report, decision, semantic_ids=semantic_ids, training=training, evaluation=evaluation)
        storage.write_bytes(storage.join(out_uri, PAGE), page.encode())
        get_logger(STEP).info("promoted" if decision.promoted else "not promoted", reasons="; ".join(decision.reasons))
        return {"promoted": decision.promoted, "reasons": list(decision.reasons)}

    inputs = {"evaluation": judged, "champion": other.evaluation if other else ""}
    inputs |= {"training": content_of(training), "semantic_ids": content_of(semantic_ids), "reward": content_of(reward)}
    settings = {"gate": run.config.gate.model_dump(), "reward": run.config.reward.gate.model_dump()}
    return run_step(run, STEP, work, settings=settings, inputs=inputs, code=CODE)


def render_run(run: Run, report: dict[str, Any], decision: Decision, *, semantic_ids: str, training: str, evaluation: str) -> str:
    """The page of a run."""
    records = run_records(run.config.workspace, run.run_id)
    sessions = records["sessions"].metadata if "sessions" in records else {}
    return render_html(
        report,
        decision=decision,
        loss_curve=storage.read_json(storage.join(training, "loss_curve.json")),
        sid_section=_sid_section(semantic_ids),
        examples=storage.read_json(storage.join(evaluation, "examples.json")),
        run={
            "config": run.config.public().model_dump(mode="json"),
            "data": {name: value for name, value in sessions.items() if not isinstance(value, dict)},
            "seconds": {name: record.seconds for name, record in records.items()},
        },
    )


def _sid_section(semantic_ids: str) -> Markup | None:
    """The section that the step `semantic_ids` drew; None of a folder from before it did."""
    uri = storage.join(semantic_ids, SECTION)
    return Markup(storage.read_bytes(uri).decode()) if storage.exists(uri) else None  # noqa: S704 - of a committed folder, escaped there
