"""Turn results into a page: `report.md` and a self-contained `report.html` beside `results.json`.

What is read of `results`: the contract of results.json, and more where it is there. Fractions, never per cent; every key
below is optional, also inside a row (a system that was not decoded has no WER); what cannot be shown without a key is left out.

    splits: {split: {baseline|ensemble|distilled|control:
                 {frame_accuracy, frame_accuracy_ci95: [lo, hi], wer, wer_ci95: [lo, hi], errors, words, substitutions, deletions, insertions,
                  real_time_factor, probability_better: P(lower WER than the baseline), probability_better_than_control: the student's,
                  unfinished: utterances whose search ended in no final state,
                  decoded_members: how many members' words, errors and unfinished utterances are added up in the baseline},
             members: [{number: from 1, frame_accuracy, wer?, ...}], gain_kept: {frame_accuracy, wer},
             bootstrap: {resampled: speakers|utterances, speakers: how many there are}}}
    references: {split: {words, out_of_vocabulary: how many of them are not in the graph, speakers_in_training: [speaker, ...]}}
    networks: {teachers|distilled|control: {hidden_layers, hidden_units, dropout, precision, ...}}
    stages: {stage: seconds}                settings: {key: value}
    decoding: {key: value}                  acoustic scale, word insertion penalty, ... as chosen on the tuning speakers
    curves: {teachers|distilled|control: {epoch: [e, ...], frame_accuracy: [[one value per member], ...],
                                          train_frame_accuracy: the same, optional}}   (None for a member that diverged)
    temperature_sweep: {split, rows: [{temperature, frame_accuracy, wer?, errors?, words?}]}
    errors: {split: {per_speaker: {speaker: {system: {errors, words, wer}}},
                     words: {substitutions: [[spoken, recognised, count]], deletions: [[word, count]], insertions: [[word, count]]},
                     phones: [{reference, predicted, frames, share}]}}                  words and phones: the student's
    calibration: {split: {system: {ece, bins: [{confidence, accuracy, frames}], nll?, brier?}}}      per frame, nll in nats
    cost_of_normalisation: {split: {speaker|map|utterance|corpus|training: {wer, errors, words}}}
    exclusions: {split: {reason: count}}    utterances left out
    environment: {key: value}               versions, processor, threads
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asr_kd import __version__
from asr_kd.figures import (
    MAX_SPEAKERS,
    NAMES,
    SYSTEMS,
    calibration_figure,
    confusions_figure,
    curves_figure,
    duration,
    speakers_figure,
    stages_figure,
    sweep_figure,
    systems_figure,
)
from asr_kd.page import Figure, Note, Page, Section, Table, Text, to_html, to_markdown
from asr_kd.stage import write_text

NONE = "\u2013"  # en dash
SURE = 0.95  # probability, by paired bootstrap, from which a gain in WER is called one
Results = Mapping[str, Any]


def write_report(output_folder: Path | str, results: Results) -> Path:
    """Write `report.md` and `report.html` into `output_folder`; return the path of the latter.

    Raises:
        AsrKdError: the folder cannot be written to.
    """
    folder = Path(output_folder)
    page = make_page(results)
    write_text(folder / "report.md", to_markdown(page))
    write_text(folder / "report.html", to_html(page))
    return folder / "report.html"


def make_page(results: Results) -> Page:
    """Everything that the report says, before it becomes Markdown or HTML."""
    splits = results.get("splits", {})
    sections = [_split_section(split, rows, results.get("networks", {}), results.get("references", {}).get(split, {})) for split, rows in splits.items()]
    sections += [_curves(results), _sweep(results), _errors(results), _calibration(results), _normalisation(results),
                 _exclusions(results), _stages(results), _settings(results)]
    first = next(iter(splits), None)
    return Page(title="Distilling an ensemble: results", kicker=_kicker(results, first),
                headline=headline(first, splits[first]) if first else "No split was scored.", tiles=_tiles(splits[first]) if first else [],
                sections=[section for section in sections if section.blocks],
                footer=f"asr_kd {__version__}. The numbers are those of results.json beside this file; fractions there, per cent here.")


def headline(split: str, rows: Mapping[str, Any]) -> str:
    """One sentence: what of the ensemble's gain the student kept."""
    scored, decoded = (all(measure in rows.get(system, {}) for system in ("baseline", "ensemble", "distilled")) for measure in ("frame_accuracy", "wer"))
    if not scored and not decoded:
        return f"Results on {split}: {', '.join(NAMES[system].lower() for system in SYSTEMS if system in rows) or 'none'}."
    gains = []
    if scored and rows["ensemble"]["frame_accuracy"] > rows["baseline"]["frame_accuracy"]:
        gains.append(f"{_kept(rows, 'frame_accuracy')} of the ensemble's gain in frame accuracy")
    noise = ""
    if decoded and rows["ensemble"]["wer"] < rows["baseline"]["wer"]:
        certainty = rows["ensemble"].get("probability_better", 1.0)
        if certainty >= SURE:
            whose = "its" if gains else "the ensemble's"
            gains.append(f"{_kept(rows, 'wer')} of {whose} gain in word error rate")
        else:
            noise = f" The ensemble's gain in word error rate is within the noise (P = {certainty:.2f} by paired bootstrap)."
    sentence = f"One network keeps {' and '.join(gains)}" if gains else "The ensemble was not surely better than its members: there was no gain to keep"
    return f"{sentence} on {split}.{noise}{_control_caveat(rows.get('control', {}), rows['distilled'])}"


