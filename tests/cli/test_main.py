"""The command line: every command, wrong input, and what happens without the extra."""
# ruff: noqa: RUF001 (γ and the minus sign are meant)

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numba
import numpy as np
import pytest
from click.testing import CliRunner, Result
from registered import SCALE, UNUSUAL, registered
from rich.console import Console

import numbanorm as nn
from numbanorm.calls.config import config, show_config
from numbanorm.cli import demo
from numbanorm.cli.explain import Case, Reading, describe
from numbanorm.cli.main import cli
from numbanorm.core.norms import NORMS, NormRecord

ALL = [*NORMS, SCALE.kind]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(SCALE):
        yield


def run(*arguments: str, columns: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(cli, arguments)


def words(*arguments: str) -> str:
    """Return what ``numbanorm explain`` says, on one line."""
    result = run("explain", *arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        (
            "batch",
            ["each channel by itself", "N, H, W: 256 elements", "6 means and 6 variances", "shape (6,)", "differ"],
        ),
        ("layer", ["each sample by itself", "C, H, W: 384 elements", "4 means and 4 variances", "shape (6, 8, 8)"]),
        ("rms", ["C, H, W: 384 elements", "4 mean squares", "No mean is subtracted, no bias added"]),
        (
            "l2",
            ["y = x / max(‖x‖₂, ε) · γ", "Summed over C, H, W: 384", "4 Euclidean norms", "elementwise_affine=True"],
        ),
        ("scale", ["ScaleNorm of an array", "4 mean squares", "shape (): one γ for the whole array, shared by 1,536"]),
        ("instance", ["each channel of a sample by itself", "H, W: 64 elements", "24 means", "unless track_running"]),
        ("group", ["each group of 3 channels of a sample", "C/G, H, W: 192 elements", "8 means and 8 variances"]),
    ],
)
def test_explain_in_words(norm, said):
    output = words(norm, "--shape", "4,6,8,8", "--groups", "2")
    for phrase in said:
        assert phrase in output
    assert ("differ." in output) == (NORMS[norm].tracking == "usual")
    assert ("running_mean and running_var" in output) == NORMS[norm].tracks
    assert ("bias" in output.replace("no bias", "")) == NORMS[norm].bias


def test_every_record_has_words():
    """A norm may combine what none of the package's does."""
    usual = NormRecord(kind="usual", title="UsualNorm", reduced=frozenset({"space"}), by_channel=True, tracking="usual")
    with registered(*UNUSUAL[1:], usual):
        said = {record.kind: words(record.kind, "--shape", "4,6,8,8") for record in (*UNUSUAL, usual)}
    assert "the whole array at once" in said["whole"]
    assert "one γ and one β for the whole array" in said["whole"]
    assert "each position of a sample by itself" in said["position"]
    assert "y = x / √(mean of x² + ε) · γ" in said["channel-rms"]
    assert "one γ for each channel, shared by 256 elements" in said["channel-rms"]
    assert "each group of 3 channels by itself" in said["batch-group"]
    assert "the samples in a batch affect each other" in words("batch", "--shape", "4,6,8,8")
    assert "differ. Training uses the batch's own statistics; evaluation uses the running ones." in said["usual"]


def test_a_norm_is_known_from_when_it_is_registered():
    for command in (["explain", "--help"], ["apply", "--help"]):
        assert "|scale" in run(*command).output
    with registered(UNUSUAL[1]):
        assert "PositionNorm" in words("position", "--shape", "4,6")
        assert "|position" in run("explain", "--help").output
    assert "'position' is not one of" in run("explain", "position", "--shape", "4,6").output


def test_warmup_of_all_norms_takes_those_of_now(monkeypatch):
    taken: list[list[str]] = []
    monkeypatch.setattr("numbanorm.layers.warmup.warmup", lambda norms, *_, **__: taken.append(list(norms)))
    assert run("warmup").exit_code == 0
    assert run("warmup", "--norms", "rms, scale").exit_code == 0
    assert taken == [list(NORMS), ["rms", "scale"]]


