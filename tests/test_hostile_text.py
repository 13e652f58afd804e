"""Files that are made to fill a machine are refused in one line, quickly and in little memory."""

import re

import pytest
from hostile_text import CASES, MAX_BYTES, MAX_SECONDS, measure, write


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_hostile_file_is_refused_in_one_line_30_seconds_and_500_mb(case, tmp_path):
    path = write(case, tmp_path)
    outcome = measure(case, path)
    path.unlink()
    assert outcome.told.startswith(str(path))
    assert re.search(case.told, outcome.told)
    assert "\n" not in outcome.told
    assert outcome.seconds < MAX_SECONDS
    assert outcome.peak < MAX_BYTES
