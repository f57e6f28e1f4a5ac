"""`omni eval`: what a model knows about recordings it never saw, and whether it knows it from its pictures.

Every metric stands beside what needs no picture (the train set's median, constant velocity) and beside controls: the
same model shown the pictures of another recording, its first frame again and again, its cameras or its frames in
another order, and a twin trained blind.
"""

from omni_cli.stages.evaluate.asking import Asker, Condition, Pictures
from omni_cli.stages.evaluate.candidates import (
    Candidate,
    candidate_of_base,
    candidate_of_model,
    candidate_of_run,
    fetched_model,
)
from omni_cli.stages.evaluate.comparison import compare
from omni_cli.stages.evaluate.request import EVAL, REPORT_FILE, SWAPPED, EvalRequest
from omni_cli.stages.evaluate.scored import Scored
from omni_cli.stages.evaluate.stage import check_leak, evaluate, measure
from omni_cli.stages.evaluate.tables import is_silent, metric_title, show_scores, table_of, verdicts

__all__ = [
    "EVAL",
    "REPORT_FILE",
    "SWAPPED",
    "Asker",
    "Candidate",
    "Condition",
    "EvalRequest",
    "Pictures",
    "Scored",
    "candidate_of_base",
    "candidate_of_model",
    "candidate_of_run",
    "check_leak",
    "compare",
    "evaluate",
    "fetched_model",
    "is_silent",
    "measure",
    "metric_title",
    "show_scores",
    "table_of",
    "verdicts",
]