def test_warmup_of_a_registered_norm():
    result = run("warmup", "--norms", "scale", "--forward")
    assert result.exit_code == 0, result.output


def test_explain_reads_three_axes_as_tokens_where_the_channels_are_last():
    for arguments in (["layer"], ["rms"], ["batch", "--channel-axis", "-1"]):
        assert "(sentence, position, embedding) = (4, 6, 8)" in words(*arguments, "--shape", "4,6,8")
    assert "embedding: 8 elements for each mean" in words("layer", "--shape", "4,6,8")
    assert "sentence, position: 24 elements for each mean" in words("batch", "--shape", "4,6,8", "--channel-axis", "-1")
    signal = words("batch", "--shape", "4,6,8")
    assert "(N, C, L) = (4, 6, 8)" in signal
    assert "add --channel-axis -1" in signal
    assert "C, L: 48 elements" in words("layer", "--shape", "4,6,8", "--channel-axis", "1")


def test_explain_axis():
    assert "averages over" not in words("layer", "--shape", "4,6,8,8", "--axis", "1")
    assert "Averaged over C: 6 elements" in words("layer", "--shape", "4,6,8,8", "--axis", "1")
    assert "each position of a sample by itself" in words("layer", "--shape", "4,6,8,8", "--axis", "1")
    assert "Averaged over H, W: 64 elements" in words("rms", "--shape", "4,6,8,8", "--axis", "-1,-2")
    assert "the whole array at once" in words("layer", "--shape", "4,6", "--axis", "0,1")


def test_explain_side_by_side():
    output = words("batch", "--shape", "4,6,8,8", "--groups", "2", "--all")
    assert "means 6 4 24 8" in output
    assert "elements each 256 384 64 192" in output
    assert "γ and β (6,) (6, 8, 8) (6,) (6,)" in output
    assert "elements per γ 256 4 256 256" in output


def test_explain_puts_another_norm_beside_the_textbooks(tmp_path: Path):
    output = words("scale", "--shape", "4,6,8,8", "--all", "-o", str(tmp_path / "norms.svg"))
    assert "means 6 4 24 8 4" in output
    assert "γ and β (6,) (6, 8, 8) (6,) (6,) ()" in output
    assert "elements per γ 256 4 256 256 1,536" in output
    assert "running stats yes no on request no no" in output
    assert (tmp_path / "norms.svg").read_text().count("<!-- ScaleNorm -->") == 2  # a title for each of its maps


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("norm", ALL)
def test_explain_fits_the_terminal(norm, columns):
    result = run("explain", norm, "--shape", "32,64,128,128", "--all", columns=columns)
    assert max(map(len, result.output.splitlines())) <= columns
    assert "…" not in result.output


@pytest.mark.parametrize("shape", [(4, 6, 8, 8), (4, 6, 8), (4, 6), (2, 3, 4, 5, 6), (2, 4, 3, 5, 3, 2)])
@pytest.mark.parametrize("channel_axis", [1, -1, 0])
@pytest.mark.parametrize("norm", ALL)
def test_code_makes_the_norm_that_is_explained(norm, channel_axis, shape):
    case = Case.of(norm, Reading.of(shape, channel_axis))
    code = dict(describe(case))["In code"]
    if "axis=(" in code:
        assert eval(code, {"nn": nn, "x": np.zeros(shape)}).shape == shape
        return
    layout = eval(code, {"nn": nn}).layout(shape)
    assert layout.stats_shape == case.layout.stats_shape
    assert layout.affine_shape == case.layout.affine_shape
    index = np.indices(shape)
    np.testing.assert_array_equal(layout.statistic(*index), case.layout.statistic(*index))
    np.testing.assert_array_equal(layout.weight(*index), case.layout.weight(*index))


