# SPDX-License-Identifier: Apache-2.0
"""The rules of the Trace Event format, as far as viewers insist on them, checked without a viewer."""

from __future__ import annotations

import json
from typing import Any

PHASES = {"M", "X", "B", "E", "i", "s", "f"}


def load(text: str) -> list[dict[str, Any]]:
    """Return the events of a complete file."""
    events: list[dict[str, Any]] = json.loads(text)
    return events


def problems(events: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong with a trace; nothing for one that viewers show in full."""
    results: list[str] = []
    processes = {event["pid"] for event in events if event.get("name") == "process_name"}
    threads = {(event["pid"], event["tid"]) for event in events if event.get("name") == "thread_name"}
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        phase = event.get("ph")
        if phase not in PHASES:
            results.append(f"phase {phase!r}")
            continue
        if phase == "M":
            if not event["args"]:
                results.append(f"metadata without a value: {event}")
            continue
        track = event["pid"], event["tid"]
        tracks.setdefault(track, []).append(event)
        if event["pid"] not in processes or track not in threads:
            results.append(f"track {track} has no name")
        if not isinstance(event.get("ts"), (int, float)) or event["ts"] < 0:
            results.append(f"time of {event}")
        if phase != "E" and not (event.get("name") and event.get("cat")):
            results.append(f"no name or category: {event}")
    tids = [event["tid"] for event in events if event.get("name") == "thread_name"]
    if len(set(tids)) != len(tids):
        results.append("a thread id stands for two tracks")
    for track, entries in tracks.items():
        results += [f"track {track}: {text}" for text in _nesting(entries)]
    return results + _flows(events)


def _nesting(events: list[dict[str, Any]]) -> list[str]:
    rows: list[str] = []
    # Viewers sort by time; at the same time an end comes first, and of two beginnings the longer one.
    points: list[tuple[float, int, float, dict[str, Any]]] = []
    last = None
    for event in events:
        if event["ph"] in "BE":
            if last is not None and event["ts"] < last:
                rows.append(f"goes back in time: {event}")
            last = event["ts"]
            points.append((event["ts"], 0 if event["ph"] == "E" else 1, 0.0, event))
        elif event["ph"] == "X":
            if event.get("dur", -1) < 0:
                rows.append(f"no duration: {event}")
            points.append((event["ts"], 1, -event.get("dur", 0), event))
    stack: list[float] = []
    for when, _, _, event in sorted(points, key=lambda point: point[:3]):
        while stack and stack[-1] <= when + 1e-6 and event["ph"] != "E":
            stack.pop()
        if event["ph"] == "X":
            end = when + event["dur"]
            if stack and end > stack[-1] + 0.001:
                rows.append(f"overlaps what it is in: {event}")
            stack.append(end)
        elif event["ph"] == "B":
            stack.append(float("inf"))
        else:
            while stack and stack[-1] != float("inf"):
                stack.pop()
            if not stack:
                rows.append(f"ends what never began: {event}")
            else:
                stack.pop()
    if float("inf") in stack:
        rows.append("a slice has no end")
    return rows


def _flows(events: list[dict[str, Any]]) -> list[str]:
    collected: list[str] = []
    starts = {event["id"]: event["ts"] for event in events if event.get("ph") == "s"}
    if len(starts) != sum(event.get("ph") == "s" for event in events):
        collected.append("two flows have one id")
    slices = [event for event in events if event.get("ph") == "X"]
    for event in events:
        if event.get("ph") not in ("s", "f"):
            continue
        if event["ph"] == "f" and (event["id"] not in starts or starts[event["id"]] > event["ts"]):
            collected.append(f"an arrow from nowhere: {event}")
        track = event["pid"], event["tid"]
        if not any(
            (one["pid"], one["tid"]) == track and one["ts"] <= event["ts"] <= one["ts"] + one["dur"]
            for one in slices
        ):
            collected.append(f"an arrow outside of any slice: {event}")
    return collected
