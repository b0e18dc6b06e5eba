import csv
import html
import io
import json
import re
import sys
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from lit_clipq.cli import main
from lit_clipq.errors import ConfigError
from lit_clipq.report import read_points, write_report
from lit_clipq.report.tables import csv_table
from tests.report.samples import METRICS, grid, line, run, write_lines, write_run

pytest.importorskip("matplotlib", reason="figures need it; `dev` brings it")
EVIL = """<script>alert(1)</script><img src="http://x" onerror='a'>"$x_1$"""


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def sweep_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_report([write_lines(folder, grid())], folder / "out")
    return folder / "out"


def test_numbers_in_the_csv_equal_those_in_the_inputs(tmp_path):
    paths = [write_run(tmp_path, "a.json"), write_run(tmp_path, "b.json", bits=8, loss=1 / 3)]
    rows = list(csv.DictReader(io.StringIO(csv_table(read_points(paths).points))))
    for bits, loss in ((4, 0.05), (8, 1 / 3)):
        content = run(bits=bits, loss=loss)
        own = [row for row in rows if row["method"] == "ptq4clip" and row["vision_weight_bits"] == str(bits)]
        assert {row["metric"]: float(row["value"]) for row in own} == content["metrics"]["quantized"]
        assert {float(row["difference"]) for row in own} == {-loss}
        assert {int(row["bytes"]) for row in own} == {content["size_bytes"]["quantized"]}
    assert {row["metric"]: float(row["value"]) for row in rows if row["method"] == "float"} == METRICS


def test_the_page_loads_nothing_and_runs_nothing(sweep_report):
    page = (sweep_report / "report.html").read_text()
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b", page, re.IGNORECASE)
    assert not re.search(r"\b(src|href|action|poster|data)\s*=\s*(?![\"']?(data:|#))", page, re.IGNORECASE)
    assert not re.search(r"url\((?!#)|@import|\bon\w+\s*=", page, re.IGNORECASE)