def test_code_for_inner_axes_is_the_function():
    case = Case.of("layer", Reading.of((4, 6, 8)), axis=(1,))
    assert case.code == "nn.layer_norm(x, 6, axis=(1,))"
    x = np.random.default_rng(0).standard_normal((4, 6, 8))
    np.testing.assert_allclose(eval(case.code, {"nn": nn, "x": x}).mean(1), 0, atol=1e-12)


@pytest.mark.parametrize("norm", ALL)
def test_elements_that_are_alone(norm):
    """What is said of them is what the library does."""
    record = NORMS[norm]
    case = Case.of(norm, Reading.of((1, 3)), num_groups=3 if record.grouped else None, axis=(0,))
    assert case.layout.count == 1
    warning = dict(describe(case))["Beware"]
    x = np.array([[-2.0, 3.0, 5.0]])
    function_or_layer = eval(case.code, {"nn": nn, "x": x})
    if record.tracks:
        assert "ValueError" in warning
        with pytest.raises(ValueError, match="more than 1 value"):
            function_or_layer(x)
        return
    y = function_or_layer if isinstance(function_or_layer, np.ndarray) else function_or_layer(x)
    if record.centred:
        assert "becomes 0 before γ and β." in warning
        np.testing.assert_array_equal(y, np.zeros((1, 3)))
    else:
        assert "1 or −1 before γ." in warning
        np.testing.assert_allclose(y, [[-1, 1, 1]], 1e-5)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_explain_draws(tmp_path: Path, suffix):
    path = tmp_path / f"norms{suffix}"
    output = run("explain", "batch", "--shape", "4,6,8,8", "--all", "-o", str(path)).output
    assert f"The picture is in {path}" in output
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shape", "4,a"], "--shape: expected integers with commas between them, such as 4,6,8, got '4,a'"),
        (["--shape", ""], "--shape: expected integers"),
        (["--shape", "4"], "shape: expected two axes or more"),
        (["--shape", "4,0"], "shape: expected axes of length 1 or more, got 4,0"),
        (["--shape", "4,-6"], "shape: expected axes of length 1 or more, got 4,-6"),
        (["--shape", "99999999999,99999999999"], "fewer than 2**63 elements"),
        (["--shape", "4,6,8", "--groups", "4"], "num_groups: expected a divisor of the 6 channels, got 4"),
        (["--shape", "4,6,8", "--groups", "0"], "num_groups: expected a divisor of the 6 channels, got 0"),
        (["--shape", "4,6,8", "--channel-axis", "3"], "channel axis: expected an axis of shape 4,6,8, got 3"),
        (["--shape", "4,6,8", "--all", "--axis", "5"], "axis: expected one or more different axes"),
        (["--shape", "4,6,8", "--all", "--axis", "x"], "--axis: expected integers"),
        (["--shape", "4,6,8", "-o", "picture.pdf"], "expected a name that ends in .png or .svg, got 'picture.pdf'"),
        (["--shape", "4,6,8", "-o", "picture"], "expected a name that ends in .png or .svg, got 'picture'"),
        (["--shape", "4,6,8", "-o", "nowhere/picture.png"], "there is no folder 'nowhere'"),
    ],
)
def test_wrong_input_is_one_line(arguments, complaint):
    result = run("explain", "group", *arguments)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
    assert complaint in result.output


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "picture.png")

    monkeypatch.setattr("numbanorm.cli.figures.Figure.savefig", refuse)
    result = run("explain", "batch", "--shape", "4,6", "-o", str(tmp_path / "picture.png"))
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "Error: [Errno 13] Permission denied: 'picture.png'"


def test_unknown_norm():
    result = run("explain", "power", "--shape", "4,6")
    assert result.exit_code == 2
    assert "'power' is not one of" in result.output


