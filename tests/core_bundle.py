"""A small bundle of CORE tasks, one of each kind, in the form of nanochat's."""

import json
from pathlib import Path

LISTING = """\
icl_tasks:
- label: colours
  dataset_uri: language_understanding/colours.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
- label: schemata
  dataset_uri: schemata.jsonl
  num_fewshot: [0]
  icl_task_type: schema
- label: words
  dataset_uri: words.jsonl
  num_fewshot: [1]
  icl_task_type: language_modeling
"""
BASELINES = "Eval Task,Task Category,Random baseline\ncolours,x,25\nschemata,x,50.0\nwords,x,0\n"
FILES = {
    "language_understanding/colours.jsonl": [
        {"query": f"Question {i}: which colour?", "choices": ["red", "green", "blue", "grey"], "gold": i % 4}
        for i in range(8)
    ],
    "schemata.jsonl": [
        {"context_options": [f"The cup {i}", "The table"], "continuation": "is small", "gold": i % 2} for i in range(6)
    ],
    "words.jsonl": [{"context": f"{i} and again {i}  ", "continuation": f"and {i}"} for i in range(5)],
}


def write(folder: Path) -> Path:
    """Write the bundle into a folder that exists; return the folder."""
    (folder / "core.yaml").write_text(LISTING)
    (folder / "eval_meta_data.csv").write_text(BASELINES)
    for name, examples in FILES.items():
        path = folder / "eval_data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return folder