def test_the_page_has_unique_ids_and_no_dangling_ones(sweep_report):
    page = (sweep_report / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(ids)


def test_text_from_data_is_escaped_everywhere(tmp_path):
    told = {"lost": 1, "won": 0, "pictures": 2, "rows": [{"file": EVIL, "own": EVIL, "float": EVIL, "quantized": EVIL}]}
    write_run(tmp_path, model=EVIL, task=EVIL, pretrained=EVIL, method=EVIL, command=EVIL, mistakes=told,
              versions={EVIL: EVIL}, samples={EVIL: 3})  # fmt: skip
    failed = line(EVIL, 2, 2, error=EVIL, metrics={})
    lines = [line(None, 32, 32), *(line(EVIL, b, b, metrics={EVIL: 0.1 * b}) for b in (4, 8)), failed]
    write_report([tmp_path / "results.json", write_lines(tmp_path, lines)], tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page  # the picture's file does not exist
    assert "onerror='" not in page
    assert html.escape(EVIL) in page
    assert "<script" not in (tmp_path / "out/report.md").read_text()
    for path in (tmp_path / "out/figures").glob("*.svg"):
        root = ET.parse(path).getroot()  # noqa: S314
        assert not [e for e in root.iter() if e.tag.endswith(("script", "image", "foreignObject"))]


def test_a_formula_in_a_name_is_text_to_a_spreadsheet(tmp_path):
    points = read_points([write_run(tmp_path, model="=HYPERLINK(1)")]).points
    rows = list(csv.DictReader(io.StringIO(csv_table(points))))
    assert {row["model"] for row in rows} == {"'=HYPERLINK(1)"}


def test_the_same_input_gives_the_same_bytes(tmp_path, sweep_report):
    write_report([sweep_report.parent / "results.jsonl"], tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(sweep_report)


def test_a_sweep_is_drawn_with_every_figure_as_svg_and_png(sweep_report):
    names = {path.stem for path in (sweep_report / "figures").glob("*.svg")}
    assert names == {path.stem for path in (sweep_report / "figures").glob("*.png")}
    assert names == {f"01-recall-1-i2t-{kind}" for kind in ("bits", "heat-1", "methods", "size")}
    for path in (sweep_report / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(image.convert("L").getcolors()) > 20


def test_figures_follow_dark_mode_and_say_what_they_show(sweep_report):
    text = (sweep_report / "figures/01-recall-1-i2t-bits.svg").read_text()
    assert "prefers-color-scheme: dark" in text
    assert 'aria-label="recall@1_i2t against bits"' in text
    assert "width of weights and activations (bits)" in text
    assert "recall@1_i2t (%)" in text
    bare = re.sub(r"var\(--c[0-9a-f]{6}, #[0-9a-f]{6}\)", "", text)
    assert "#1b1b1c" not in bare  # every ink has its dark counterpart


def test_the_heat_map_shows_its_numbers(sweep_report):
    text = (sweep_report / "figures/01-recall-1-i2t-heat-1.svg").read_text()
    shown = set(re.findall(r">(\d+\.\d)</text>", text))
    expected = {"70.0"} | {
        f"{100 * (0.01 * v + 0.001 * t + 0.0001):.1f}" for v in (32, 8, 4) for t in (32, 8, 4) if (v, t) != (32, 32)
    }
    assert expected <= shown


def test_a_run_with_nothing_quantized_shows_one_column(tmp_path):
    write_report([write_run(tmp_path, method=None)], tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "<th>metric</th><th>float</th></tr>" in page
    assert "Nothing is quantized" in page
    assert "69.80" in page
    for absent in ("smaller", "+0.00", "bootstrap", "<svg"):
        assert absent not in page


def test_a_picture_is_inside_of_the_page(tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (640, 320), "red").save(picture)
    row = {"file": str(picture), "own": "a red one", "float": "a red one", "quantized": "a blue one"}
    told = {"lost": 1, "won": 0, "pictures": 2, "rows": [row]}
    write_report([write_run(tmp_path, mistakes=told)], tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert 'src="data:image/jpeg;base64,' in page
    assert "a blue one" in page


def test_an_analysis_is_drawn_over_depth_with_what_to_paste(tmp_path):
    def row(scope, layer, operand, predicted):
        return {"scope": scope, "layer": layer, "tower": "vision", "operand": operand, "predicted": predicted}

    rows = [
        row("operand", f"clip.visual.blocks.{i}.fc", o, 1e-4 * (i + 1)) for i in range(3) for o in ("weight", "input")
    ]
    patterns = {"share": 0.5, "exclude": ["clip.visual.blocks.2.fc"], "widths": {"clip.visual.blocks.2.fc": "w8"}}
    content = {"model": "m", "recipe": "vanilla", "widths": "W4A4", "sensitivity": rows, "patterns": patterns}
    (tmp_path / "analysis.json").write_text(json.dumps(content))
    write_report([tmp_path], tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert (tmp_path / "out/figures/sensitivity-01.svg").is_file()
    assert html.escape("""--quantize.exclude '["clip.visual.blocks.2.fc"]'""") in page


def test_without_matplotlib_the_pip_line_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'lit-clipq\[report\]'"):
        write_report([write_run(tmp_path)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_and_tells(tmp_path, capsys):
    write_lines(tmp_path, [line(None, 32, 32), line("vanilla", 2, 2, error="no data", metrics={})])
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "vanilla" in told
    assert "no data" in told
    assert (tmp_path / "out/report.html").is_file()


@pytest.mark.parametrize("args", [[], ["nowhere.json"], ["--unknown"]])
def test_a_report_of_nothing_is_one_sentence_and_exit_code_1(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *args]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_report_into_a_file_is_refused(tmp_path, capsys):
    target = tmp_path / "file"
    target.write_text("kept")
    assert main(["report", str(write_run(tmp_path)), "--out", str(target)]) == 1
    assert (
        capsys.readouterr().err
        == f"error: expected a folder for the report, but {target} is a file; give another --out\n"
    )
    assert target.read_text() == "kept"
