"""Manifests of an evaluation, written by hand."""

import dataclasses

from askd_hf.evaluation.manifest import Manifest, ManifestMetadata
from askd_hf.evaluation.results import EvaluatedModel

SETTINGS = ManifestMetadata(
    role="student",
    model=EvaluatedModel("runs/tiny", 1000, 0.5, 2, 2),
    set=dict(
        name="set.1", dataset="speech", config=None, split="test", language="en", task="transcribe", on_hub=False
    ),
    method="short_form",
    decoding=dict(num_beams=1, generation_max_length=None, timestamps="none", dtype="float32"),
    runtime=dict(batch_size=4, device="cpu"),
    weights="00ff",
    data="abcd",
    rows=10,
    excluded={},
)

SPOKEN = [  # speaker, reference, the student's text, the teacher's
    (
        "ann",
        "The colour of the sea, Mr. Smith!",
        "the color of sea mister smith",
        "The color of the sea, Mr Smith.",
    ),
    ("ann", "twenty one ships", "21 ships sailed away", "21 ships"),
    ("ben", "won't you come", "will you come", "won't you come"),
    ("cem", "a b c d", "a b c d", "a b c"),
    ("dee", "uh hmm", "hmm", ""),  # only fillers: empty after the English normalizer
    ("eve", "ignore_time_segment_in_scoring", "what was said", "what was said"),
]


def write(directory, role, texts, name="spoken", chunks=None, **changes):
    """Write a complete manifest; texts are (speaker, reference, prediction), chunks the word times of each text."""
    metadata = dataclasses.replace(SETTINGS, role=role, weights=role, rows=len(texts), **changes)
    metadata.set = {**SETTINGS.set, "name": name} | changes.get("set", {})
    manifest = Manifest(directory / "manifests", role, name)
    manifest.prepare(metadata, batch_size=4)
    lines = []
    for i, (speaker, reference, prediction) in enumerate(texts):
        line = dict(
            clip=f"{i}.wav", reference=reference, prediction=prediction, duration=3.6, transcription_time=0.5, tokens=3
        )
        lines.append(line | ({"speaker": speaker} if speaker else {}) | ({"chunks": chunks[i]} if chunks else {}))
    manifest.append(lines)
    manifest.finish()
    return manifest
