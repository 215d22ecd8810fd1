"""The notebooks run from top to bottom, and what is committed of them was run that way.

The tests execute each at a small size, set in the cell tagged `parameters`. `python tests/test_notebooks.py` executes
them at full size and stores their outputs, which is how the committed ones were made.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import bitnet

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
kernelspec = pytest.importorskip("ipykernel.kernelspec")

FOLDER = Path(__file__).parents[1] / "notebooks"
SMALL = {
    "01_ternary": "WIDEST = 256",
    "02_train_small": "TEXT_BYTES, VOCAB_SIZE, HIDDEN_SIZE, STEPS = 400_000, 512, 96, 20",
    "03_autograd": "STEPS, DIRECTIONS = 20, 2",
    "04_generate": "TEXT_BYTES, STEPS = 600_000, 10",
    "05_twin": "TEXT_BYTES, STEPS, SEEDS = 400_000, 8, 2",
    "06_fine_tune": "BASE_STEPS, TUNING_STEPS = 10, 10",
}
MOST_BYTES = 400_000
MACHINE_PATH = re.compile(r"/(?:home|root|tmp|usr|opt|work|Users|var)/|[A-Z]:\\")


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(notebook: Any, folder: Path) -> Any:
    """Runs the notebook in this interpreter and with this bitnet; it may leave files in `folder` only."""
    kernelspec.write_kernel_spec(folder / "kernels" / "python3")  # found before any other kernel of that name
    (folder / "work").mkdir()
    environment = {
        "JUPYTER_PATH": folder,
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "IPYTHONDIR": folder / "ipython",
        "TMPDIR": folder / "work",
        "PYTHONPATH": os.pathsep.join([str(Path(bitnet.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, str(value))
        patch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows figures in the notebook
        client = nbclient.NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder / "work")}},
        )
        return client.execute()  # raises CellExecutionError with the cell and its traceback


def figures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(notebook: Any) -> Any:
    """The cell that says how large everything is."""
    (cell,) = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", ())]
    return cell


@pytest.mark.parametrize("name", SMALL)
def test_runs_from_top_to_bottom(name: str, tmp_path: Path) -> None:
    committed, notebook = read(name), read(name)
    parameters(notebook).source = SMALL[name]
    for cell in code_cells(notebook):
        cell.outputs = []
    execute(notebook, tmp_path)
    assert not [output for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "error"]
    assert figures(notebook) == figures(committed) > 0


@pytest.mark.parametrize("name", SMALL)
def test_committed_outputs_are_of_one_clean_run(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not MACHINE_PATH.search(text), text


def test_small_sizes_set_every_parameter() -> None:
    for name, small in SMALL.items():
        names = re.findall(r"^[A-Z_]+", parameters(read(name)).source, re.MULTILINE)
        assert set(re.findall(r"[A-Z_]{3,}", small)) == set(names)


def main() -> None:
    for name in SMALL:
        path, notebook = FOLDER / f"{name}.ipynb", read(name)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        nbformat.write(notebook, path)
        print(f"{path}: {figures(notebook)} figures, {path.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
