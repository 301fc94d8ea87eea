import pytest

from components.evaluation.gate import Decision
from components.evaluation.gate_job import render_run
from components.semantic_ids.report import SECTION
from infra import storage
from infra.config import load_config
from infra.steps import Run


@pytest.fixture
def page(tmp_path):
    """Draws the page of a run whose steps left the least they may."""
    storage.write_json(str(tmp_path / "training" / "loss_curve.json"), [])
    storage.write_json(str(tmp_path / "evaluation" / "examples.json"), [])
    folders = {name: str(tmp_path / name) for name in ("semantic_ids", "training", "evaluation")}
    run = Run(load_config(overrides=[f"workspace={tmp_path / 'workspace'}"]))
    return lambda: render_run(run, {"users": 3}, Decision(True, ("good",)), **folders)


def test_the_page_holds_the_section_of_the_semantic_ids_as_it_is(tmp_path, page):
    storage.write_bytes(str(tmp_path / "semantic_ids" / SECTION), "<section>ünchanged &amp; whole</section>".encode())
    assert "<section>ünchanged &amp; whole</section>" in page()


def test_the_page_does_without_a_section(page):
    assert "Semantic IDs" not in page()
    assert "Gate: promoted" in page()
