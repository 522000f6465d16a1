import copy
import doctest
import html
import re
from unittest.mock import MagicMock

import pytest

from asr_kd import figures
from asr_kd.errors import AsrKdError
from asr_kd.page import to_markdown
from asr_kd.report import NONE, headline, make_page, write_report


def system(frame_accuracy, errors, words=2000, **more):
    wer = errors / words
    return {"frame_accuracy": frame_accuracy, "frame_accuracy_ci95": [frame_accuracy - 0.01, frame_accuracy + 0.02], "wer": wer,
            "wer_ci95": [wer - 0.011, wer + 0.012], "errors": errors, "words": words,
            "substitutions": errors - 60, "deletions": 23, "insertions": 37, "real_time_factor": 0.0713, **more}


@pytest.fixture(scope="module")
def complete():
    members = [{"frame_accuracy": 0.4551, "wer": 0.251}, {"frame_accuracy": 0.4563, "wer": 0.259}, {"frame_accuracy": 0.4557}]
    bins = [{"confidence": 0.3, "accuracy": 0.25, "frames": 10}, {"confidence": 0.9, "accuracy": 0.92, "frames": 30}]
    rates = {name: {"errors": errors, "words": 1000, "wer": errors / 1000} for name, errors in (("baseline", 251), ("ensemble", 240), ("distilled", 246))}
    return {
        "splits": {"dev-mini": {"baseline": system(0.4557, 1020, 4000), "ensemble": system(0.4761, 482, probability_better=0.993),
                                "distilled": system(0.4737, 487, probability_better=0.971), "control": system(0.4581, 511, probability_better=0.44),
                                "members": members, "gain_kept": {"frame_accuracy": 0.88, "wer": 0.82}}},
        "stages": {"features": 53.24, "teachers": 1013.0}, "settings": {"num_teachers": 3, "temperature": 2.0, "lexicon": ["a<b>.txt"]},
        "decoding": {"acoustic_scale": 0.12},
        "curves": {"teachers": {"epoch": [1, 2], "frame_accuracy": [[0.41, 0.42], [0.44, None]], "train_frame_accuracy": [[0.5, 0.5], [0.6, 0.6]]},
                   "distilled": {"epoch": [1, 2], "frame_accuracy": [[None], [0.47]]}},
        "temperature_sweep": {"split": "dev-mini", "rows": [{"temperature": 1.0, "frame_accuracy": 0.47, "wer": 0.25},
                                                           {"temperature": 2.0, "frame_accuracy": 0.4737}]},
        "errors": {"dev-mini": {"per_speaker": {"1272": rates, "84": rates}, "phones": [{"reference": "a$1", "predicted": "b$2", "frames": 31, "share": 0.11}],
                                "words": {"substitutions": [["AND", "IN", 31]], "deletions": [["A", 30]], "insertions": []}}},
        "calibration": {"dev-mini": {"ensemble": {"ece": 0.031, "bins": bins, "nll": 2.0345, "brier": 0.7}, "distilled": {"ece": 0.02, "bins": bins}}},
        "cost_of_normalisation": {"dev-mini": {"speaker": rates["distilled"], "map": rates["baseline"]}},
        "exclusions": {"train-mini": {"word outside the lexicon": 3}}, "environment": {"torch": "2.11.0"}}


@pytest.fixture
def results(complete):
    return copy.deepcopy(complete)


@pytest.fixture(scope="module")
def folder(complete, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, complete)
    return folder


def test_html_refers_to_nothing_outside_itself(folder):
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|<script|<link|<iframe|@import|src=", page)
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {f"#{name}" for name in re.findall(r'id="([^"]+)"', page)}
    assert len(re.findall(r"<svg", page)) == 7
    assert "a$1 → b$2" in page  # as named, not as a formula
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def table_of(page, name):
    """The first table below a heading, as {first cell: other cells}."""
    body = re.search(rf"<h2>{name}</h2>.*?<tbody>(.*?)</tbody>", page, re.DOTALL).group(1)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("</tr>") if "<td" in row]
    return {html.unescape(row[0]): [html.unescape(cell) for cell in row[1:]] for row in rows}


