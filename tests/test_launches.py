"""benchmarks/launches.py: the operations of a training step, which a GPU has to launch, do not become more."""

import re

from commands import run

MEASURED = 4327  # R50, 100 queries, 2 + 2 images, with torch 2.15


def test_a_guided_step_needs_no_more_launches_than_measured():
    printed = run("benchmarks/launches.py", processes=1).stdout
    numbers = {name: int(n) for name, n in re.findall(r"^(.*\S) +(\d+)$", printed, re.MULTILINE)}
    assert numbers["student backward, decoder"] > 500 and numbers["matching"] > 100, "each part is counted"
    assert numbers.pop("on the host, not counted") > 100
    total = numbers.pop("all")
    assert total == sum(numbers.values()) <= 1.03 * MEASURED
