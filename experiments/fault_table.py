"""Expected results of experiments/faults.py, and their table."""

from __future__ import annotations

from typing import Any

from fault_pair import GRACE, HEARTBEAT, STUCK, WATCHDOG

Row = tuple[str, Any, str, bool]


def judge_all(results: dict[str, Any], patience: float) -> list[Row]:
    """(what, figure, expected, as expected) of each check."""
    rows: list[Row] = []

    def add(what: str, figure: Any, expected: str, good: bool) -> None:
        rows.append((what, figure, expected, bool(good)))

    if kills := results.get("kills"):
        n, limit = kills["kills"], (max(HEARTBEAT, WATCHDOG) + GRACE) * patience
        add(
            f"{n} kills: mismatches of the loss curve",
            kills["mismatches"],
            "0",
            kills["mismatches"] == 0,
        )
        lost = kills["most_save_intervals_lost"]
        add("save intervals lost, at most", lost, "<= 2", lost <= 2)
        add(
            "survivors that ended",
            kills["survivors_out"],
            f"{n}",
            kills["survivors_out"] == n,
        )
        add(
            "slowest survivor, seconds",
            round(kills["slowest_survivor_seconds"], 1),
            f"<= {limit:g}",
            kills["slowest_survivor_seconds"] <= limit,
        )
        add("orphans", kills["orphans"], "0", kills["orphans"] == 0)
        wrong = results["without_position"]["mismatches"]
        add("without the data position: mismatches", wrong, "> 0", wrong > 0)
    for fault in ("stopped", "stuck"):
        if fault in results:
            found, bare = results[fault], results[f"{fault}_without_watchdog"]
            add(
                f"{fault} peer: survivor's exit status",
                found["survivor_status"],
                f"{STUCK}",
                found["survivor_status"] == STUCK,
            )
            add(
                f"{fault} peer: seconds",
                round(found["survivor_seconds"], 1),
                f"<= {WATCHDOG + GRACE}",
                found["survivor_status"] is not None,
            )
            add(f"{fault} peer is named", found["named"], "True", found["named"])
            add(
                f"{fault} peer ends too",
                found["other_status"],
                "not 0 or None",
                found["other_status"] not in (0, None),
            )
            add(
                f"{fault}, without watchdog: status",
                bare["survivor_status"],
                "None (hangs)",
                bare["survivor_status"] is None,
            )
    if "terminated" in results:
        found = results["terminated"]
        add("SIGTERM: steps lost", found["steps_lost"], "0", found["steps_lost"] == 0)
    if "nans" in results:
        found, bare = results["nans"], results["nans_without_skip"]
        add(
            f"{found['injected']} NaN steps: states changed",
            found["states_changed"],
            "0",
            found["states_changed"] == 0
            and found["statuses"] == [0, 0]
            and found["states_compared"] == 2 * found["injected"],
        )
        add(
            "without skipping: states changed",
            bare["states_changed"],
            "> 0",
            bare["states_changed"] > 0,
        )
    if "corruptions" in results:
        found = results["corruptions"]
        n, wrong = found["corruptions"], found["without_manifest_silent_wrong"]
        add(
            f"{n} corruptions: silent wrong restores",
            found["silent_wrong_restores"],
            "0",
            found["silent_wrong_restores"] == 0,
        )
        add(
            "fell back, bit for bit",
            found["fell_back_bit_for_bit"],
            f"{n}",
            found["fell_back_bit_for_bit"] == n,
        )
        add("without manifest: silent wrong restores", wrong, "> 0", wrong > 0)
    if "full_disks" in results:
        found = results["full_disks"]
        n = found["disk_full"]
        for name in ("failed_and_said_so", "last_good_kept", "goes_on_with_room"):
            add(
                f"{n} full disks: {name.replace('_', ' ')}",
                found[name],
                f"{n}",
                found[name] == n,
            )
        add(
            "full disk, Orbax alone: lost the last good",
            found["orbax_alone_lost_it"],
            "> 0",
            found["orbax_alone_lost_it"] > 0,
        )
    return rows


def format_table(rows: list[Row]) -> str:
    width = max(len(row[0]) for row in rows)
    lines = []
    for what, figure, expected, good in rows:
        verdict = "ok" if good else "MISSED"
        lines.append(f"{what.ljust(width)}  {figure!s:>8}  {expected:<14} {verdict}")
    return "\n".join(lines)