def test_every_number_of_the_table_is_that_of_results_json(folder, results):
    page = (folder / "report.html").read_text()
    shown = table_of(page, "Results on dev-mini")
    assert shown.pop("Single network, mean") == ["45.57 ± 0.06", "44.6 to 47.6", "25.5 ± 0.6", "24.4 to 26.7", "1020 / 4000", "960 / 23 / 37", "0.071", NONE]
    names = {"Ensemble of 3": "ensemble", "Distilled student": "distilled", "Control (hard targets)": "control"}
    assert shown.keys() == names.keys()
    for name, cells in shown.items():
        row = results["splits"]["dev-mini"][names[name]]
        accuracy, of_accuracy, wer, of_wer, errors, edits, real_time_factor, better = cells
        assert float(accuracy) == pytest.approx(100 * row["frame_accuracy"], abs=0.0051)
        assert float(wer) == pytest.approx(100 * row["wer"], abs=0.051)
        for measure, interval in (("frame_accuracy", of_accuracy), ("wer", of_wer)):
            assert [float(end) for end in interval.split(" to ")] == pytest.approx([100 * end for end in row[f"{measure}_ci95"]], abs=0.051)
        assert errors == f"{row['errors']} / {row['words']}"
        assert edits == f"{row['substitutions']} / {row['deletions']} / {row['insertions']}"
        assert (float(real_time_factor), float(better)) == pytest.approx((row["real_time_factor"], row["probability_better"]), abs=5e-4)


def test_markdown_has_the_same_cells(folder):
    markdown = (folder / "report.md").read_text()
    for name, cells in table_of((folder / "report.html").read_text(), "Results on dev-mini").items():
        assert "| " + " | ".join([name, *cells]) + " |" in markdown
    assert "*Figure in report.html: Frame accuracy on held-out speakers" in markdown
    for table in markdown.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1


def test_calibration_table(folder):
    shown = table_of((folder / "report.html").read_text(), "Calibration")
    assert shown == {"Ensemble": ["3.10", "2.034", "0.700"], "Distilled student": ["2.00", NONE, NONE]}


def test_headline(results):
    rows = results["splits"]["dev-mini"]
    assert headline("dev-mini", rows) == "One network keeps 88 % of the ensemble's gain in frame accuracy and 82 % of its gain in word error rate on dev-mini."
    better = rows | {"control": rows["distilled"] | {"wer": rows["distilled"]["wer"] - 0.01}}
    assert headline("dev-mini", better).endswith(" on dev-mini. The control, trained as long on hard targets alone, has the better word error rate.")
    better["distilled"] = rows["distilled"] | {"probability_better_than_control": 0.3}
    assert headline("dev-mini", better).endswith(" the better word error rate (P = 0.70 by paired bootstrap).")
    rows["ensemble"]["probability_better"] = 0.94
    assert headline("dev-mini", rows) == ("One network keeps 88 % of the ensemble's gain in frame accuracy on dev-mini. "
                                          "The ensemble's gain in word error rate is within the noise (P = 0.94 by paired bootstrap).")
    rows["ensemble"]["probability_better"] = 0.95
    assert "82 % of its gain in word error rate" in headline("dev-mini", rows)
    rows["ensemble"]["wer"] = rows["baseline"]["wer"] + 0.001
    assert headline("dev-mini", rows) == "One network keeps 88 % of the ensemble's gain in frame accuracy on dev-mini."
    rows["ensemble"]["frame_accuracy"] = 0.45
    assert "no gain to keep" in headline("dev-mini", rows)
    rows["ensemble"]["wer"], rows["gain_kept"]["wer"] = 0.24, -0.3
    assert "keeps none (-30 %) of the ensemble's gain in word error rate" in headline("dev-mini", rows)


def test_how_student_and_control_differ_is_said(results, tmp_path):
    shape = {"hidden_units": 512, "dropout": 0.0}
    results["networks"] = {"distilled": shape, "control": dict(shape)}
    page = write_report(tmp_path, results).read_text()
    assert "from hard targets alone.</p>" in page
    assert "one training each" in page
    results["networks"]["control"] = shape | {"dropout": 0.1}
    assert "from hard targets alone. They also differ in dropout (0.0 the student, 0.1 the control)." in write_report(tmp_path, results).read_text()