def test_explain_without_a_picture_leaves_matplotlib_alone():
    code = (
        "import sys; from numbanorm.cli.main import cli;"
        "cli(['explain', 'batch', '--shape', '4,6'], standalone_mode=False);"
        "sys.exit('matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_and_version():
    output = run("--help").output
    for command in ("explain", "demo", "info"):
        assert command in output
    assert "      numbanorm explain batch --shape 4,6,8,8 -o batch.png\n" in output
    assert run("--version").output == f"numbanorm {nn.__version__}\n"


def test_info():
    output = run("info").output
    for expected in (np.__version__, numba.__version__, "threading layer", "cache", "\n  gpu  "):
        assert expected in output


def test_show_config_prints_all_of_config(capsys):
    show_config()
    lines = capsys.readouterr().out.splitlines()
    found = config()
    assert [line.split("  ")[0] for line in lines] == list(found)
    assert found["numpy"] == np.__version__
    assert found["threads"] == f"1 of {numba.config.NUMBA_NUM_THREADS}"
    assert "not installed" in found


def test_demo(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("numbanorm.cli.demo.BUDGET", 0.0)
    result = run("demo", columns=80)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    for title in ("How exact, and how fast", "What padding does", "Training and evaluation"):
        assert title in result.output
    assert result.output.splitlines()[-1] == "The picture is in numbanorm-demo.png"
    assert matplotlib.image.imread(tmp_path / "numbanorm-demo.png").shape[1] > 1000


def test_demo_needs_a_place_for_its_picture_first():
    result = run("demo", "-o", "nowhere/demo.png")
    assert result.exit_code == 1
    assert result.output == "Error: --output: there is no folder 'nowhere'\n"


@pytest.fixture(scope="module")
def data() -> tuple[dict[str, np.ndarray], np.ndarray]:
    return demo.load("minilm_tokens"), demo.load("astronaut_patches")["x"]


def test_demo_is_exact(data):
    trials = demo.trials(*data)
    assert {(trial.data, trial.name) for trial in trials} >= {("tokens", "LayerNorm"), ("patches", "GroupNorm")}
    for trial in trials:
        assert trial.error() < 5e-6
    assert trials[0].name == "LayerNorm"
    assert demo.difference(trials[0].norm(trials[0].x), data[0]["expected"]) < 5e-6


def test_demo_shows_what_padding_does(data):
    rows = dict(demo.padding(data[0]))
    assert rows["positions that share a mean"] == ["216", "110", "1"]
    batch, masked, layer = rows["37 more pads move words by up to"]
    assert float(batch) > 1
    assert float(masked) < 1e-5
    assert layer == "exactly 0"


def test_demo_shows_what_the_mode_does(data):
    rows = dict(demo.company(*data))
    training, evaluation, mode = rows.values()
    assert evaluation == ["exactly 0"] * 4
    for row in (training, mode):
        assert [value == "exactly 0" for value in row] == [False, True, False, True]
        assert float(row[0]) > 0.1
        assert float(row[2]) > 0.1


def test_demo_leaves_the_number_of_threads(monkeypatch):
    nn.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    used = []
    monkeypatch.setattr(demo, "_run", lambda *_: used.append(nn.get_num_threads()))
    demo.run(Console(quiet=True))
    assert used == [1]
    assert nn.get_num_threads() == numba.config.NUMBA_NUM_THREADS


@pytest.mark.parametrize("package", ["click", "rich", "matplotlib"])
def test_without_the_extra(package):
    """`python -m numbanorm` says what to install, and Python prints no traceback."""
    code = (
        f"import sys, runpy; sys.modules[{package!r}] = None; "
        "sys.argv = ['numbanorm', 'explain', 'batch', '--shape', '4,6', '-o', 'picture.png']; "
        "runpy.run_module('numbanorm', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"needs {package}" in result.stderr
    assert 'pip install "numbanorm[cli]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_other_import_errors_are_not_hidden():
    code = "import sys; sys.modules['numbanorm.cli.explain'] = None; from numbanorm.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in result.stderr
    assert "numbanorm[cli]" not in result.stderr


def test_module_and_console_script_are_the_same_command():
    result = subprocess.run(
        [sys.executable, "-m", "numbanorm", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"numbanorm {nn.__version__}\n"
