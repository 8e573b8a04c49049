"""A goal that cannot be met: what is in conflict, and every way out that is named leads out."""

from __future__ import annotations

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_a_goal_out_of_reach_names_what_is_reachable(puzzle, one_line_error, own_library):
    """And the named value can indeed be had."""
    done = puzzle("solve", own_library, "--throughput", "1000x", *SOLVE)
    one_line_error(done, "--throughput 1000x cannot be met", "fastest child", "x (", "relax it")
    best = float(done.stderr.split("reaches ")[1].split("x")[0])
    assert puzzle("solve", own_library, "--throughput", f"{best * 0.99}x", *SOLVE).exit_code == 0
    assert puzzle("solve", own_library, "--throughput", f"{best * 1.02}x", *SOLVE).exit_code == 2


def test_two_goals_in_conflict_name_both_ways_out(puzzle, one_line_error, own_library):
    """And each way out, taken alone, leads out."""
    done = puzzle("solve", own_library, "--throughput", "1000x", *SOLVE)
    most = float(done.stderr.split("reaches ")[1].split("x")[0])
    both = puzzle("solve", own_library, "--throughput", f"{most * 0.99}x", "--keep-attention", 4, *SOLVE)
    one_line_error(both, "cannot be met together", "the fastest child reaches", "at most")
    reached = float(both.stderr.split("reaches ")[1].split("x")[0])
    kept = int(both.stderr.split("at most ")[1].split()[0])
    way_out = ["--throughput", f"{reached * 0.99}x", "--keep-attention", 4, *SOLVE]
    assert puzzle("solve", own_library, *way_out).exit_code == 0
    way_out = ["--throughput", f"{most * 0.99}x", "--keep-attention", kept, *SOLVE]
    assert puzzle("solve", own_library, *way_out).exit_code == 0