def test_sizes_and_epochs_of_teachers_and_student_are_said(results, tmp_path):
    results["networks"] = {"teachers": {"hidden_layers": 4, "hidden_units": 512, "num_states": 1187},
                           "distilled": {"hidden_layers": 2, "hidden_units": 64, "num_states": 1187}}
    results["settings"] |= {"num_teachers": 4, "teacher_epochs": 6.0, "student_epochs": 10, "num_states": 1200}
    page = write_report(tmp_path, results).read_text()  # one teacher was left out, and the tree stopped earlier
    assert "3 teachers of 4 \u00d7 512 units, 6 epochs · one student of 2 \u00d7 64 units, 10 epochs · T = 2 · 1187 states" in page


def test_what_was_resampled_is_said(results, tmp_path):
    rows = results["splits"]["dev-mini"]
    rows["bootstrap"] = {"resampled": "utterances", "speakers": 4}
    assert "of these 4 speakers, and say nothing about others" in write_report(tmp_path, results).read_text()
    rows["bootstrap"] = {"resampled": "speakers", "speakers": 40}
    assert "Bootstrap over 40 speakers" in write_report(tmp_path, results).read_text()


def test_searches_without_an_end_are_counted(results, tmp_path):
    rows = results["splits"]["dev-mini"]
    rows["ensemble"]["unfinished"] = 0
    assert "final state" not in write_report(tmp_path, results).read_text()
    rows["baseline"]["unfinished"] = 7
    assert "best unfinished words count: 7 (Single network)." in write_report(tmp_path, results).read_text()


def test_tables_have_their_titles_in_both_forms(folder):
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "<h3>Decoding, chosen on the tuning speakers</h3>" in page
    assert "### Decoding, chosen on the tuning speakers\n\n| Setting | Value |" in text
    for title in ("All settings", "Machine and versions", "Members one by one", "Stages in seconds"):
        assert f"<summary>{title}</summary>" in page
        assert f"**{title}**\n\n| " in text


def test_no_share_is_kept_of_a_gain_that_there_is_not(results):
    rows = results["splits"]["dev-mini"]
    assert "Gain kept, frame accuracy" in [tile[0] for tile in make_page(results).tiles]
    rows["ensemble"]["frame_accuracy"] = rows["baseline"]["frame_accuracy"] - 0.01
    assert "Gain kept, frame accuracy" not in [tile[0] for tile in make_page(results).tiles]


def test_every_part_is_optional(results, tmp_path):
    for part in results:
        write_report(tmp_path, {part: results[part]})
    bare = {"splits": {"dev": {"baseline": {"frame_accuracy": 0.5}, "ensemble": {"frame_accuracy": 0.52}, "distilled": {"frame_accuracy": 0.515},
                               "gain_kept": {"frame_accuracy": 0.75, "wer": None}}}, "stages": {}, "settings": {}}
    page = write_report(tmp_path, bare).read_text()
    assert "keeps 75 % of the ensemble's gain in frame accuracy on dev." in page
    assert table_of(page, "Results on dev")["Ensemble"] == ["52.00", *[NONE] * 7]
    assert [section.title for section in make_page(bare).sections] == ["Results on dev"]


def lacking(value):
    """Copies of nested results, each without one key of one dictionary, or with one dictionary or list of dictionaries emptied."""
    if isinstance(value, dict):
        yield {}
        for key, item in value.items():
            yield {name: other for name, other in value.items() if name != key}
            yield from ({**value, key: changed} for changed in lacking(item))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield []
        for k, item in enumerate(value):
            yield from ([*value[:k], changed, *value[k + 1:]] for changed in lacking(item))


def test_every_key_is_optional(complete, monkeypatch):
    def panels(count, height_inches, *, sharey=False):
        assert count > 0
        return MagicMock(), [MagicMock() for _ in range(count)]

    monkeypatch.setattr(figures, "_panels", panels)  # every value is read, nothing is drawn
    monkeypatch.setattr(figures, "_svg", lambda figure, name: "")
    count = 0
    for part, value in complete.items():
        for changed in lacking(value):
            make_page({part: changed})
            count += 1
    assert count > 150


