"""The step of a run that measures redundancy, and analyses made before."""

from __future__ import annotations

from pathlib import Path

from foldgpt.analysis import Analysis, SourceIdentity, analyze
from foldgpt.artifacts import read_json
from foldgpt.errors import ArtifactError
from foldgpt.run_folder import ANALYSIS
from foldgpt.workbench import Workbench


def make_analysis(bench: Workbench, checkpoint: Path | None = None) -> Analysis:
    """Measure the redundancy of the recipe's model on its calibration text.

    Args:
        bench: the inputs.
        checkpoint: where a long sweep keeps its progress. It stays: whoever has saved the analysis drops it.
    """
    recipe = bench.recipe
    windows = bench.calibration
    source = bench.source
    return analyze(
        source.model,
        windows.ids,  # type: ignore[arg-type]
        checkpoint=checkpoint,
        source=SourceIdentity(spec=recipe.model, revision=source.revision, fingerprint=bench.fingerprint),
        calibration=bench.calibration_identity,
    )


def read_analysis(path: Path) -> Analysis:
    """Read an analysis made before.

    Args:
        path: the file, or a run folder that holds it.

    Raises:
        ArtifactError: it is not an analysis.
    """
    file = path / ANALYSIS if path.is_dir() else path
    try:
        return Analysis.from_json_dict(read_json(file, "analysis"))
    except ArtifactError as error:
        raise ArtifactError(str(error) if str(file) in str(error) else f"{file}: {error}") from None


def check_analysis(analysis: Analysis, bench: Workbench, place: Path) -> None:
    """Refuse an analysis of another model.

    Args:
        analysis: what `read_analysis` gave.
        bench: whose model it must be of.
        place: where it lies, for the error message.

    Raises:
        ArtifactError: it is of another model.
    """
    if analysis.source is not None and analysis.source.fingerprint != bench.fingerprint:
        raise ArtifactError(
            f"{place} is an analysis of another model ({analysis.source.spec}), not of {bench.recipe.model}"
        )