def _control_caveat(control: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """Says where hard targets alone do better than the student: there its gain comes from its longer training, not from its teachers."""
    directions = {"frame_accuracy": ("frame accuracy", 1), "wer": ("word error rate", -1)}
    shared = [measure for measure in directions if measure in control and measure in student]
    better = [name for measure, (name, sign) in directions.items() if measure in shared and sign * control[measure] > sign * student[measure]]
    if not better:
        return ""
    certainty = student.get("probability_better_than_control")
    doubt = f" (P = {1 - certainty:.2f} by paired bootstrap)" if certainty is not None and better[-1] == "word error rate" else ""
    return f" The control, trained as long on hard targets alone, has the better {' and '.join(better)}{doubt}."


def _kept(rows: Mapping[str, Any], measure: str) -> str:
    """The share from `gain_kept`, or from the rows where it is not given; only for a positive gain."""
    gain = rows["ensemble"][measure] - rows["baseline"][measure]
    share = rows.get("gain_kept", {}).get(measure)
    share = (rows["distilled"][measure] - rows["baseline"][measure]) / gain if share is None else share
    return f"none ({_percent(share, 0)} %)" if share <= 0 else f"{_percent(share, 0)} %"


def _kicker(results: Results, first: str | None) -> str:
    settings, networks = results.get("settings", {}), results.get("networks", {})
    num_teachers = len(results["splits"][first].get("members", [])) if first else 0

    def network(name: str, system: str, epochs: str) -> str:
        shape = networks.get(system, {})
        size = f" of {shape['hidden_layers']} \u00d7 {shape['hidden_units']} units" if {"hidden_layers", "hidden_units"} <= shape.keys() else ""
        return f"{name}{size}" + (f", {settings[epochs]:g} epochs" if epochs in settings else "")

    parts = [network(f"{num_teachers} teachers", "teachers", "teacher_epochs") if num_teachers else "", network("one student", "distilled", "student_epochs"),
             f"T = {settings['temperature']:g}" if "temperature" in settings else "",
             f"{networks['teachers']['num_states']} states" if "num_states" in networks.get("teachers", {}) else ""]
    return " · ".join(part for part in parts if part)


def _tiles(rows: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    baseline, ensemble, distilled = (rows.get(system, {}) for system in ("baseline", "ensemble", "distilled"))
    tiles = []
    if "frame_accuracy" in distilled and "frame_accuracy" in baseline:
        tiles.append(("Frame accuracy, student", f"{_percent(distilled['frame_accuracy'], 2)} %",
                      f"single {_percent(baseline['frame_accuracy'], 2)} · ensemble {_percent(ensemble.get('frame_accuracy'), 2)}"))
    if "wer" in distilled:
        tiles.append(("Word error rate, student", f"{_percent(distilled['wer'], 1)} %",
                      f"single {_percent(baseline.get('wer'), 1)} · ensemble {_percent(ensemble.get('wer'), 1)}"))
    kept = rows.get("gain_kept", {}).get("frame_accuracy")
    if kept is not None and ensemble.get("frame_accuracy", 0) > baseline.get("frame_accuracy", 0):
        tiles.append(("Gain kept, frame accuracy", f"{_percent(kept, 0)} %", "86 % in Hinton, Vinyals & Dean (2015)"))
    if "probability_better" in distilled:
        tiles.append(("P(student better than single)", f"{_percent(distilled['probability_better'], 1)} %", "by WER, paired bootstrap, these networks"))
    return tiles


def _split_section(split: str, rows: Mapping[str, Any], networks: Mapping[str, Mapping[str, Any]], references: Mapping[str, Any]) -> Section:
    header = ["System", "Frame accuracy, %", "95 % interval", "WER, %", "95 % interval", "Errors / words", "Sub / del / ins", "RTF", "P(better)"]
    present = [system for system in SYSTEMS if system in rows]
    table = Table(header, [_system_cells(system, rows) for system in present], strong=present.index("distilled") if "distilled" in present else None)
    blocks: list[Any] = [table]
    members = rows.get("members", [])
    if members:
        decoded = sum("wer" in member for member in members)
        blocks.append(Note("Single network: the mean over the ensemble's members scored alone, ± their standard deviation (frame accuracy over "
                           f"{len(members)}, WER over {decoded}, their errors added). Members differ by their seeds only (initial weights, dropout): one of "
                           "them would be no baseline. The student and the control are one training each: intervals and P(better) are those of these networks, "
                           "and do not hold for other seeds."))
    if networks.get("distilled") and networks.get("control"):
        blocks.append(Note(_difference(networks["distilled"], networks["control"])))
    blocks.append(Note("Sub / del / ins: substituted, deleted and inserted words. RTF: real-time factor of the search; the networks' own time, which "
                       "the ensemble needs for each of its members, comes on top. P(better): share "
                       "of paired bootstrap replicates in which the system's WER is below that of the single networks. For comparison, the paper's table 1: "
                       "frame accuracy 58.9, 61.1, 60.8 % and WER 10.9, 10.7, 10.7 % for single network, ensemble, student."))
    if references.get("words"):
        unknown, words = references["out_of_vocabulary"], references["words"]
        blocks.append(Note(f"{unknown} of {words} words ({_percent(unknown / words, 1)} %) are not in the lexicon and the language model: "
                           "no system can recognise them."))
    if known := references.get("speakers_in_training"):
        blocks.append(Note(f"Speakers that are in the training splits too: {', '.join(known)}. Error rates say little about speakers never heard."))
    unfinished = [f"{rows[system]['unfinished']} ({NAMES[system]})" for system in present if rows[system].get("unfinished")]
    if unfinished:
        blocks.append(Note(f"Utterances whose search ended in no final state, so that their best unfinished words count: {', '.join(unfinished)}."))
    if "bootstrap" in rows:
        blocks.append(Note(_resampled(**rows["bootstrap"])))
    if any(measure in rows[system] for system in present for measure in ("frame_accuracy", "wer")):
        blocks.append(Figure(systems_figure(rows), "Rings: the members one by one. Wide bars: 95 % intervals."))
    if members:
        numbered = [[str(row.get("number", k)), _percent(row.get("frame_accuracy"), 2), _percent(row.get("wer"), 1)] for k, row in enumerate(members, start=1)]
        blocks.append(Table(["Member", "Frame accuracy, %", "WER, %"], numbered, folded="Members one by one"))
    return Section(f"Results on {split}", blocks)


def _difference(student: Mapping[str, Any], control: Mapping[str, Any]) -> str:
    """In what the student and its control differ besides the targets."""
    differing = [f"{key.replace('_', ' ')} ({student[key]} the student, {control.get(key)} the control)" for key in student if student[key] != control.get(key)]
    also = f" They also differ in {', '.join(differing)}." if differing else ""
    return f"Control: the network that learns as long as the student, from hard targets alone.{also}"


def _resampled(resampled: str, speakers: int) -> str:
    if resampled == "speakers":
        return f"Bootstrap over {speakers} speakers: intervals and P(better) allow for other speakers."
    return f"Bootstrap over utterances: intervals and P(better) are those of these {speakers} speakers, and say nothing about others."


def _system_cells(system: str, rows: Mapping[str, Any]) -> list[str]:
    row, members = rows[system], rows.get("members", []) if system == "baseline" else []
    edits = [str(row[kind]) for kind in ("substitutions", "deletions", "insertions") if kind in row]
    return [_name(system, rows), _percent(row.get("frame_accuracy"), 2) + _spread(members, "frame_accuracy", 2), _interval(row.get("frame_accuracy_ci95")),
            _percent(row.get("wer"), 1) + _spread(members, "wer", 1), _interval(row.get("wer_ci95")),
            f"{row['errors']} / {row['words']}" if {"errors", "words"} <= row.keys() else NONE, " / ".join(edits) if len(edits) == 3 else NONE,
            _decimal(row.get("real_time_factor")), _decimal(row.get("probability_better"))]


def _interval(ends: Sequence[float] | None) -> str:
    return f"{_percent(ends[0], 1)} to {_percent(ends[1], 1)}" if ends else NONE


def _name(system: str, rows: Mapping[str, Any]) -> str:
    members = len(rows.get("members", []))
    return NAMES[system] + ({"baseline": ", mean", "ensemble": f" of {members}"}.get(system, "") if members else "")


def _spread(members: list[Mapping[str, Any]], measure: str, digits: int) -> str:
    values = [member[measure] for member in members if measure in member]
    return f" ± {_percent(statistics.stdev(values), digits)}" if len(values) > 1 else ""


def _curves(results: Results) -> Section:
    curves = results.get("curves", {})
    blocks = [Figure(curves_figure(curves), "Frame accuracy on held-out speakers (solid) and on the training data (dotted).")] if curves else []
    return Section("Learning curves", blocks)


def _sweep(results: Results) -> Section:
    sweep = results.get("temperature_sweep") or {}
    students = [row for row in _with(sweep.get("rows", []), "temperature") if "frame_accuracy" in row or "wer" in row]
    if not students:
        return Section("Temperature", [])
    split = sweep.get("split", "a split that is not named")
    rows = [[f"{row['temperature']:g}", _percent(row.get("frame_accuracy"), 2), _percent(row.get("wer"), 1)] for row in students]
    references = results.get("splits", {}).get(split, {})
    return Section("Temperature", [Text(f"One student per temperature, all else equal; scored on {split}."),
                                   Figure(sweep_figure(students, references), "The same T for teachers and student, the loss multiplied by T²."),
                                   Table(["Temperature", "Frame accuracy, %", "WER, %"], rows)])


def _errors(results: Results) -> Section:
    blocks: list[Any] = []
    for split, errors in results.get("errors", {}).items():
        rated = {speaker: {system: rows[system] for system in SYSTEMS if "wer" in rows.get(system, {})}
                 for speaker, rows in (errors.get("per_speaker") or {}).items()}
        rated = {speaker: rows for speaker, rows in rated.items() if rows}
        if rated:
            blocks += [Text(f"{split}, by speaker", heading=True), Figure(speakers_figure(rated), _speakers_caption(len(rated))), _speaker_table(rated)]
        if errors.get("words"):
            blocks += [Text(f"{split}, words that the student confuses", heading=True), _word_table(errors["words"])]
        phones = _with(errors.get("phones") or [], "reference", "predicted", "frames", "share")
        if phones:
            blocks += [Text(f"{split}, phones that the student confuses", heading=True),
                       Figure(confusions_figure(phones), "Frames whose best state belongs to another phone than the reference's, and their share "
                              "of all frames of the reference phone.")]
    return Section("Where the errors are", blocks)


def _speakers_caption(speakers: int) -> str:
    return "Each speaker's word error rate." if speakers <= MAX_SPEAKERS else f"The {MAX_SPEAKERS} speakers of {speakers} with the highest word error rates."


def _speaker_table(per_speaker: Mapping[str, Mapping[str, Any]]) -> Table:
    present = [system for system in SYSTEMS if any(system in row for row in per_speaker.values())]
    rows = [[speaker, *(_rate(row.get(system)) for system in present)] for speaker, row in per_speaker.items()]
    return Table(["Speaker", *(f"{NAMES[system]}, WER %" for system in present)], rows, folded="Speakers one by one (errors / words)")


def _rate(row: Mapping[str, Any] | None) -> str:
    if row is None or "wer" not in row:
        return NONE
    return _percent(row["wer"], 1) + (f" ({row['errors']} / {row['words']})" if {"errors", "words"} <= row.keys() else "")


def _with(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[Mapping[str, Any]]:
    """The rows that have all of these keys."""
    return [row for row in rows if set(keys) <= row.keys()]


def _word_table(words: Mapping[str, Any], limit: int = 15) -> Table:
    """Substitutions, deletions and insertions side by side, most frequent first."""
    columns = [[f"{spoken} → {recognised} ({count})" for spoken, recognised, count in words.get("substitutions", [])],
               *([f"{word} ({count})" for word, count in words.get(kind, [])] for kind in ("deletions", "insertions"))]
    height = min(limit, max(len(column) for column in columns))
    rows = [[column[r] if r < len(column) else "" for column in columns] for r in range(height)]
    return Table(["Substituted (spoken → recognised, times)", "Deleted", "Inserted"], rows, text_columns=3)


def _calibration(results: Results) -> Section:
    blocks: list[Any] = []
    for split, systems in results.get("calibration", {}).items():
        rows = [[NAMES[system], _percent(systems[system].get("ece"), 2), *(_decimal(systems[system].get(measure)) for measure in ("nll", "brier"))]
                for system in SYSTEMS if system in systems]
        binned = {system: {**systems[system], "bins": _with(systems[system].get("bins", []), "confidence", "accuracy", "frames")}
                  for system in SYSTEMS if "ece" in systems.get(system, {})}
        binned = {system: row for system, row in binned.items() if row["bins"]}
        blocks.append(Text(split, heading=True))
        if binned:
            blocks.append(Figure(calibration_figure(binned), "Accuracy of frames by the confidence (highest posterior) of the network; on the "
                                 "diagonal confidence is deserved. Pale bars: how many frames there are."))
        blocks.append(Table(["System", "Expected calibration error, %", "Negative log-likelihood, nats", "Brier score"], rows))
    return Section("Calibration", blocks)


_MEANS = {"speaker": "Mean of the speaker, as in training", "corpus": "Mean of the split, as in training",
          "training": "Mean of the training data (transcribe)", "map": "Mean of the utterance shrunk to the training mean (transcribe)",
          "utterance": "Mean of the utterance"}


def _normalisation(results: Results) -> Section:
    rows = [[split, _MEANS.get(kind, kind), _rate(row)] for split, kinds in results.get("cost_of_normalisation", {}).items() for kind, row in kinds.items()]
    instead = ("each split's mean features; transcribe subtracts that of the training data." if results.get("settings", {}).get("cmvn") == "corpus" else
               "each speaker's mean features. A file from a speaker never seen has no such mean; transcribe uses the mean of the file, without its longer "
               "pauses, shrunk to that of the training data when the file is short.")
    text = Text(f"Training and scoring subtract {instead} Student's WER:")
    table = Table(["Split", "Mean that is subtracted", "WER, % (errors / words)"], rows, text_columns=2)
    return Section("Cost of an unseen speaker", [text, table] if rows else [])


def _exclusions(results: Results) -> Section:
    rows = [[split, reason, str(count)] for split, reasons in results.get("exclusions", {}).items() for reason, count in reasons.items()]
    return Section("Left out", [Table(["Split or networks", "Reason", "How many"], rows, text_columns=2)] if rows else [])


def _stages(results: Results) -> Section:
    stages = results.get("stages", {})
    if not stages:
        return Section("Time", [])
    return Section("Time", [Text(f"{duration(sum(stages.values()))} in all."), Figure(stages_figure(stages), "Wall time of each stage."),
                            Table(["Stage", "Seconds"], [[stage, f"{seconds:.1f}"] for stage, seconds in stages.items()], folded="Stages in seconds")])


def _settings(results: Results) -> Section:
    blocks: list[Any] = []
    for key, name in (("decoding", "Decoding, chosen on the tuning speakers"), ("settings", "All settings"), ("environment", "Machine and versions")):
        rows = [[str(item), str(value)] for item, value in results.get(key, {}).items()]
        if rows and key == "decoding":
            blocks += [Text(name, heading=True), Table(["Setting", "Value"], rows, text_columns=2)]
        elif rows:
            blocks.append(Table(["Setting", "Value"], rows, folded=name, text_columns=2))
    return Section("Settings", blocks)


def _percent(fraction: float | None, digits: int) -> str:
    return NONE if fraction is None else f"{100 * fraction:.{digits}f}"


def _decimal(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"