@pytest.mark.parametrize("rows", [{}, {"baseline": {}}, {"baseline": {}, "ensemble": {}, "distilled": {}}, {"members": []}])
def test_split_without_a_measure(rows, tmp_path):
    page = write_report(tmp_path, {"splits": {"a": rows}}).read_text()
    assert "<svg" not in page
    assert "Results on a: " in page
    assert all(cells == [NONE] * 8 for cells in table_of(page, "Results on a").values())


def test_what_is_whole_is_shown_without_what_is_not(results):
    del results["splits"]["dev-mini"]["distilled"]["frame_accuracy"]
    del results["calibration"]["dev-mini"]["ensemble"]["bins"]
    results["errors"]["dev-mini"]["per_speaker"]["84"] = results["errors"]["dev-mini"]["per_speaker"]["84"] | {"ensemble": {"errors": 240}}
    results["temperature_sweep"]["rows"].append({"frame_accuracy": 0.4})
    page = to_markdown(make_page(results))
    assert "One network keeps 82 % of the ensemble's gain in word error rate on dev-mini." in page
    assert "| Ensemble | 3.10 | 2.034 | 0.700 |" in page
    assert "| 84 | 25.1 (251 / 1000) | \u2013 | 24.6 (246 / 1000) |" in page
    assert "40.00" not in page


def test_what_others_named_is_no_markdown(results):
    results["errors"]["dev-mini"]["words"]["deletions"] = [["<noise>", 31], ["a|*b*", 3]]
    page = to_markdown(make_page(results))
    assert r"| \<noise> (31) |" in page
    assert r"| a\|\*b\* (3) |" in page


def test_the_cost_of_normalisation_names_what_training_subtracted(results):
    assert "subtract each speaker's mean features. A file from" in to_markdown(make_page(results))
    rates = results["cost_of_normalisation"]["dev-mini"]
    results["cost_of_normalisation"]["dev-mini"] = {"corpus": rates["speaker"], "training": rates["map"]}
    results["settings"]["cmvn"] = "corpus"
    page = to_markdown(make_page(results))
    assert "subtract each split's mean features; transcribe subtracts that of the training data." in page
    assert "| dev-mini | Mean of the training data (transcribe) |" in page


def test_members_keep_their_numbers_when_one_was_left_out(results):
    for number, row in zip((1, 3, 4), results["splits"]["dev-mini"]["members"], strict=True):
        row["number"] = number
    page = to_markdown(make_page(results))
    rows = page[page.index("**Members one by one**"):].split("\n\n")[1].splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 3", "| 4"]


def test_of_many_speakers_the_worst_are_drawn(results):
    rates = results["errors"]["dev-mini"]["per_speaker"]["84"]
    results["errors"]["dev-mini"]["per_speaker"] = {f"s{n}": {system: row | {"wer": n / 1000} for system, row in rates.items()} for n in range(100)}
    page = to_markdown(make_page(results))
    assert f"The {figures.MAX_SPEAKERS} speakers of 100 with the highest word error rates." in page
    drawn = figures.speakers_figure(results["errors"]["dev-mini"]["per_speaker"])
    assert ">s99<" in drawn
    assert ">s60<" in drawn
    assert ">s59<" not in drawn


def test_what_others_named_is_escaped(results, tmp_path):
    results["splits"]["<script>"] = results["splits"].pop("dev-mini")
    for part in ("curves", "temperature_sweep", "calibration"):
        del results[part]
    results["errors"] = {"dev": {"per_speaker": {"a<b&c": results["errors"]["dev-mini"]["per_speaker"]["84"]}}}
    page = write_report(tmp_path, results).read_text()
    assert "<script>" not in page
    assert "a<b" not in page
    assert "a&lt;b&amp;c" in page
    assert "a&lt;b&gt;.txt" in page


def test_same_results_same_page(folder, results, tmp_path):
    assert write_report(tmp_path, results).read_bytes() == (folder / "report.html").read_bytes()


def test_file_that_cannot_be_written(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(AsrKdError, match=r"report\.html: could not be written"):
        write_report(tmp_path, {})


def test_doctests():
    assert doctest.testmod(figures).failed == 0
