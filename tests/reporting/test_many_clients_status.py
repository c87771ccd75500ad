"""The status of very many clients."""

from __future__ import annotations

from heterotune_flwr.reporting.status import Standing, follow, render


def test_the_status_of_very_many_clients_is_a_line_per_type():
    events = [
        {"event": "describe", "types": {}, "members": {f"c{i}": f"t{i % 2}" for i in range(60)}}
    ]
    events += [
        {"event": "train_reply", "round": 1, "client_id": f"c{i}", "type": f"t{i % 2}"}
        for i in range(10)
    ]
    events += [{"event": "client_failed", "client_id": "c3", "reason": "gone"}] * 2
    text = render(follow(events, Standing("d", "running")), now=0.0).splitlines()
    assert "t0: 30 clients, 5 have trained (5 answers), 0 failures" in text
    assert "t1: 30 clients, 5 have trained (5 answers), 2 failures" in text
    assert "  c3: 2 failures; gone" in text
    assert len(text) < 8
    few = render(follow(events[1:], Standing("d", "running")), now=0.0)
    assert sum(line.startswith("c") for line in few.splitlines()) == 12
    assert "c3 failed 2 times in a row: gone" in few
