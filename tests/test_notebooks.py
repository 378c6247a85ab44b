"""The notebooks run end to end on the smoke preset, as a reader would run them, and refuse what they should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from papermill import execute_notebook, inspect_notebook

from alignlens import audit, claims
from alignlens.core import settings
from alignlens.study import notebooks

ROOT = Path(__file__).parents[1]
PAPERMILL = [sys.executable, "-m", "papermill"]
FIGURES = """
pretraining answer_lengths pairs training_curves behaviour displacement factors
protocol_matters data_matters layer_metrics_base layer_metrics_grouped
layer_metrics_published coefficient_norms best_layer_histograms best_layer_roc best_layer_pca baselines
transfer_matrix transfer_gaps transfer_losses
sae_training sae_stability sae_density sae_factors sae_top_latents sae_changes sae_shifts sae_anchors
published_saes planted_truth planted_samples crosscoder_rho crosscoder_rho_theta crosscoder_labels
crosscoder_sensitivity published_classes crosscoder_window
planted_geometry geometry_layers decomposition pairs_needed matched_dose
steering patching steered_samples published_changes published_floors verdicts
""".split()
TABLES = """
bases splits doses sae_quality dose_response ablations
objectives noise_floors best_layers selectivity changes sae_names planted_truth_summary
crosscoder_quality published_extras figure_index
geometry decomposition_seeds causal claims published_class_shares
""".split()

pytestmark = pytest.mark.notebook


def papermill(notebook, out, *parameters):
    words = [str(ROOT / "notebooks" / f"{notebook}.ipynb"), str(out), *map(str, parameters), "--no-progress-bar"]
    return subprocess.run([*PAPERMILL, *words], cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def executed(smoke_store, tmp_path_factory):
    """The one command, on the smoke preset."""
    figures = tmp_path_factory.mktemp("figures")
    out = figures / "study.ipynb"
    done = papermill("study", out, "-p", "preset", "smoke", "-p", "store", smoke_store, "-p", "figures", figures)
    assert done.returncode == 0, done.stderr[-3000:]
    return figures / "smoke"


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_there_with_its_table(executed, name):
    assert (executed / f"{name}.png").stat().st_size > 5000
    assert (executed / f"{name}.svg").read_text().startswith("<?xml")
    assert len(pd.read_csv(executed / f"{name}.csv")) > 0


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_there(executed, name):
    assert len(pd.read_csv(executed / f"{name}.csv")) > 0


def test_nothing_else_is_left_behind(executed):
    left = [
        p.name
        for p in executed.iterdir()
        if p.suffix not in {".png", ".svg", ".csv", ".ipynb"} and p.name != "claims.json" or "failed" in p.name
    ]
    assert not left


def test_executed_notebooks_are_clean(executed):
    copies = sorted(executed.glob("0*.ipynb"))
    assert [p.stem for p in copies] == [p.stem for p in sorted((ROOT / "notebooks").glob("0*.ipynb"))]
    for path in copies:
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error"
                noise = output.get("text", "") if output.get("name") == "stderr" else ""
                assert not noise, f"{path.stem} printed to stderr: {noise[:300]}"


def test_the_smoke_run_finds_what_it_must(executed):
    """Known answers that hold at any size: the base against itself, folds without leaks, published folds with them."""
    behaviour = pd.read_csv(executed / "behaviour.csv").set_index(["method", "measure"]).value
    assert behaviour["base", "kl"] == 0 < behaviour["dpo", "kl"]
    floors = pd.read_csv(executed / "noise_floors.csv").set_index("protocol").floor
    assert floors["published"] > 0.65
    assert abs(floors["grouped"] - 0.5) < 0.06, "a mean of ten draws"
    contrast = pd.read_csv(executed / "data_matters.csv")
    assert contrast[contrast.protocol == "grouped"].auroc_leaked.isna().all()
    leaked = contrast[contrast.protocol == "published"].auroc_leaked
    assert leaked.mean() > contrast[contrast.protocol == "grouped"].auroc.mean() + 0.1


def test_dictionaries_find_what_they_must(executed):
    """The base with itself shares everything; planted labels come back; every published item points at a file."""
    labels = pd.read_csv(executed / "crosscoder_labels.csv").set_index(["method", "label"]).share
    assert labels["self", "shared_same"] >= 0.99
    ours = pd.read_csv(executed / "planted_truth.csv").query("instrument == 'alignlens' and samples == samples.max()")
    assert ours.recall.mean() > 0.9
    assert ours.false_discovery.mean() < 0.1
    quality = pd.read_csv(executed / "sae_quality.csv")
    assert quality.r2.min() > 0.8
    assert quality.recovered.min() > 0.9
    index = pd.read_csv(executed / "figure_index.csv")
    assert index.item.tolist() == list(range(1, 71))
    named = {name for names in index.ours for name in names.split("; ")}
    assert not [name for name in named if not (executed / f"{name}.csv").exists()]


def test_every_claim_has_a_verdict_and_numbers_that_can_be_traced(executed):
    """One family cannot replicate anything: the rules ask for two."""
    document = claims.read(executed / "claims.json")
    assert [c["id"] for c in document["claims"]] == [f"C{i}" for i in range(1, 9)]
    assert {c["verdict"] for c in document["claims"]} == {claims.NOT_TESTABLE}
    for claim in document["claims"]:
        for number in claim["here_sound"]["numbers"]:
            assert number["run"] == document["run_id"]
            assert (executed / number["source"]).exists(), number


def test_the_audit_of_a_shipped_model_with_itself_is_a_page_that_finds_nothing(tmp_path):
    out, toy = tmp_path / "page", "tiny:llama"
    words = ["-p", "base", toy, "-p", "aligned", toy, "-p", "limit", 60, "-p", "sampled", 20, "-p", "out", out]
    done = papermill("audit", tmp_path / "audit.ipynb", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    verdict = {line["title"]: line["text"] for line in audit.read(out)["verdict"]}
    assert "nothing lies beyond noise" in verdict["How far it moved"]
    page = (out / "audit.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http" not in page.replace("http://www.w3.org", ""), "one file, nothing fetched"


def test_parameters_that_the_readme_shows_are_listed_where_papermill_looks():
    """Papermill warns of others, though they are valid."""
    shown = set(re.findall(r"-p (\w+)", (ROOT / "README.md").read_text().partition("## Change something")[2]))
    for path in [*(ROOT / "notebooks").glob("0*.ipynb"), ROOT / "notebooks" / "study.ipynb"]:
        listed = set(inspect_notebook(str(path)))
        assert {"folds", *shown} - {"variants"} <= listed, path.stem
        assert listed <= {*settings.Preset.model_fields, "preset"}


def test_the_driver_hears_no_warning_of_valid_names(tmp_path, caplog):
    given = notebooks.given({"preset": "smoke", "random_directions": 25})
    source = str(ROOT / "notebooks" / "03_probes.ipynb")
    execute_notebook(source, str(tmp_path / "out.ipynb"), parameters=given, prepare_only=True)
    assert not caplog.records


def test_a_mistyped_parameter_stops_the_run(tmp_path):
    done = papermill("study", tmp_path / "out.ipynb", "-p", "preset", "smoke", "-p", "sedes", "1")
    assert done.returncode != 0
    assert "'sedes' is unknown; did you mean 'seeds'?" in done.stderr


def test_a_failing_notebook_stops_the_study_and_says_where(tmp_path, smoke_store):
    done = papermill(
        "study", tmp_path / "out.ipynb", "-p", "preset", "smoke", "-p", "store", smoke_store, "-p", "figures", tmp_path,
        "-p", "measured", "3",
    )  # fmt: skip
    assert done.returncode != 0
    assert "prompts cannot fill 5 folds" in done.stderr
    assert "failed.ipynb" in done.stderr
    assert not (tmp_path / "smoke" / "00_bases.ipynb").exists()


def test_a_notebook_runs_alone_from_its_own_folder(tmp_path, smoke_store, executed):
    """As in JupyterLab, whose kernels start in the notebook's folder."""
    words = ["03_probes.ipynb", str(tmp_path / "out.ipynb"), "-p", "preset", "smoke", "-p", "store", str(smoke_store)]
    words += ["-p", "figures", str(tmp_path), "--no-progress-bar"]
    done = subprocess.run(
        [*PAPERMILL, *words], cwd=ROOT / "notebooks", capture_output=True, text=True, timeout=600, env=os.environ.copy()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    again, before = (pd.read_csv(p / "layer_metrics_grouped.csv") for p in (tmp_path / "smoke", executed))
    pd.testing.assert_frame_equal(again, before)
